"""A kernel that gives up on a GPU traps: what it leaves is told, although the CUDA context is lost."""

from __future__ import annotations

import contextlib
import io
import sys
import time
import unittest

import pytest
import torch
import torch.distributed as dist

import symmpatterns
from symmpatterns import config
from symmpatterns.testing import run_ranks
from symmpatterns.workspace import get_workspace


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
