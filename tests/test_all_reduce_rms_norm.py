"""all-reduce -> residual add -> RMSNorm as one operator: the host's kernel, and Triton's without any barrier."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import sys
import time
import unittest
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parameterized import parameterized

import symmpatterns
from symmpatterns import config
from symmpatterns.operators import all_reduce_rms_norm as family
from symmpatterns.testing import assert_same_on_all_ranks, fake_group, gpu_world_sizes, run_ranks

operator = torch.ops.symmpatterns.all_reduce_rms_norm
INTERPRETED = {"TRITON_INTERPRET": "1"}
EPS = 1e-5


def own_device(device_type: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")


def world() -> str:
    return dist.group.WORLD.group_name


def exact(inputs: list[torch.Tensor], residual: Any, weight: Any, reduce_op: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm, total) in fp64 of all ranks' inputs."""
    total = sum(x.double() for x in inputs)
    assert isinstance(total, torch.Tensor)
    total = total / len(inputs) if reduce_op == "avg" else total
    total = total if residual is None else total + residual.double()
    norm = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
    return norm if weight is None else norm * weight.double(), total


def worst_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """In units of the last place of `expected` (of its largest magnitude in the row), rounded to the dtype."""
    scale = expected.abs().amax(-1, keepdim=True).clamp(min=1e-30) * torch.finfo(actual.dtype).eps
    return float(((actual.cpu().double() - expected) / scale).abs().max()) if actual.numel() else 0.0


