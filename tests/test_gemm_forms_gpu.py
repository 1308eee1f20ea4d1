"""The forms of test_gemm_forms.py on GPUs: float8, batches and mixed dtypes in compiled kernels, and compiled programs."""

from __future__ import annotations

import unittest

import pytest
import torch

import symmpatterns
from symmpatterns.testing import gpu_world_sizes, run_ranks
from tests.test_gemm_forms import BF16, FLOAT8, FORMS, FP16, FP32, Operation, results, wrong_results

# Rows and columns are those of a rank where there is no batch. They take one-shot, two-shot and (the last of float8, on
# two ranks) TMA sends; ragged sizes take operands by pointers.
OPERATIONS = [
    Operation(FLOAT8, scales="one", shape=(32, 512, 512)),
    Operation(FLOAT8, scales="rows", bias=True, shape=(512, 2048, 512)),
    Operation(FLOAT8, BF16, FP32, scales="rows", shape=(24, 40, 33)),
    Operation(FLOAT8, scales="one", shape=(1024, 1024, 8192)),
    Operation(BF16, out=FP32, bias=True, shape=(512, 1024, 1000)),
    Operation(FP32, BF16, shape=(48, 128, 96)),
    Operation(BF16, FP32, shape=(256, 1024, 256)),
    Operation(FP16, out=FP32, batch=16, bias=True, shape=(16, 64, 128)),
    Operation(BF16, batch=8, shape=(512, 1024, 256)),
    Operation(FP32, batch=3, shape=(33, 17, 70)),
]


def operations(rank: int, world_size: int) -> list[str]:
    """What went wrong; each operation comes twice, so that used staging memory is met and launches are repeated."""
    device = torch.device("cuda", torch.cuda.current_device())
    has_float8 = torch.cuda.get_device_capability(device) >= (8, 9)
    wrong = []
    with symmpatterns.config.patch(timeout_s=60):
        for operation in OPERATIONS:
            if operation.dtype != FLOAT8 or has_float8:
                for _ in range(2):
                    wrong += wrong_results(operation, rank, world_size, device)
    return wrong


def compiled_forms(rank: int, world_size: int) -> list[str]:
    """What went wrong in the compiled forms, compared with eager ones of CPU tensors."""
    device = torch.device("cuda", torch.cuda.current_device())
    has_float8 = torch.cuda.get_device_capability(device) >= (8, 9)
    wrong = []
    with symmpatterns.config.patch(force=True, timeout_s=60), torch.no_grad():
        for form in FORMS:
            operands = form.operands(rank, world_size)
            if not form.runs or (operands[0].dtype == FLOAT8 and not has_float8):
                continue
            torch._dynamo.reset()
            symmpatterns.report().clear()
            actual = torch.compile(form.fn, fullgraph=True)(*(x.to(device) for x in operands))
            families = [record.family for record in symmpatterns.report().rewrites]
            if families != [form.family]:
                wrong.append(f"{form.name}: {symmpatterns.report()}")
            for got, want in zip(results(actual), results(form.fn(*operands))):
                try:
                    torch.testing.assert_close(got.cpu(), want, rtol=1e-2, atol=0)  # one rounding more in bf16
                except AssertionError as error:
                    wrong.append(f"{form.name}: {error}")
    return wrong


@pytest.mark.gpu
class FormsOnGpusTest(unittest.TestCase):
    maxDiff = None  # what went wrong, all of it

    def setUp(self) -> None:
        if not torch.cuda.is_available():
            self.skipTest("needs a CUDA GPU")

    def test_operations_are_exact(self) -> None:
        for world_size in gpu_world_sizes():
            with self.subTest(world_size):
                self.assertEqual(run_ranks(operations, world_size, timeout=290, backend="nccl"), [[]] * world_size)

    def test_compiled_forms(self) -> None:
        self.assertEqual(run_ranks(compiled_forms, 2, timeout=290, backend="nccl"), [[], []])


if __name__ == "__main__":
    unittest.main()
