"""Kernels that are launched while the one before still runs: which, and that none of them reads too early."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import types
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch import Tensor

from symmpatterns import compat, config, cost_model, early_launch
from symmpatterns.testing import gpu_world_sizes, run_ranks
from symmpatterns.triton_kernels import _launch
from tests.test_code_for_gpus import kernels, triton_code

_WAIT, _LAUNCH = "tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_launch_dependents()"
_ACCESS = re.compile(r"tl\.(load|store|atomic_\w+)\(")


def all_reduce(x: Tensor, bias: Tensor) -> Tensor:
    return funcol.all_reduce(x * 2 + 1, "sum", dist.group.WORLD) + bias


def all_gather(x: Tensor, bias: Tensor) -> Tensor:
    return funcol.all_gather_tensor(x * 2 + bias, 0, dist.group.WORLD) + 1


def exchange_sums(x: Tensor, bias: Tensor) -> Tensor:
    """Two loops before the site, a reduction and what uses it, and another site behind it."""
    y = funcol.all_to_all_single(x - x.sum(1, keepdim=True), None, None, dist.group.WORLD)
    return funcol.all_reduce(y + bias, "sum", dist.group.WORLD) * 2


def reduce_scatter(x: Tensor, bias: Tensor) -> Tensor:
    return funcol.reduce_scatter_tensor(x * 2 + bias, "sum", 0, dist.group.WORLD) + 1


def reduce_both(x: Tensor, bias: Tensor) -> Tensor:
    first, second = funcol.all_reduce_coalesced([x * 2, bias + 1], "sum", dist.group.WORLD)
    return first + second


def looped(x: Tensor, bias: Tensor) -> Tensor:
    """A reduction too long for one step: loads in two loops."""
    return funcol.all_reduce(x.softmax(1), "sum", dist.group.WORLD) + bias


def alone(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing to communicate, and a kernel that needs nothing of the one before it."""
    return (x.softmax(1) @ x.t()).cumsum(1), torch.ones_like(x) * 3


def constants(x: Tensor, bias: Tensor) -> Tensor:
    """A kernel that loads nothing stores into the slot."""
    return funcol.all_reduce(torch.full_like(x, 3.0), "sum", dist.group.WORLD) + x


PROGRAMS: list[Callable[..., Tensor]] = [all_reduce, all_gather, exchange_sums, constants]


def _early(code: str) -> list[bool]:
    return [value == "True" for value in re.findall(r"'launch_pdl': (\w+)", code)]


