"""Declared collectives on GPUs: the programs of test_allocation*.py with CUDA tensors, CUDA graphs, and the memory of it."""

from __future__ import annotations

import functools
import gc
import unittest

import pytest
import torch
from parameterized import parameterized

import symmpatterns
from symmpatterns import fusion_aware_alloc
from symmpatterns.testing import compiled_code, run_ranks
from tests import test_allocation as programs
from tests import test_allocation_lifetime as lifetime
from tests.allocating import IN_PLACE, INPUT, calls, details, eager, group
from tests.allocation_operators import ops, produce, relaxed, sum_ranks
from tests.test_allocation_producers import run_producers

PROGRAMS = {
    program.__name__[4:]: program
    for program in (
        run_producers,
        programs.run_spellings,
        programs.run_rfc,
        programs.run_training,
        programs.run_others,
        lifetime.run_nested,
        lifetime.run_divergence,
        programs.run_eager,
    )
}


def on_gpu(rank: int, world_size: int, name: str) -> None:
    torch.set_default_device("cuda")
    torch.backends.cudnn.allow_tf32 = False
    PROGRAMS[name](rank, world_size)


def run_kernels(rank: int, world_size: int) -> None:
    """The generated code of declared collectives holds the kernels of undeclared ones, and no others."""
    x, w = torch.randn(64, 64, device="cuda"), torch.randn(64, 64, device="cuda")

    def function(x: torch.Tensor, w: torch.Tensor, collective: object) -> tuple[torch.Tensor, ...]:
        g = group()
        return tuple(collective(y, g) for y in (x.sin(), (x @ w).relu(), x.sum(0), w @ w))  # type: ignore[operator]

    with relaxed():
        _, plain = compiled_code(functools.partial(function, collective=ops.by_undeclared), x, w)
    found, code = compiled_code(functools.partial(function, collective=sum_ranks), x, w)
    torch.testing.assert_close(found, eager(functools.partial(function, collective=sum_ranks), x, w))
    for name in ("triton_", "extern_kernels"):
        assert calls(code, name) == calls(plain, name) > 0, (name, code)
    assert calls(code, "symmpatterns_take(") == 4


def run_graphs(rank: int, world_size: int) -> None:
    """A function with declared collectives in a CUDA graph: new operands, an odd number of calls, memory returned."""
    g = group()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return sum_ranks(x.sin(), g), sum_ranks(produce(x)[0], g), sum_ranks(x, g)

    x = torch.randn(8, 16, device="cuda") + rank
    compiled = torch.compile(function, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), eager(function, x))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = [result for _ in range(3) for result in compiled(x)]
    for _ in range(4):
        x.copy_(torch.randn(8, 16))
        graph.replay()
        expected = eager(function, x)
        torch.testing.assert_close(found, list(expected) * 3)
    del graph, found, compiled
    torch._dynamo.reset()
    gc.collect()
    assert (fusion_aware_alloc.live_buffers(), fusion_aware_alloc.live_bytes()) == (0, 0)


def run_torchs_operators(rank: int, world_size: int) -> None:
    """torch's own operators on symmetric memory get it, without a declaration."""
    g = group()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        symm_mem = torch.ops.symm_mem
        return symm_mem.one_shot_all_reduce(x.sin(), "sum", g), symm_mem.one_shot_all_reduce(x, "sum", g) + 1

    x = torch.randn(8, 16, device="cuda") + rank
    compiled = torch.compile(function, fullgraph=True)
    for _ in range(2):
        expected = [y.clone() for y in (x.sin(), x)]
        for y in expected:
            torch.distributed.all_reduce(y)
        torch.testing.assert_close(compiled(x), (expected[0], expected[1] + 1))
    assert details() == [IN_PLACE, INPUT], symmpatterns.report()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class GpuAllocationTest(unittest.TestCase):
    @parameterized.expand([(name,) for name in PROGRAMS])
    def test_program(self, name: str) -> None:
        if name == "others" and torch.cuda.device_count() < 2:
            self.skipTest(
                "needs two CUDA GPUs: gloo, which ranks that share one use, has no all-gather of CUDA tensors"
            )
        run_ranks(on_gpu, 2, name, backend="nccl", timeout=150)

    def test_no_additional_kernel(self) -> None:
        run_ranks(run_kernels, 2, backend="nccl", timeout=150)

    def test_torchs_operators(self) -> None:
        run_ranks(run_torchs_operators, 2, backend="nccl", timeout=150)

    def test_cuda_graph(self) -> None:
        run_ranks(run_graphs, 2, backend="nccl", timeout=150)


if __name__ == "__main__":
    unittest.main()
