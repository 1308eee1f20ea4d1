"""matmul -> reduce-scatter and all-gather -> matmul between real processes: numerics, forms, errors, whole MLPs."""

from __future__ import annotations

import unittest

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch import Tensor, nn

import symmpatterns
from symmpatterns import compat
from symmpatterns.testing import assert_within_budget, fake_group, run_ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# (leading sizes per rank along the scattered or gathered dimension are multiplied by W), K, N, dim
REDUCE_SCATTER = [
    ((3,), 16, 8, 0),
    ((3,), 16, 5, 1),
    ((2, 5), 7, 6, 0),
    ((2, 5), 7, 6, 1),
    ((1, 5), 7, 6, 1),
    ((2, 5), 7, 6, 2),
    ((2, 3, 4), 9, 10, 2),
    ((33,), 65, 17, 0),
    ((1,), 300, 1, 0),
]
ALL_GATHER = [
    ((3,), 16, (8,), 0),
    ((3,), 16, (5, 9), 1),
    ((2, 5), 7, (6,), 0),
    ((2, 5), 7, (6, 3), 1),
    ((1, 5), 7, (6,), 1),
    ((2, 5), 7, (6,), 2),
    ((2, 3, 4), 9, (10,), 2),
    ((33,), 65, (17,), 0),
]


def group_name() -> str:
    return dist.group.WORLD.group_name


def random(shape: tuple[int, ...], dtype: torch.dtype, *seed: int) -> Tensor:
    number = sum(s * 1009**i for i, s in enumerate(seed, start=1))
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(dtype)