class GeneratedCodeTest(unittest.TestCase):
    def setUp(self) -> None:
        self.enterContext(config.patch(template=False, keep_overlap=False))
        self.enterContext(mock.patch.dict(cost_model.TAKES_TURNS, cpu=True))
        self.x, self.bias = torch.randn(8, 64), torch.randn(64)

    def _code(self, fn: Callable[..., Any], *args: Tensor, early: bool = True) -> str:
        with mock.patch.object(cost_model, "launches_early", lambda num_bytes, device: early):
            return triton_code(fn, *(args or (self.x, self.bias)), world_size=2)

    @parameterized.expand([(fn,) for fn in PROGRAMS])
    def test_every_kernel_waits_before_it_touches_memory(self, fn: Callable[..., Any]) -> None:
        self._assert_kernels_wait_first(self._code(fn))

    def test_a_loop_waits_before_it(self) -> None:
        code = self._code(looped, torch.randn(8, 1 << 14), torch.randn(1 << 14))
        self.assertIn("for r0_offset in", code)
        self._assert_kernels_wait_first(code)

    def _assert_kernels_wait_first(self, code: str) -> None:
        found = kernels(code)
        self.assertGreaterEqual(len(found), 2)
        self.assertEqual(_early(code), [True] * len(found))
        for kernel in found:
            waits, accesses = kernel.index(_WAIT), [match.start() for match in _ACCESS.finditer(kernel)]
            self.assertEqual(kernel.count(_WAIT), 1)
            self.assertLess(waits, min(accesses))
            self.assertLessEqual(kernel.count(_LAUNCH), 1)
            if _LAUNCH in kernel:  # behind its own wait: what was before is over when the next one begins
                self.assertLess(waits, kernel.index(_LAUNCH))

    @parameterized.expand([(fn,) for fn in PROGRAMS])
    def test_other_graphs_are_left_alone(self, fn: Callable[..., Any]) -> None:
        self._code(fn)  # patches Inductor
        code = self._code(fn, early=False)
        self.assertEqual(set(_early(code)), {False})
        self.assertNotIn("gdc_", code)

    def test_kernels_of_unknown_size_are_left_alone(self) -> None:
        torch._dynamo.mark_dynamic(self.x, 0)
        code = self._code(all_reduce)
        self.assertRegex(code, r"\bs\d+ = ")
        self.assertEqual(set(_early(code)), {False})

    @parameterized.expand([(fn,) for fn in (all_reduce, all_gather, reduce_scatter, exchange_sums, reduce_both)])
    def test_what_a_rank_contributes_decides(self, fn: Callable[..., Any]) -> None:
        asked = []
        with mock.patch.object(cost_model, "launches_early", lambda *args: asked.append(args) or False):
            triton_code(fn, self.x, self.bias, world_size=4)
        num_bytes = self.x.nbytes + (self.bias.nbytes if fn is reduce_both else 0)
        self.assertEqual(asked, [(num_bytes, self.x.device)] * (2 if fn is exchange_sums else 1))

    def test_large_kernels_are_left_alone(self) -> None:
        """In a graph whose collective is small: a long row of programs would be spread badly over the multiprocessors."""

        def statistics(x: Tensor, bias: Tensor) -> Tensor:
            largest = funcol.all_reduce(x.amax(1), "max", dist.group.WORLD)
            return (x - largest.unsqueeze(1)).exp() + bias

        code = self._code(statistics, torch.randn(64, 16384), torch.randn(16384))
        self.assertEqual(_early(code), [True, False])
        reduction, pointwise = kernels(code)
        self.assertIn(_WAIT, reduction)
        self.assertNotIn(_LAUNCH, pointwise)

    @parameterized.expand([(fn,) for fn in (*PROGRAMS, alone)])
    def test_where_inductor_launches_every_kernel_early(self, fn: Callable[..., Any]) -> None:
        """With its `triton.enable_pdl` a kernel may wait behind its first loads, or never: also of graphs without anything
        of ours, whose kernels may stand before ours on a stream."""
        from torch._inductor.codegen.triton import TritonKernel

        compat.order_kernels()
        with mock.patch.object(TritonKernel, "_enable_pdl_codegen", staticmethod(lambda: True)):
            code = self._code(fn, early=False)
        self._assert_kernels_wait_first(code)


class CostModelTest(unittest.TestCase):
    CUDA = torch.device("cuda")

    @parameterized.expand(
        [
            (1 << 10, True, (9, 0), True),
            (early_launch.MOST_BYTES, True, (10, 0), True),
            (early_launch.MOST_BYTES + 1, True, (9, 0), False),
            (1 << 10, False, (9, 0), False),
            (1 << 10, True, (8, 0), False),
        ]
    )
    def test_small_graphs_of_gpus_that_can(
        self, num_bytes: int, graphs: bool, capability: tuple[int, int], expected: bool
    ) -> None:
        early_launch._is_possible.cache_clear()
        self.addCleanup(early_launch._is_possible.cache_clear)
        with (
            config.patch(cuda_graphs=graphs),
            mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        ):
            self.assertEqual(cost_model.launches_early(num_bytes, self.CUDA), expected)

    def test_it_can_be_switched_off(self) -> None:
        with (
            config.patch(cuda_graphs=True, early_launch=False),
            mock.patch.object(early_launch, "_is_possible", lambda device: True),
        ):
            self.assertFalse(cost_model.launches_early(8, self.CUDA))

    def test_launches_of_ours_of_calls_that_send_little(self) -> None:
        state, most = types.SimpleNamespace(device=self.CUDA), early_launch.MOST_BYTES
        with mock.patch.object(early_launch, "_is_possible", lambda device: True):
            self.assertEqual(_launch.early(state, most), {"launch_pdl": True})
            self.assertEqual(_launch.early(state, most + 1), {})
            with config.patch(early_launch=False):
                self.assertEqual(_launch.early(state, most), {})

    def test_never_on_cpu(self) -> None:
        with config.patch(cuda_graphs=True):
            self.assertFalse(cost_model.launches_early(8, torch.device("cpu")))


