"""Ranks that fail or depart on GPUs: a kernel that gives up traps; what it leaves is told, although the context is lost."""

from __future__ import annotations

import contextlib
import io
import sys
import time
import unittest

import pytest
import torch
import torch.distributed as dist
from parameterized import parameterized

import symmpatterns
from symmpatterns import config, workspace
from symmpatterns.testing import Died, run_ranks
from symmpatterns.workspace import get_workspace
from tests import fault_matrix
from tests.fault_matrix import DEADLY, NOT_WARM, OF_KERNELS, SURVIVABLE, TIMEOUT_S, Outcome
from tests.test_faults import DIVERGED, EXPECTED, RIGHT, TIMED_OUT


def _trapped(rank: int, world_size: int) -> tuple[str, str, str]:
    """(what the trapped kernel left, the error of the next call, what an uncaught CUDA error adds on stderr)."""
    device = torch.device("cuda", torch.cuda.current_device())
    a = torch.ones(16, 64, device=device, dtype=torch.bfloat16)
    b = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
    name = dist.group.WORLD.group_name
    with config.patch(timeout_s=30):
        torch.ops.symmpatterns.matmul_all_reduce(a, b, "sum", name)
        torch.cuda.synchronize()
    if rank == 1:
        time.sleep(8)
        return "", "", ""
    with config.patch(timeout_s=2):
        torch.ops.symmpatterns.matmul_all_reduce(a, b, "sum", name)
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            stderr = io.StringIO()
            with contextlib.redirect_stderr(stderr):
                sys.excepthook(type(error), error, error.__traceback__)
        else:
            return "nothing trapped", "", ""
        left = get_workspace(name, device).gpu_failure()
        try:
            torch.ops.symmpatterns.matmul_all_reduce(a, b, "sum", name)
        except symmpatterns.SymmetricMemoryTimeout as error:
            return str(left), str(error), stderr.getvalue()
        return str(left), "", stderr.getvalue()


# Signals interrupt Python, not a GPU: a handler runs when the wait for the device is over.
FAULTS = [fault for fault in (*SURVIVABLE, *DEADLY) if fault != "exception, waiting"]


def _part(rank: int, world_size: int, family: str, fault: str) -> Outcome:
    """One rank's part of a case of the fault matrix, with what a trapped kernel has left in place of CUDA's error."""
    device = torch.device("cuda", torch.cuda.current_device())
    name = dist.group.WORLD.group_name
    _, healthy, faulty = {**SURVIVABLE, **DEADLY}[fault]
    with device:
        outcome = fault_matrix.play(
            family,
            faulty if rank else healthy,
            name,
            rank,
            "cuda",
            fault not in NOT_WARM,
            lambda: dist.all_reduce(torch.zeros(1, device="cpu")),
        )
    known = workspace._workspaces.get((name, device))  # where ranks failed before, there is none, and must be none
    with config.patch(timeout_s=TIMEOUT_S["cuda"]):
        left = None if known is None else known.gpu_failure()
    return outcome if left is None else Outcome(type(left).__name__, str(left), outcome.seconds)


@pytest.mark.gpu
class FaultsTest(unittest.TestCase):
    """The fault matrix: every fault of `FAULTS` in one family, and a peer that dies in every family."""

    def check(self, family: str, fault: str) -> None:
        if torch.cuda.device_count() < 2:
            self.skipTest("needs two CUDA GPUs")
        healthy, faulty = run_ranks(_part, 2, family, fault, backend="nccl", timeout=100, allow_death=True)
        print(f"{family}, {fault}: {healthy}")
        expected = EXPECTED[fault][0]
        if expected == DIVERGED:  # as with the interpreter, a rank may wait for a flag that the other never writes
            self.assertIn(DIVERGED, {healthy.ended, faulty.ended})
            self.assertLessEqual({healthy.ended, faulty.ended}, {DIVERGED, TIMED_OUT})
        else:
            self.assertEqual(healthy.ended, expected, healthy)
        if expected != RIGHT:
            self.assertIn("rank 1", healthy.text)
            self.assertLess(healthy.seconds, TIMEOUT_S["cuda"] + 5)  # other tests may use the GPU at once
        self.assertEqual(isinstance(faulty, Died), fault in DEADLY)

    @parameterized.expand(fault_matrix.cases_of("cuda", dict.fromkeys(FAULTS), False))
    def test_faults(self, family: str, fault: str) -> None:
        self.check(family, fault)

    @parameterized.expand([(family,) for family in OF_KERNELS["cuda"]])
    def test_peer_dies(self, family: str) -> None:
        self.check(family, "SIGKILL")


@pytest.mark.gpu
class TrapTest(unittest.TestCase):
    def test_the_record_outlives_the_context(self) -> None:
        if not torch.cuda.is_available():
            self.skipTest("needs a CUDA GPU")
        (left, raised, printed), _ = run_ranks(_trapped, 2, backend="nccl", timeout=120)
        for text in (left, raised, printed):
            self.assertRegex(text, "rank 0 gave up waiting for rank 1 in matmul_all_reduce .*waited 2 s")
        self.assertIn("SymmetricMemoryTimeout", printed)


if __name__ == "__main__":
    unittest.main()