def operands(seed: int, world_size: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """What each rank contributes; then residual and weight."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(dtype) for _ in range(world_size + 1)]
    for x in made:  # messages that look like no message, and such that do not
        x.view(-1)[:: max(1, x.numel() // 5)] = -0.0
    return [*made, torch.randn(shape[-1:], generator=generator).to(dtype)]


def rank_values(rank: int, world_size: int, kernels: str, device_type: str, shapes: list[tuple[int, ...]]) -> Any:
    device = own_device(device_type)
    if device_type == "cpu":
        family._BLOCK_BYTES = dict.fromkeys(family._BLOCK_BYTES, 512 * (world_size - 1))  # several calls
    results = []
    variants = [("sum", True, True), ("avg", False, True), ("sum", True, False), ("sum", False, False)]
    with config.patch(host_kernels=kernels, timeout_s=60):
        for seed, shape in enumerate(shapes):
            dtype = [torch.bfloat16, torch.float32, torch.float16][seed % 3]
            *inputs, residual, weight = operands(seed, world_size, shape, dtype)
            reduce_op, has_residual, has_weight = variants[seed % 4]
            given = residual if has_residual else None, weight if has_weight else None
            on_device = [None if each is None else each.to(device) for each in given]
            norm, total = operator(inputs[rank].to(device), *on_device, EPS, reduce_op, world())
            wanted = exact(inputs, *given, reduce_op)
            assert norm.shape == total.shape == torch.Size(shape) and norm.dtype == total.dtype == dtype
            assert worst_error(total, wanted[1]) <= 1, (shape, dtype, worst_error(total, wanted[1]))
            assert worst_error(norm, wanted[0]) <= 2, (shape, dtype, worst_error(norm, wanted[0]))
            results += [norm.cpu(), total.cpu()]
    return results


def one_half(slow_reader: bool) -> None:
    """Takes the second half of the memory out of the interpreted kernel; and a rank that reads long after it sent."""
    from symmpatterns.triton_kernels import all_reduce_rms_norm as kernels

    begin_call, receive = kernels.begin_call, kernels.receive

    def broken(*args: Any, **options: Any) -> Any:
        ticket, half = begin_call(*args, **options)
        return ticket, half * 0

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return receive(*args, **options)

    kernels.begin_call = broken
    if slow_reader:
        kernels.receive = slow


def dawdle(rng: random.Random) -> None:
    """Delays between the steps of the interpreted kernel."""
    from symmpatterns.triton_kernels import all_reduce_rms_norm as kernels

    for name in ("send", "await_head", "receive", "count_call"):
        whole = getattr(kernels, name)

        def delayed(*args: Any, whole: Any = whole, **options: Any) -> Any:
            if rng.random() < 0.2:
                time.sleep(rng.random() * 0.01)
            return whole(*args, **options)

        setattr(kernels, name, delayed)


def rank_stress(rank: int, world_size: int, kernels: str, device_type: str, fault: str, calls: int) -> int:
    """Random calls with delays, each with a payload of its own, among calls of other operators; how many are wrong."""
    device = own_device(device_type)
    program, delays = random.Random(5), random.Random(50 + rank)
    if kernels == "triton" and device_type == "cpu":
        dawdle(delays)
        if fault == "one half":
            one_half(slow_reader=rank == 1)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    with config.patch(host_kernels=kernels, timeout_s=3 if fault else 60):
        for call in range(calls):
            rows, columns = program.choice([1, 2, 3]), program.choice([8, 33, 64])
            dtype = program.choice([torch.bfloat16, torch.float32, torch.float16])
            if device_type == "cuda":
                rows, columns = rows * program.choice([1, 8, 50]), columns * program.choice([1, 16, 128])
                if delays.random() < 0.2:
                    torch.cuda._sleep(int(delays.random() * 8e6))
            x = torch.full((rows, columns), float(call % 50 + rank + 1), dtype=dtype, device=device)
            norm, total = operator(x, None, None, 0.0, "sum", world())
            expected = float(sum(call % 50 + r + 1 for r in range(world_size)))
            wrong += ~((total == expected).all() & ((norm - 1).abs() < 1e-2).all())
            if not fault and program.random() < 0.2:  # an epoch of the same workspace with another protocol
                a = torch.full((4, 8), float(rank + call), dtype=torch.float32, device=device)
                out = torch.ops.symmpatterns.matmul_all_reduce(a, torch.ones(8, 4, device=device), "sum", world())
                wrong += ~(out == 8.0 * sum(r + call for r in range(world_size))).all()
    return int(wrong)


def rank_absent_peer(rank: int, world_size: int, kernels: str) -> tuple[str, float]:
    x = torch.ones(2, 16)
    with config.patch(host_kernels=kernels, timeout_s=60):
        operator(x, None, None, EPS, "sum", world())
    began = time.monotonic()
    if rank == world_size - 1:
        time.sleep(4)
        return "", 0.0
    try:
        with config.patch(host_kernels=kernels, timeout_s=1.5):
            operator(x, None, None, EPS, "sum", world())
    except symmpatterns.SymmetricMemoryTimeout as error:
        return str(error), time.monotonic() - began
    return "no error", 0.0


def rank_diverges(rank: int, world_size: int, kernels: str) -> str:
    """Known calls in different orders: both ranks are told, long before the timeout."""
    shapes = [torch.ones(2, 16), torch.ones(3, 8)]
    with config.patch(host_kernels=kernels, timeout_s=60):
        for x in shapes:
            operator(x, None, None, EPS, "sum", world())
        try:
            operator(shapes[rank], None, None, EPS, "sum", world())
        except symmpatterns.DivergenceError as error:
            return str(error)
    return "no error"


def rank_rules(rank: int, world_size: int) -> dict[str, str]:
    """How calls end with each rule of the sentinel protocol, and without it: "right", "wrong", or the error's class.

    Rank 1 is late in every call, and heads arrive long before elements, since no order among them is promised. Where the
    ranks cross, each makes another of two known calls of one shape.
    """
    import triton.language as tl

    from symmpatterns.triton_kernels import _sentinel
    from symmpatterns.triton_kernels import all_reduce_rms_norm as kernels

    receive = kernels.receive

    def head_first(*args: Any) -> None:
        memory, half, me, peer, row, rows, place, offs, bits, mask, ticket, ranks = args
        tl.store(_sentinel._head_of(memory, half, peer, me, row, ranks), ticket)
        time.sleep(0.02)
        places = _sentinel._elements_of(memory, half, peer, me, row, rows, place, ranks, bits.dtype)
        tl.store(places + offs, bits, mask=mask)

    def leave_the_message(memory: Any, *args: Any) -> Any:
        half, me, peer, row, rows, place, offs, mask, *_, ranks, bits_type = args
        bits = receive(memory, *args)
        places = _sentinel._elements_of(memory, half, me, peer, row, rows, place, ranks, bits_type)
        tl.store(places + offs, bits, mask=mask)
        return bits

    def send_any_bits(values: Any) -> Any:
        return values.to(tl.int16, bitcast=True)

    def calls(ops: str) -> str:
        x, verdict = torch.ones(1, 16, dtype=torch.bfloat16), "right"
        for number, op in enumerate(ops.split()):
            time.sleep(0.1 * (rank == 1))
            parts = [x * (10 * number + r + 1 + 3 * (op == "avg")) for r in range(world_size)]
            for part in parts:
                part[0, ::3] = -0.0
            _, total = operator(parts[rank], None, None, EPS, op, name)
            expected = sum(parts) / (world_size if op == "avg" else 1)
            verdict = verdict if torch.equal(total, expected.to(x.dtype)) else "wrong"  # and on: the peer waits
        return verdict

    own = "sum" if rank == 0 else "avg"
    found = {}
    for rule, without, ops in (
        ("intact", {}, "sum " * 4),
        ("sentinels are put back", {"receive": leave_the_message}, "sum " * 4),
        ("no message holds a sentinel", {"as_message": send_any_bits}, "sum"),
        ("intact, crossing", {}, own),
        ("heads are compared, crossing", {"await_head": lambda *args: None}, own),
    ):
        name = dist.new_group([0, 1]).group_name
        with config.patch(host_kernels="triton", timeout_s=60):
            calls("sum avg")
            dist.barrier()
            with contextlib.ExitStack() as stack, config.patch(timeout_s=3):
                for primitive, broken in {"send": head_first, **without}.items():
                    stack.enter_context(mock.patch.object(kernels, primitive, broken))
                try:
                    found[rule] = calls(ops)
                except RuntimeError as error:
                    found[rule] = type(error).__name__
        dist.barrier()
    return found


def rank_graphs(rank: int, world_size: int) -> int:
    """CUDA graphs of an odd number of calls, replayed between eager calls, while the ranks dawdle."""
    device, rng = own_device("cuda"), random.Random(rank)
    x = torch.zeros(16, 4096, dtype=torch.bfloat16, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    expected = torch.zeros((), device=device)

    def run(times: int) -> None:
        for _ in range(times):
            _, total = operator(x, None, None, EPS, "sum", world())
            wrong.add_(~(total == expected).all())

    run(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(3)
    for replay in range(60):
        x.fill_(replay + rank)
        expected.fill_(float(sum(replay + r for r in range(world_size))))
        if rng.random() < 0.3:
            torch.cuda._sleep(int(rng.random() * 8e6))
        graph.replay()
        if replay % 3 == 0:
            run(1)
    return int(wrong)


SHAPES = [(3, 64), (2, 3, 48), (1, 7), (4, 33), (0, 8), (5, 100), (2, 256), (1, 1)]


class CompiledKernelTest(unittest.TestCase):
    def test_it_compiles_and_stores_before_it_waits(self) -> None:
        """For sm_90, without a GPU, in a process of its own: this one may have loaded Triton's interpreter."""
        run = subprocess.run([sys.executable, "-c", _COMPILE], capture_output=True, text=True, timeout=120)
        self.assertEqual(run.returncode, 0, run.stderr)
        for text in run.stdout.split("=====")[1:]:
            lines = text.splitlines()
            first = {
                what: next(i for i, line in enumerate(lines) if re.search(pattern, line))
                for what, pattern in (
                    ("count", r"\batom\S*\.gpu\S*\.add"),
                    ("wait", r"\b(ld|atom)\S*\.sys|ld\.volatile"),
                )
            }
            sent = [line for line in lines[: first["count"]] if "st.global" in line]
            self.assertTrue(any("st.global.b64" in line for line in sent), sent)  # the head, to the only peer
            self.assertTrue(any("st.global.b64" not in line for line in sent), sent)
            self.assertGreater(first["wait"], first["count"])
            self.assertIn("trap;", text)
            self.assertNotIn("release", re.sub("acq_rel", "", text))  # nothing that waits for all stores to be done


_COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from symmpatterns.triton_kernels.all_reduce_rms_norm import all_reduce_rms_norm_kernel as kernel

for dtype, has in (("bf16", True), ("fp32", False)):
    constants = dict(WORLD_SIZE=2, BLOCK=64, HAS_RESIDUAL=has, HAS_WEIGHT=has, AVERAGE=not has)
    types = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "norm_ptr", "total_ptr"), "*" + dtype)
    types |= {"sentinel_ptrs": "*i64", "flag_ptrs": "*i64", "state_ptr": "*i32", "timeout_ns": "i64", "eps": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types.get(name, "i32") for name in names}, values)
    options = {"num_warps": 2, "num_stages": 1}
    print("=====", triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


class ValuesTest(unittest.TestCase):
    @parameterized.expand([("aten", 3, None), ("triton", 3, INTERPRETED)])
    def test_values(self, kernels: str, world_size: int, env: Any) -> None:
        results = run_ranks(rank_values, world_size, kernels, "cpu", SHAPES, timeout=250, env=env)
        for tensors in zip(*results, strict=True):
            assert_same_on_all_ranks(tensors)

    def test_reference_and_bad_operands(self) -> None:
        x, weight = torch.randn(4, 16), torch.randn(16)
        with fake_group(2) as name:
            torch.library.opcheck(operator.default, (x, x, weight, EPS, "sum", name))
            norm, total = operator(x, x, weight, EPS, "sum", name)
            torch.testing.assert_close(
                (norm, total), family.all_reduce_rms_norm_reference(x, x, weight, EPS, "sum", name)
            )
            for arguments, text in (
                ((x, x[:2], None, EPS, "sum"), "residual must have the shape"),
                ((x, None, weight[:3], EPS, "sum"), "weight must have shape"),
                ((x, None, weight.double(), EPS, "sum"), "weight must be torch.float32"),
                ((x.int(), None, None, EPS, "sum"), "not torch.int32"),
                ((x, None, None, EPS, "max"), "not 'max'"),
                ((torch.zeros(1, 20000), None, None, EPS, "sum"), "at most 16384"),
            ):
                with self.assertRaisesRegex((ValueError, TypeError), text):
                    operator(*arguments, name)


class ProtocolTest(unittest.TestCase):
    @parameterized.expand([("aten", 3, None, 300), ("triton", 2, INTERPRETED, 40)])
    def test_stress(self, kernels: str, world_size: int, env: Any, calls: int) -> None:
        wrong = run_ranks(rank_stress, world_size, kernels, "cpu", "", calls, timeout=250, env=env)
        self.assertEqual(wrong, [0] * world_size)

    def test_one_half_is_not_enough(self) -> None:
        """The negative control: with one half a rank overwrites what its peer has not read, or waits in vain."""
        try:
            wrong = run_ranks(rank_stress, 2, "triton", "cpu", "one half", 40, timeout=60, env=INTERPRETED)
        except AssertionError as error:
            self.assertRegex(str(error), "SymmetricMemoryTimeout|DivergenceError")
        else:
            self.assertGreater(sum(wrong), 0)

    def test_each_rule_is_needed(self) -> None:
        first, second = run_ranks(rank_rules, 2, timeout=120, env=INTERPRETED)
        both = {rule: {first[rule], second[rule]} for rule in first}
        self.assertEqual(both["intact"], {"right"})
        self.assertIn("wrong", both["sentinels are put back"])
        self.assertEqual(both["no message holds a sentinel"], {"SymmetricMemoryTimeout"})
        self.assertEqual(both["intact, crossing"], {"DivergenceError"})
        self.assertIn("wrong", both["heads are compared, crossing"])

    @parameterized.expand([("aten", None), ("triton", INTERPRETED)])
    def test_absent_peer_is_named_in_time(self, kernels: str, env: Any) -> None:
        (text, seconds), _ = run_ranks(rank_absent_peer, 2, kernels, timeout=60, env=env)
        self.assertIn("rank 1", text)
        self.assertIn("all_reduce_rms_norm", text)
        self.assertTrue(1 < seconds < 4, seconds)

    @parameterized.expand([("aten", None), ("triton", INTERPRETED)])
    def test_ranks_at_different_calls_are_told(self, kernels: str, env: Any) -> None:
        for rank, text in enumerate(run_ranks(rank_diverges, 2, kernels, timeout=60, env=env)):
            self.assertIn(f"rank {rank} is at all_reduce_rms_norm (rows {2 + rank}", text)


@pytest.mark.gpu
class GpuTest(unittest.TestCase):
    def _world_sizes(self) -> list[int]:
        return gpu_world_sizes() or self.skipTest("needs a CUDA GPU")

    def test_values(self) -> None:
        shapes = [*SHAPES, (64, 8192), (8, 4096), (128, 5120), (600, 8192), (3, 16384), (1, 8192), (5000, 8)]
        for world_size in self._world_sizes():
            with self.subTest(world_size):
                results = run_ranks(rank_values, world_size, "aten", "cuda", shapes, timeout=280, backend="nccl")
                for tensors in zip(*results, strict=True):
                    assert_same_on_all_ranks(tensors)

    def test_stress(self) -> None:
        for world_size in self._world_sizes():
            with self.subTest(world_size):
                run = (rank_stress, world_size, "aten", "cuda", "", 400)
                self.assertEqual(run_ranks(*run, timeout=280, backend="nccl"), [0] * world_size)

    def test_cuda_graphs(self) -> None:
        for world_size in self._world_sizes():
            with self.subTest(world_size):
                self.assertEqual(run_ranks(rank_graphs, world_size, timeout=280, backend="nccl"), [0] * world_size)