def scatter_operands(case: int, rank: int, world_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    lead, k, n, dim = REDUCE_SCATTER[case]
    shape = [*lead, n]
    shape[dim] *= world_size
    a, b = random((*shape[:-1], k), dtype, case, rank, 1), random((k, shape[-1]), dtype, case, rank, 2)
    return a, b, random((shape[-1],), dtype, case, rank, 3) if case % 2 else None


def gather_operands(case: int, rank: int, world_size: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    lead, k, widths, dim = ALL_GATHER[case]
    inner = k * (world_size if dim == len(lead) else 1)
    bs = [random((inner, n), dtype, case, rank, 5 + i) for i, n in enumerate(widths)]
    return random((*lead, k), dtype, case, rank, 4), bs


def _run_all(rank: int, world_size: int, dtype_name: str, kernels: str) -> tuple[list, list]:
    dtype = DTYPES[dtype_name]
    scattered, gathered = [], []
    with symmpatterns.config.patch(host_kernels=kernels, timeout_s=60):
        for _ in range(2):  # again on used staging
            scattered, gathered = [], []
            for case, (*_, dim) in enumerate(REDUCE_SCATTER):
                a, b, bias = scatter_operands(case, rank, world_size, dtype)
                op = "avg" if case % 3 == 1 else "sum"
                scattered.append(torch.ops.symmpatterns.matmul_reduce_scatter(a, b, op, dim, group_name(), bias=bias))
            for case, (*_, dim) in enumerate(ALL_GATHER):
                shard, bs = gather_operands(case, rank, world_size, dtype)
                keep = case % 2 == 0
                biases = [b[0] if i == 0 else None for i, b in enumerate(bs)] if case % 3 == 0 else []
                full, outs = torch.ops.symmpatterns.all_gather_matmul(shard, bs, dim, group_name(), keep, biases=biases)
                assert (full is not None) == keep
                gathered.append((full, outs))
    return scattered, gathered


def _empty(rank: int, world_size: int) -> list[tuple[int, ...]]:
    rs, ag = torch.ops.symmpatterns.matmul_reduce_scatter, torch.ops.symmpatterns.all_gather_matmul
    ones = torch.ones
    a = rs(ones(0, 3), ones(3, 4), "sum", 0, group_name())
    b = rs(ones(4, 0), ones(0, 4), "sum", 0, group_name())
    full, (c,) = ag(ones(0, 3), [ones(3, 4)], 0, group_name(), True)
    _, (d,) = ag(ones(2, 0), [ones(0, 4)], 0, group_name(), False)
    assert float(b.abs().sum()) == 0 and float(d.abs().sum()) == 0
    return [tuple(t.shape) for t in (a, b, full, c, d)]


def _differing(rank: int, world_size: int) -> list[bool]:
    """Ranks with operands of their own where only their own product takes them."""
    ops, name, rows = torch.ops.symmpatterns, group_name(), 2 * world_size
    a, b = torch.ones(rows, 3), torch.ones(3, 4)
    bias = torch.ones(4) if rank == 0 else None  # as row-parallel layers do, because the sum is to have it once
    total = ops.matmul_all_reduce(a, b, "sum", name, bias=bias)
    part = ops.matmul_reduce_scatter(a, b, "sum", 0, name, bias=bias)
    of_columns = torch.ones(3, 2 + rank)  # their number does not divide by the ranks
    _, (product,) = ops.all_gather_matmul(a, [of_columns], 0, name, False)
    wanted = 3.0 * world_size + 1
    return [
        torch.equal(total, torch.full((rows, 4), wanted)),
        torch.equal(part, torch.full((2, 4), wanted)),
        torch.equal(product, torch.full((rows * world_size, 2 + rank), 3.0)),
    ]


def _thin_gather(rank: int, world_size: int) -> list[tuple[int, ...]]:
    full, outs = torch.ops.symmpatterns.all_gather_matmul(torch.ones(2, 1, 6), [torch.ones(6, 8)], 1, group_name())
    return [full.stride(), *(out.stride() for out in outs)]


def _gradients(rank: int, world_size: int) -> list[str]:
    """The operators whose results or gradients are not those of torch's matmul and functional collectives."""
    ops, name, group = torch.ops.symmpatterns, group_name(), dist.group.WORLD

    def summed(x: Tensor) -> Tensor:
        return funcol.all_reduce(x, "sum", group)

    def scattered(x: Tensor, dim: int) -> Tensor:
        return funcol.reduce_scatter_tensor(x, "sum", dim, group)

    def gathered(x: Tensor, dim: int) -> Tensor:
        return funcol.all_gather_tensor(x, dim, group)

    def reduced(a: Tensor, b: Tensor, c: Tensor | None = None, op: str = "sum") -> Tensor:
        return ops.matmul_all_reduce(a, b, op, name, bias=c)

    cases = [
        ("all-reduce", reduced, lambda a, b, c: summed(a @ b + c), [(6, 5), (5, 4), (4,)]),
        ("mean", lambda a, b: reduced(a, b, None, "avg"), lambda a, b: summed(a @ b) / world_size, [(6, 5), (5, 4)]),
        ("batch", reduced, lambda a, b, c: summed(a @ b + c[:, None]), [(3, 6, 5), (3, 5, 4), (3, 4)]),
        ("batch, one row", reduced, lambda a, b, c: summed(a @ b + c), [(3, 6, 5), (3, 5, 4), (4,)]),
        (
            "scattered mean",
            lambda a, b: ops.matmul_reduce_scatter(a, b, "avg", 1, name),
            lambda a, b: scattered(a @ b, 1) / world_size,
            [(2, 4, 5), (5, 6)],
        ),
    ]
    for dim in range(3):
        wide = 5 * (world_size if dim == 2 else 1)
        cases += [
            (
                f"scatter {dim}",
                lambda a, b, c, dim=dim: ops.matmul_reduce_scatter(a, b, "sum", dim, name, bias=c),
                lambda a, b, c, dim=dim: scattered(a @ b + c, dim),
                [(2, 4, 5), (5, 6), (6,)],
            ),
            (
                f"gather {dim}",
                lambda a, b, c, dim=dim: ops.all_gather_matmul(a, [b], dim, name, False, biases=[c])[1],
                lambda a, b, c, dim=dim: [gathered(a, dim) @ b + c],
                [(2, 3, 5), (wide, 6), (6,)],
            ),
            (
                f"gather {dim} for two",
                lambda a, b, c, dim=dim: ops.all_gather_matmul(a, [b, c], dim, name, False)[1],
                lambda a, b, c, dim=dim: [gathered(a, dim) @ b, gathered(a, dim) @ c],
                [(2, 1, 5), (wide, 6), (wide, 2)],
            ),
            (
                f"gather {dim}, read elsewhere",
                lambda a, b, dim=dim: (lambda full, outs: [full, *outs])(*ops.all_gather_matmul(a, [b], dim, name)),
                lambda a, b, dim=dim: [gathered(a, dim), gathered(a, dim) @ b],
                [(2, 3, 5), (wide, 6)],
            ),
        ]
    compiled = [torch.compile(reduced, fullgraph=True), *cases[0][2:]]
    wrong = []
    for case, actual, expected, shapes in [*cases, ("compiled", *compiled)]:
        leaves = [random(shape, torch.float32, rank, i).requires_grad_() for i, shape in enumerate(shapes)]
        answers = []
        for fn in (actual, expected):
            results = fn(*leaves)
            results = results if isinstance(results, list) else [results]
            # Each rank has a loss of its own, in which no two elements count alike.
            loss = sum((x * random(tuple(x.shape), torch.float32, rank, 9)).sum() for x in results)
            answers.append([*results, *torch.autograd.grad(loss, leaves)])
        if not all(torch.allclose(x, y, rtol=1e-4, atol=1e-4) for x, y in zip(*answers)):
            wrong.append(case)
    return wrong


class OperatorTest(unittest.TestCase):
    @parameterized.expand(
        [("float32", 2, "aten"), ("float32", 3, "aten"), ("bfloat16", 2, "aten"), ("float16", 4, "aten")]
        + [("float32", 8, "aten"), ("float32", 2, "triton")]
    )
    def test_numerics(self, dtype_name: str, world_size: int, kernels: str) -> None:
        self.check_numerics(dtype_name, world_size, kernels)

    def check_numerics(self, dtype_name: str, world_size: int, kernels: str) -> None:
        dtype, ranks = DTYPES[dtype_name], range(world_size)
        env = {"TRITON_INTERPRET": "1"} if kernels == "triton" else None
        results = run_ranks(_run_all, world_size, dtype_name, kernels, env=env, timeout=280)
        for case, (*_, dim) in enumerate(REDUCE_SCATTER):
            operands = [scatter_operands(case, rank, world_size, dtype) for rank in ranks]
            scale = 1 / world_size if case % 3 == 1 else 1.0
            exact = scale * sum(a.double() @ b.double() + (0 if c is None else c.double()) for a, b, c in operands)
            plain = sum((a @ b + (0 if c is None else c)).float() for a, b, c in operands)
            for rank in ranks:
                mine = results[rank][0][case]
                assert_within_budget(
                    mine, exact.chunk(world_size, dim)[rank], (scale * plain).to(dtype).chunk(world_size, dim)[rank]
                )
        for case, (*_, dim) in enumerate(ALL_GATHER):
            full = torch.cat([gather_operands(case, rank, world_size, dtype)[0] for rank in ranks], dim)
            for rank in ranks:
                gathered, outs = results[rank][1][case]
                if gathered is not None:
                    self.assertTrue(torch.equal(gathered, full))
                for i, (out, b) in enumerate(zip(outs, gather_operands(case, rank, world_size, dtype)[1])):
                    bias = b[0] if i == 0 and case % 3 == 0 else torch.zeros_like(b[0])
                    exact = full.double() @ b.double() + bias.double()
                    assert_within_budget(out, exact, nn.functional.linear(full, b.t(), bias))

    @pytest.mark.slow
    def test_numerics_of_interpreted_kernels_on_three_ranks(self) -> None:
        self.check_numerics("bfloat16", 3, "triton")

    def test_empty_operands(self) -> None:
        self.assertEqual(run_ranks(_empty, 2), [[(0, 4), (2, 4), (0, 3), (0, 4), (4, 4)]] * 2)

    def test_ranks_that_differ_in_what_is_their_own(self) -> None:
        self.assertEqual(run_ranks(_differing, 2), [[True] * 3] * 2)

    @unittest.skipIf(compat.torch_version() < (2, 13), "torch's fake group leaves what it gathers uninitialised")
    def test_opcheck(self) -> None:
        with fake_group(2) as name:
            a, b = torch.randn(2, 4, 6), torch.randn(6, 8)
            for dim in (0, 1, 2):
                torch.library.opcheck(torch.ops.symmpatterns.matmul_reduce_scatter.default, (a, b, "sum", dim, name))
            for dim, bs in ((0, [b]), (1, [b, b]), (2, [torch.randn(12, 8)])):
                for keep in (True, False):
                    torch.library.opcheck(torch.ops.symmpatterns.all_gather_matmul.default, (a, bs, dim, name, keep))
            a, b = a.requires_grad_(), b.requires_grad_()
            torch.library.opcheck(torch.ops.symmpatterns.matmul_reduce_scatter.default, (a, b, "avg", 1, name))
            torch.library.opcheck(torch.ops.symmpatterns.all_gather_matmul.default, (a, [b, b], 1, name, True))

    @unittest.skipIf(
        compat.torch_version() < (2, 13), "torch's functional collectives have no gradients to compare with"
    )
    def test_gradients(self) -> None:
        self.assertEqual(run_ranks(_gradients, 2, timeout=250), [[]] * 2)

    @pytest.mark.slow
    def test_contiguous_results_of_a_dimension_of_one_element(self) -> None:
        for strides in run_ranks(_thin_gather, 2):
            self.assertEqual(strides, [(12, 6, 1), (16, 8, 1)])

    def test_what_has_no_gradient_says_so(self) -> None:
        ops, one = torch.ops.symmpatterns, torch.ones((), requires_grad=True)
        f8 = torch.ones(16, 16).to(torch.float8_e4m3fn)
        with fake_group(2) as name:
            calls = [
                lambda: ops.matmul_all_reduce(f8, f8, "sum", name, scale_a=one, scale_b=one),
                lambda: ops.matmul_reduce_scatter(f8, f8, "sum", 0, name, scale_a=one, scale_b=one),
                lambda: ops.all_gather_matmul(f8, [f8], 0, name, False, scale_a=one, scale_bs=[one])[1][0],
                lambda: ops.all_reduce_rms_norm(one.expand(4, 4), None, None, 1e-5, "sum", name)[0],
            ]
            for call in calls:
                with self.assertRaisesRegex(RuntimeError, "has no gradient"):
                    call().sum().backward()

    @parameterized.expand(
        [
            (
                "does not divide",
                lambda r, n: rs()(r(3, 4), r(4, 2), "sum", 0, n),
                AssertionError,
                "multiple of the group's size 2",
            ),
            ("columns", lambda r, n: rs()(r(2, 4), r(4, 3), "sum", 1, n), AssertionError, "has size 3"),
            ("dim", lambda r, n: rs()(r(2, 4), r(4, 3), "sum", 2, n), IndexError, "scatter_dim is 2"),
            ("op", lambda r, n: rs()(r(2, 4), r(4, 3), "max", 0, n), ValueError, "not 'max'"),
            ("1-D", lambda r, n: rs()(r(4), r(4, 3), "sum", 0, n), ValueError, "at least 2 dimensions"),
            ("gather 1-D", lambda r, n: ag()(r(4), [r(4, 3)], 0, n), ValueError, "at least 2 dimensions"),
            ("nothing to multiply", lambda r, n: ag()(r(4, 4), [], 0, n), ValueError, "bs is empty"),
            ("inner", lambda r, n: ag()(r(4, 4), [r(4, 3), r(5, 3)], 0, n), ValueError, "do not multiply"),
            (
                "gathered inner",
                lambda r, n: ag()(r(4, 4), [r(4, 3)], 1, n),
                ValueError,
                "K is 4 on each of 2 ranks and 4",
            ),
            (
                "biases",
                lambda r, n: ag()(r(4, 4), [r(4, 3)], 0, n, biases=[None, None]),
                ValueError,
                "2 biases for 1 matrices",
            ),
            ("mixed", lambda r, n: ag()(r(4, 4), [r(4, 3).half()], 0, n), TypeError, "one dtype"),
            ("gather dim", lambda r, n: ag()(r(4, 4), [r(4, 3)], -3, n), IndexError, "gather_dim is -3"),
        ]
    )
    def test_bad_operands(self, _: str, call, error: type, text: str) -> None:
        with fake_group(2) as name, self.assertRaisesRegex(error, text):
            call(torch.randn, name)


def rs():
    return torch.ops.symmpatterns.matmul_reduce_scatter


def ag():
    return torch.ops.symmpatterns.all_gather_matmul


class Block(nn.Module):
    """An MLP with its norm, as sequence parallelism cuts it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.gate = nn.Linear(16, 32, bias=False)
        self.up = nn.Linear(16, 32, bias=True)
        self.down = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def _sequence_parallel(rank: int, world_size: int, batch: int) -> dict[str, object]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world_size,))
    model = Block()
    plan = {
        "norm": SequenceParallel(),
        "gate": ColwiseParallel(input_layouts=Shard(1)),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    model = parallelize_module(model, mesh, plan)
    shard = torch.randn(batch, 4, 16, generator=torch.Generator().manual_seed(rank)).requires_grad_()

    def step(fn) -> list[Tensor]:
        shard.grad = None
        model.zero_grad()
        y = fn(shard)
        y.square().sum().backward()
        grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        return [y.detach(), shard.grad, *[g.clone() for g in grads]]

    del PrepareModuleInput, Replicate
    expected = step(model)
    with torch._inductor.config.patch(fx_graph_cache=False), symmpatterns.config.patch(peer_views=False):
        actual = step(torch.compile(model, fullgraph=True))
    report = symmpatterns.report()
    return {
        "errors": [float((a - e).abs().max() / e.abs().max()) for a, e in zip(actual, expected)],
        "rewrites": [r.family for r in report.rewrites],
        "declined": [(r.collective, r.code, r.reason) for r in report.declined],
    }


class CompiledTest(unittest.TestCase):
    @pytest.mark.slow  # test_llama.py trains one
    def test_sequence_parallel_block_forward_and_backward(self) -> None:
        self.check_block(2, 3)

    @parameterized.expand([(2, 1), (4, 2)])
    @pytest.mark.slow
    def test_more_sequence_parallel_blocks(self, world_size: int, batch: int) -> None:
        self.check_block(world_size, batch)

    def check_block(self, world_size: int, batch: int) -> None:
        for result in run_ranks(_sequence_parallel, world_size, batch, timeout=250):
            self.assertLess(max(result["errors"]), 1e-5)
            # Forward: gather -> gate and up, down -> scatter. Backward: gather -> down's gradient, scatter behind the
            # sum of gate's and up's.
            self.assertIn("all_gather_matmul", result["rewrites"])
            self.assertIn("matmul_reduce_scatter", result["rewrites"])
            self.assertGreaterEqual(len(result["rewrites"]), 3, result["declined"])


def _dynamic_both(rank: int, world_size: int) -> list[tuple[int, int]]:
    found = []
    for enabled in (True, False):
        symmpatterns.report().clear()
        found.append(_dynamic(rank, world_size, enabled))
    return found


def _dynamic(rank: int, world_size: int, enabled: bool) -> tuple[int, int]:
    """(graphs compiled, collectives rewritten) for two functions called with eight sizes each."""

    def scatter(x: Tensor, w: Tensor) -> Tensor:
        return funcol.reduce_scatter_tensor(x @ w, "sum", 1, dist.group.WORLD)

    def gather(x: Tensor, w: Tensor) -> Tensor:
        return funcol.all_gather_tensor(x, 1, dist.group.WORLD) @ w

    counters = torch._dynamo.utils.counters
    counters.clear()
    for fn in (scatter, gather):
        torch._dynamo.reset()
        with symmpatterns.config.patch(enabled=enabled):
            compiled = torch.compile(fn, fullgraph=True, dynamic=True)
            for step in range(8):
                seed = torch.Generator().manual_seed(10 * step + rank)
                x = torch.randn(2, world_size * (1 + (step + 2) % 5), 16, generator=seed)
                w = torch.randn(16, 8, generator=seed)
                torch.testing.assert_close(compiled(x, w), fn(x, w))
    return counters["stats"]["unique_graphs"], len(symmpatterns.report().rewrites)


@pytest.mark.slow
def test_dynamic_shapes_compile_no_more_than_without() -> None:
    for (graphs, rewrites), (plain, none) in run_ranks(_dynamic_both, 2):
        assert graphs == plain
        assert (rewrites, none) == (graphs, 0)