INTERPRETED = """
import torch, triton
import triton.language as tl
from tests.pretended_gpu import pretended_gpu
from symmpatterns.triton_kernels._sync import begin_call

@triton.jit
def kernel(state_ptr, out_ptr):
    ticket, half = begin_call(state_ptr, 5)
    tl.store(out_ptr, ticket)

out = torch.zeros(1, dtype=torch.int64)
with pretended_gpu():
    kernel[(1,)](torch.zeros(16, dtype=torch.int32), out)
assert int(out) == (5 << 32) + 1
"""


class InterpreterTest(unittest.TestCase):
    def test_interpreted_kernels_do_not_wait_where_there_is_a_gpu(self) -> None:
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-c", INTERPRETED]
        done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)


def _without_waits() -> None:
    """Takes the waits out of what Inductor generates, in this process; kernels are launched early nevertheless."""
    from torch._inductor.codegen.triton import TritonKernel

    compat.order_kernels()
    arrange = TritonKernel._filter_pdl

    def arranged(self: Any, code: Any) -> None:
        arrange(self, code)
        code._lines = [line for line in code._lines if line != self.GDC_WAIT]

    TritonKernel._filter_pdl = arranged  # type: ignore[method-assign]


def _replays(rank: int, world_size: int, program: int, waits: bool, replays: int) -> int:
    """How many results are wrong of a graph of calls that follow each other without a pause.

    All values are whole numbers, so that sums are exact.
    """
    from torch._inductor.utils import run_and_get_code

    torch._inductor.config.force_disable_caches = True  # what is taken out of the code is in no key
    fn = PROGRAMS[program]
    if not waits:
        _without_waits()
    device = torch.device("cuda", torch.cuda.current_device())
    rng = random.Random(100 + rank)
    bias = torch.arange(256.0, device=device) % 7
    inputs = [torch.full((32 * world_size, 256), float(10 * call + rank), device=device) for call in range(8)]
    with config.patch(enabled=False):
        expected = torch.compile(fn, dynamic=False)
        right = [[expected(x + step, bias).clone() for x in inputs] for step in range(3)]
    torch._dynamo.reset()
    with config.patch(force=True, template=False, cuda_graphs=True):
        compiled = torch.compile(fn, dynamic=False)
        _, (code,) = run_and_get_code(compiled, inputs[0], bias)
        assert True in _early(code) and (_WAIT in code) == waits, code
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [compiled(x, bias) for x in inputs]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for replay in range(replays):
        step = replay % 3
        for call, x in enumerate(inputs):
            x.fill_(float(10 * call + rank + step))
        if rng.random() < 0.5:
            torch.cuda._sleep(int(rng.random() * 2e5))
        graph.replay()
        for result, exact in zip(results, right[step], strict=True):
            wrong += (result != exact).any()
    return int(wrong)


@pytest.mark.gpu
class GpuStressTest(unittest.TestCase):
    def _world_size(self) -> int:
        if not gpu_world_sizes() or torch.cuda.get_device_capability() < (9, 0):
            self.skipTest("needs a CUDA GPU of compute capability 9.0")
        return max(gpu_world_sizes())

    @parameterized.expand([(index,) for index in range(len(PROGRAMS))])
    def test_nothing_is_read_too_early(self, program: int) -> None:
        world_size = self._world_size()
        wrong = run_ranks(_replays, world_size, program, True, 300, timeout=120, backend="nccl")
        self.assertEqual(wrong, [0] * world_size)

    @parameterized.expand([(0,), (1,)])
    def test_negative_control(self, program: int) -> None:
        """Kernels that do not wait for the barrier before them read what is not there yet."""
        wrong = run_ranks(_replays, self._world_size(), program, False, 300, timeout=120, backend="nccl")
        self.assertGreater(sum(wrong), 0)


if __name__ == "__main__":
    unittest.main()
