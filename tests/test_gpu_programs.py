"""Compiled programs on GPUs: every family, launched from Python and from CUDA graphs, against eager gloo."""

from __future__ import annotations

import unittest
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch import Tensor, nn

import symmpatterns
from symmpatterns.testing import run_ranks

H, ROWS = 1024, 64


def _all_reduce(x: Tensor) -> Tensor:
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


def matmul_all_reduce(x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
    return _all_reduce(x @ w) + residual


def matmul_reduce_scatter(x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
    return funcol.reduce_scatter_tensor(x @ w, "sum", 0, dist.group.WORLD) * 2


def all_gather_matmul(x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
    return nn.functional.silu(funcol.all_gather_tensor(x, 0, dist.group.WORLD) @ w)


def norm_after_all_reduce(x: Tensor, w: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    hidden = _all_reduce(x * 1.5) + residual
    return nn.functional.rms_norm(hidden, (H,), w[0]), hidden


def norm_before_all_gather(x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
    return funcol.all_gather_tensor(nn.functional.rms_norm(x + residual, (H,), w[0]), 0, dist.group.WORLD) * 2


def scatter_norm_gather(x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
    part = funcol.reduce_scatter_tensor(x.sin(), "sum", 0, dist.group.WORLD)
    return funcol.all_gather_tensor(nn.functional.rms_norm(part, (H,), w[0]), 0, dist.group.WORLD) + residual


def two_layers(x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
    for _ in range(2):
        residual = _all_reduce(nn.functional.rms_norm(residual, (H,), w[1]) @ w) + residual
        residual = _all_reduce(residual.tanh() * x) + residual
    return residual


PROGRAMS: dict[str, tuple[Callable, str]] = {
    "matmul_all_reduce": (matmul_all_reduce, "template"),
    "matmul_reduce_scatter": (matmul_reduce_scatter, "template"),
    "all_gather_matmul": (all_gather_matmul, "template"),
    "norm_after_all_reduce": (norm_after_all_reduce, "peer_views"),
    "norm_before_all_gather": (norm_before_all_gather, "peer_views"),
    "scatter_norm_gather": (scatter_norm_gather, "peer_views"),
    "two_layers": (two_layers, "template"),
}


def _operands(rank: int, rows: int, seed: int) -> list[Tensor]:
    own, common = torch.Generator().manual_seed(100 * seed + rank), torch.Generator().manual_seed(seed)
    x, w = torch.randn(rows, H, generator=own), torch.randn(H, H, generator=own) / H**0.5
    return [t.cuda().bfloat16() for t in (x, w, torch.randn(rows, H, generator=common))]


def _program(rank: int, world_size: int, name: str, mode: str) -> dict[str, object]:
    fn, _ = PROGRAMS[name]
    worst = 0.0
    with symmpatterns.config.patch(force=True, timeout_s=20), torch.no_grad():
        options = {"mode": "reduce-overhead"} if mode == "reduce-overhead" else {"dynamic": mode == "dynamic"}
        compiled = torch.compile(fn, fullgraph=True, **options)
        graph = None
        static = _operands(rank, ROWS, 0)
        for step in range(9):
            rows = ROWS * (1 + step % 3) if mode == "dynamic" else ROWS
            args = _operands(rank, rows, step)
            if mode == "capture":
                if graph is None:
                    for _ in range(3):
                        compiled(*static)
                    graph = torch.cuda.CUDAGraph()
                    torch.cuda.synchronize()
                    with torch.cuda.graph(graph):
                        captured = compiled(*static)
                for mine, new in zip(static, args):
                    mine.copy_(new)
                graph.replay()
                actual = captured
            else:
                actual = compiled(*args)
            flat = actual if isinstance(actual, tuple) else (actual,)
            expected = fn(*(arg.cpu() for arg in args))
            for one, other in zip(flat, expected if isinstance(expected, tuple) else (expected,)):
                other = other.cuda()
                worst = max(worst, float((one - other).float().norm() / other.float().norm()))
                if worst != worst:
                    worst = float("inf")
    report = symmpatterns.report()
    return {
        "worst": worst,
        "strategies": {r.strategy for r in report.rewrites},
        "declined": [str(r) for r in report.declined],
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class GpuProgramTest(unittest.TestCase):
    @parameterized.expand(
        [
            (f"{mode}_{name}", name, mode)
            for name in PROGRAMS
            for mode in ("plain", "dynamic", "capture", "reduce-overhead")
        ]
    )
    def test_program(self, _: str, name: str, mode: str) -> None:
        for result in run_ranks(_program, 2, name, mode, backend="nccl", timeout=150):
            self.assertLess(result["worst"], 2e-2)
            self.assertIn(PROGRAMS[name][1], result["strategies"], result["declined"])
            self.assertEqual(result["declined"], [])
