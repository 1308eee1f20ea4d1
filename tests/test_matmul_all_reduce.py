"""torch.ops.symmpatterns.matmul_all_reduce between real processes: numerics, agreement, errors, compiled programs."""

from __future__ import annotations

import gc
import time
import unittest

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch import Tensor, nn

import symmpatterns
from symmpatterns import host_backend
from symmpatterns.testing import (
    RankError,
    assert_same_on_all_ranks,
    assert_within_budget,
    compiled_code,
    fake_group,
    run_ranks,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [(1, 8, 16), (3, 5, 7), (16, 64, 32), (33, 17, 65), (128, 96, 64), (2, 300, 1)]


def group_name() -> str:
    return dist.group.WORLD.group_name


def operands(rank: int, m: int, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    a = torch.randn(m, k, generator=generator).to(dtype)
    b = torch.randn(k, n, generator=generator).to(dtype)
    return a, b


def _sequence(rank: int, world_size: int, dtype: str, kernels: str) -> list[Tensor]:
    results = []
    with symmpatterns.config.patch(host_kernels=kernels, timeout_s=60):
        for seed, (m, n, k) in enumerate(SHAPES):
            a, b = operands(rank, m, n, k, DTYPES[dtype], seed)
            bias = a.new_full((n,), 0.5) if seed % 2 else None
            if seed % 3 == 2:  # the layout of nn.Linear's weight
                b = b.t().contiguous().t()
            results.append(torch.ops.symmpatterns.matmul_all_reduce(a, b, "sum", group_name(), bias=bias))
    return results


def _integers(rank: int, world_size: int) -> bool:
    a = torch.randint(-4, 5, (37, 29), generator=torch.Generator().manual_seed(rank)).float()
    b = torch.randint(-4, 5, (29, 41), generator=torch.Generator().manual_seed(50 + rank)).float()
    expected = a @ b
    dist.all_reduce(expected)
    mean = torch.ops.symmpatterns.matmul_all_reduce(a, b, "avg", group_name())
    return torch.equal(torch.ops.symmpatterns.matmul_all_reduce(a, b, "sum", group_name()), expected) and torch.equal(
        mean, expected / world_size
    )


def _different_k(rank: int, world_size: int) -> bool:
    a, b = torch.ones(4, 3 + rank), torch.ones(3 + rank, 5)
    result = torch.ops.symmpatterns.matmul_all_reduce(a, b, "sum", group_name())
    return torch.equal(result, torch.full((4, 5), float(sum(3 + r for r in range(world_size)))))


def _empty(rank: int, world_size: int) -> list[tuple[int, ...]]:
    op = torch.ops.symmpatterns.matmul_all_reduce
    results = [
        op(torch.ones(m, k), torch.ones(k, n), "sum", group_name()) for m, n, k in ((0, 3, 4), (3, 0, 4), (3, 4, 0))
    ]
    assert torch.equal(results[2], torch.zeros(3, 4))
    return [tuple(r.shape) for r in results]


def _subgroups(rank: int, world_size: int) -> list[float]:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    odd = dist.new_group([1, 3])
    mine = halves[rank // 2]
    answers = []
    for _ in range(5):
        for group in (mine, odd if rank in (1, 3) else None, dist.group.WORLD):
            if group is not None:
                a = torch.full((2, 2), float(10**rank))
                out = torch.ops.symmpatterns.matmul_all_reduce(a, torch.eye(2), "sum", group.group_name)
                answers.append(float(out[0, 0]))
    return answers[:3] if rank in (1, 3) else answers[:2]


def _recreated(rank: int, world_size: int) -> list[float]:
    answers = []
    for round_ in range(3):
        group = dist.new_group(list(range(world_size)))
        out = torch.ops.symmpatterns.matmul_all_reduce(
            torch.full((1, 1), float(rank + round_)), torch.ones(1, 1), "sum", group.group_name
        )
        answers.append(float(out))
        dist.destroy_process_group(group)
    gc.collect()
    # The last group's memory stays until another group is used; that of the others is gone.
    assert host_backend.load().live_segments() <= 1, host_backend.load().live_segments()
    return answers


def _default_group_recreated(rank: int, world_size: int) -> list[float]:
    answers = []
    store = dist.distributed_c10d._get_default_store()
    for round_ in range(3):
        out = torch.ops.symmpatterns.matmul_all_reduce(
            torch.full((1, 1), float(rank + round_)), torch.ones(1, 1), "sum", group_name()
        )
        answers.append(float(out))
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.PrefixStore(str(round_), store), rank=rank, world_size=world_size)
    return answers


def _divergent(rank: int, world_size: int) -> str:
    try:
        torch.ops.symmpatterns.matmul_all_reduce(torch.ones(2 + rank, 2), torch.ones(2, 2), "sum", group_name())
    except symmpatterns.DivergenceError as error:
        return str(error)
    return "no error"


def _missing_peer(rank: int, world_size: int) -> tuple[str, float]:
    op = torch.ops.symmpatterns.matmul_all_reduce
    with symmpatterns.config.patch(timeout_s=2):
        op(torch.ones(2, 2), torch.ones(2, 2), "sum", group_name())
        if rank == 1:
            time.sleep(6)
            return "", 0.0
        begin = time.monotonic()
        try:
            op(torch.ones(2, 2), torch.ones(2, 2), "sum", group_name())
        except symmpatterns.SymmetricMemoryTimeout as error:
            took = time.monotonic() - begin
            try:
                op(torch.ones(2, 2), torch.ones(2, 2), "sum", group_name())
            except symmpatterns.SymmetricMemoryError as again:
                return f"{error} / {again}", took
    return "no error", 0.0


class OperatorTest(unittest.TestCase):
    @parameterized.expand(
        [(dtype, world_size, "aten") for dtype in DTYPES for world_size in (2, 3, 4)]
        + [("float32", 2, "triton"), ("bfloat16", 3, "triton")]
    )
    def test_numerics(self, dtype: str, world_size: int, kernels: str) -> None:
        env = {"TRITON_INTERPRET": "1"} if kernels == "triton" else None
        results = run_ranks(_sequence, world_size, dtype, kernels, env=env, timeout=180)
        for index, (m, n, k) in enumerate(SHAPES):
            pairs = [operands(rank, m, n, k, DTYPES[dtype], index) for rank in range(world_size)]
            shift = 0.5 * world_size if index % 2 else 0.0
            exact = sum(a.double() @ b.double() for a, b in pairs) + shift
            # The same computation in the same dtype: plain products, summed in float32, rounded once.
            reference = sum((a @ b + shift / world_size).float() for a, b in pairs).to(DTYPES[dtype])
            ranks = [result[index] for result in results]
            assert_same_on_all_ranks(ranks)
            assert_within_budget(ranks[0], exact, reference)

    @parameterized.expand([(2,), (3,), (4,), (8,)])
    def test_integers_are_exact(self, world_size: int) -> None:
        self.assertTrue(all(run_ranks(_integers, world_size)))

    def test_inner_sizes_may_differ_between_ranks(self) -> None:
        self.assertTrue(all(run_ranks(_different_k, 3)))

    def test_empty_operands(self) -> None:
        self.assertEqual(run_ranks(_empty, 2), [[(0, 3), (3, 0), (3, 4)]] * 2)

    def test_several_groups_at_once(self) -> None:
        self.assertEqual(
            run_ranks(_subgroups, 4),
            [[11.0, 1111.0], [11.0, 1010.0, 1111.0], [1100.0, 1111.0], [1100.0, 1010.0, 1111.0]],
        )

    def test_groups_destroyed_and_made_again(self) -> None:
        self.assertEqual(run_ranks(_recreated, 2), [[1.0, 3.0, 5.0]] * 2)
        self.assertEqual(run_ranks(_default_group_recreated, 2), [[1.0, 3.0, 5.0]] * 2)

    def test_ranks_with_different_shapes_all_get_an_error(self) -> None:
        for text in run_ranks(_divergent, 2):
            self.assertIn("disagree on a call of matmul_all_reduce: M: rank 0 has 2, rank 1 has 3", text)

    def test_a_peer_that_does_not_come(self) -> None:
        text, took = run_ranks(_missing_peer, 2)[0]
        self.assertIn("rank 1", text)
        self.assertIn("can no longer be used", text)
        self.assertLess(took, 4)

    def test_opcheck(self) -> None:
        with fake_group(2) as name:
            for args, kwargs in (
                ((torch.randn(3, 4), torch.randn(4, 5), "sum", name), {}),
                ((torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16().t(), "avg", name), {}),
                ((torch.randn(3, 4), torch.randn(4, 5), "sum", name), {"bias": torch.randn(5)}),
            ):
                torch.library.opcheck(torch.ops.symmpatterns.matmul_all_reduce.default, args, kwargs)

    @parameterized.expand(
        [
            (
                "dims",
                lambda r: (r(2, 3, 4), r(4, 5), "sum"),
                ValueError,
                "a must have 2 dimensions, not shape \\[2, 3, 4\\]",
            ),
            ("b dims", lambda r: (r(3, 4), r(4), "sum"), ValueError, "b must have 2 dimensions"),
            ("inner", lambda r: (r(3, 4), r(5, 6), "sum"), ValueError, "do not multiply: K is 4 and 5"),
            (
                "mixed",
                lambda r: (r(3, 4), r(4, 5).half(), "sum"),
                TypeError,
                "one dtype, not a torch.float32, b torch.float16",
            ),
            ("dtype", lambda r: (r(3, 4).double(), r(4, 5).double(), "sum"), TypeError, "not torch.float64"),
            ("integers", lambda r: (r(3, 4).int(), r(4, 5).int(), "sum"), TypeError, "not torch.int32"),
            ("reduce op", lambda r: (r(3, 4), r(4, 5), "max"), ValueError, "one of sum, avg, not 'max'"),
            ("device", lambda r: (r(3, 4), r(4, 5).to("meta"), "sum"), ValueError, "a on cpu, b on meta"),
        ]
    )
    def test_bad_operands(self, _: str, make, error: type, text: str) -> None:
        with fake_group(2) as name, self.assertRaisesRegex(error, text):
            torch.ops.symmpatterns.matmul_all_reduce(*make(torch.randn), name)

    def test_bad_groups(self) -> None:
        with self.assertRaisesRegex(symmpatterns.SymmetricMemoryError, "init_process_group"):
            torch.ops.symmpatterns.matmul_all_reduce(torch.ones(2, 2), torch.ones(2, 2), "sum", "0")
        with (
            fake_group(2),
            self.assertRaisesRegex(symmpatterns.SymmetricMemoryError, "no process group named 'nobody'"),
        ):
            torch.ops.symmpatterns.matmul_all_reduce(torch.ones(2, 2), torch.ones(2, 2), "sum", "nobody")

    def test_triton_kernels_without_the_interpreter(self) -> None:
        with self.assertRaisesRegex(RankError, "set TRITON_INTERPRET=1"):
            run_ranks(_sequence, 2, "float32", "triton")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


def _dtensor_mlp(rank: int, world_size: int) -> dict[str, object]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world_size,))
    model = parallelize_module(MLP(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    x = torch.randn(2, 8, 32, requires_grad=True)

    def gradients(fn) -> list[Tensor]:
        x.grad = None
        model.zero_grad()
        y = fn(x)
        y.square().sum().backward()
        full = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        return [y.detach(), x.grad.clone(), *full]

    expected = gradients(model)
    with torch._inductor.config.patch(fx_graph_cache=False):
        actual = gradients(torch.compile(model, fullgraph=True))
    report = symmpatterns.report()
    return {
        "errors": [float((a - e).abs().max() / e.abs().max()) for a, e in zip(actual, expected)],
        "rewrites": [(r.family, r.shape) for r in report.rewrites],
        "declined": [(r.code, r.reason) for r in report.declined],
        "output": actual[0],
    }


def _compiled_loop(rank: int, world_size: int) -> list[Tensor]:
    """A compiled function called with changing payloads and sizes, mixed with eager calls."""
    generator = torch.Generator().manual_seed(rank)

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return funcol.all_reduce(x @ w, "sum", dist.group.WORLD).relu()

    compiled = torch.compile(fn, fullgraph=True, dynamic=True)
    results = []
    for step in range(12):
        x = torch.randn(3 + 5 * (step % 4), 16, generator=generator)
        w = torch.randn(16, 8, generator=generator)
        actual, expected = compiled(x, w), fn(x, w)
        torch.testing.assert_close(actual, expected)
        results.append(actual)
        torch.ops.symmpatterns.matmul_all_reduce(x, w, "sum", group_name())
    return results


class CompiledTest(unittest.TestCase):
    @pytest.mark.slow  # test_llama.py trains one
    def test_dtensor_mlp_forward_and_backward(self) -> None:
        self.check_dtensor_mlp(2)

    @pytest.mark.slow
    def test_dtensor_mlp_on_four_ranks(self) -> None:
        self.check_dtensor_mlp(4)

    def check_dtensor_mlp(self, world_size: int) -> None:
        results = run_ranks(_dtensor_mlp, world_size, timeout=200)
        for result in results:
            self.assertEqual(result["rewrites"], [("matmul_all_reduce", (2, 8, 32))] * 2, result["declined"])
            self.assertEqual(result["declined"], [])
            self.assertLess(max(result["errors"]), 1e-5)
        assert_same_on_all_ranks([result["output"] for result in results])

    def test_many_calls_of_changing_size(self) -> None:
        results = run_ranks(_compiled_loop, 2, timeout=200)
        for pair in zip(*results):
            assert_same_on_all_ranks(pair)


def _code(rank: int, world_size: int) -> str:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return funcol.all_reduce(x @ w, "sum", dist.group.WORLD)

    result, code = compiled_code(fn, torch.ones(4, 4), torch.ones(4, 4))
    assert torch.equal(result, torch.full((4, 4), 4.0 * world_size))
    return code


def test_generated_code_has_one_call_and_no_collective() -> None:
    for code in run_ranks(_code, 2):
        assert code.count("torch.ops.symmpatterns.matmul_all_reduce.default(") == 1
        assert "_c10d_functional" not in code and "extern_kernels." not in code


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class GpuTest(unittest.TestCase):
    @parameterized.expand([(dtype,) for dtype in DTYPES])
    def test_numerics(self, dtype: str) -> None:
        results = run_ranks(_gpu_sequence, 2, dtype, backend="nccl", timeout=240)
        for index, (m, n, k) in enumerate(GPU_SHAPES):
            pairs = [operands(rank, m, n, k, DTYPES[dtype], index) for rank in range(2)]
            exact = sum(a.double() @ b.double() for a, b in pairs)
            reference = sum(_one_accumulator(a, b) for a, b in pairs).to(DTYPES[dtype])
            ranks = [result[index] for result in results]
            assert_same_on_all_ranks(ranks)
            assert_within_budget(ranks[0], exact, reference)


def _one_accumulator(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, rounded to its dtype, in fp32. In fp32 terms are added one by one, as a tile of a kernel does: libraries add
    long sums in parts, and so have errors several times smaller."""
    if a.dtype != torch.float32:
        return (a.cuda() @ b.cuda()).cpu().float()
    total = torch.zeros(a.shape[0], b.shape[1])
    for k in range(a.shape[1]):
        total.addr_(a[:, k], b[k])
    return total


GPU_SHAPES = [(1, 256, 512), (16, 512, 256), (100, 300, 77), (512, 1024, 256), (2048, 512, 128)]


def _gpu_sequence(rank: int, world_size: int, dtype: str) -> list[Tensor]:
    results = []
    for seed, (m, n, k) in enumerate(GPU_SHAPES):
        a, b = (t.cuda() for t in operands(rank, m, n, k, DTYPES[dtype], seed))
        for _ in range(3):
            out = torch.ops.symmpatterns.matmul_all_reduce(a, b, "sum", group_name())
        results.append(out.cpu())
    return results
