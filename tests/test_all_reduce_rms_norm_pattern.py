"""all-reduce -> residual add -> RMSNorm in graphs: what the pattern takes, and what it declines."""

from __future__ import annotations

import unittest
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch._inductor import config as inductor_config

import symmpatterns
from symmpatterns import config, cost_model
from symmpatterns.operators import all_reduce_rms_norm as family
from symmpatterns.testing import assert_same_on_all_ranks, compiled_code, fake_group, run_ranks
from tests.test_all_reduce_rms_norm import EPS, operands


def normalised(h: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """As Hugging Face's models spell it."""
    up = h.float()
    norm = (up * torch.rsqrt(up.pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype)
    return norm if weight is None else weight * norm


def reduced(x: torch.Tensor) -> torch.Tensor:
    return funcol.all_reduce(x * 2, "sum", dist.group.WORLD)


def with_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    h = reduced(x) + residual
    return torch.nn.functional.rms_norm(h, x.shape[-1:], weight, EPS), h.relu(), h


def residual_first(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    h = residual + reduced(x)
    return normalised(h, weight), h


def bare(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    y = funcol.wait_tensor(reduced(x))  # which waits by itself: a program that waits again has two waits in a row
    return normalised(y, None), y


def two_layers(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    first = reduced(x) + residual
    inner = torch.tanh(normalised(first, weight))
    second = reduced(inner) + first
    return normalised(second, weight).sin()


def reads_the_root(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    h = reduced(x) + residual
    root = torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + EPS)
    return (h.float() * root).to(h.dtype), root


def late_weight(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    h = reduced(x) + residual
    return normalised(h, None) * h.sum(0), h


def columns(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    h = reduced(x)
    return h * torch.rsqrt(h.pow(2).mean(0, keepdim=True) + EPS)


def behind_a_matmul(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    h = funcol.all_reduce(x @ x.t() @ x, "sum", dist.group.WORLD) + residual
    return torch.nn.functional.rms_norm(h, x.shape[-1:], weight, EPS), h


PATTERNS = [(with_residual, 1), (residual_first, 1), (bare, 1), (two_layers, 2)]


def rank_patterns(rank: int, world_size: int) -> list[torch.Tensor]:
    results = []
    for number, (fn, count) in enumerate(PATTERNS):
        dtype = [torch.bfloat16, torch.float32][number % 2]
        symmpatterns.report().clear()
        compiled = torch.compile(fn, fullgraph=True)
        for call in range(2):
            *inputs, residual, weight = operands(10 * number + call, world_size, (3 + call, 48), dtype)
            got, expected = compiled(inputs[rank], residual, weight), fn(inputs[rank], residual, weight)
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
            results += [got] if isinstance(got, torch.Tensor) else got
            records = [r for r in symmpatterns.report().rewrites if r.family == "all_reduce_rms_norm"]
            assert len(records) >= count and not symmpatterns.report().declined, symmpatterns.report()
    return results


class PatternTest(unittest.TestCase):
    def _compiled(self, fn: Any, dtype: torch.dtype, shape: tuple[int, ...] = (4, 64)) -> tuple[str, Any]:
        """The generated code, and the record of the first rewrite; results are checked against the program's."""
        symmpatterns.report().clear()
        x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1:]).to(dtype)
        with fake_group(2), inductor_config.patch(fx_graph_cache=False):
            _, code = compiled_code(fn, x, x, weight)
        return code, symmpatterns.report().rewrites[0]

    @parameterized.expand([(fn.__name__, fn, count) for fn, count in PATTERNS])
    def test_is_recognised(self, _: str, fn: Any, count: int) -> None:
        self.check_recognised(fn, count, family.DTYPES[0])

    @parameterized.expand([(fn.__name__, fn, count) for fn, count in PATTERNS])
    @pytest.mark.slow
    def test_is_recognised_in_another_dtype(self, _: str, fn: Any, count: int) -> None:
        self.check_recognised(fn, count, family.DTYPES[2])

    def check_recognised(self, fn: Any, count: int, dtype: torch.dtype) -> None:
        code, record = self._compiled(fn, dtype)
        self.assertEqual(code.count("torch.ops.symmpatterns.all_reduce_rms_norm.default("), count)
        self.assertNotIn("rsqrt", code)
        self.assertEqual((record.family, record.strategy, record.op), ("all_reduce_rms_norm", "template", "sum"))

    @parameterized.expand([(fn.__name__, fn) for fn in (reads_the_root, columns)])
    def test_what_it_is_not(self, _: str, fn: Any) -> None:
        _, record = self._compiled(fn, torch.float32)
        self.assertEqual(record.strategy, "peer_views")

    def test_a_weight_that_depends_on_the_sum_is_left_outside(self) -> None:
        code, record = self._compiled(late_weight, torch.float32)
        self.assertEqual(record.family, "all_reduce_rms_norm")
        self.assertRegex(code, r"all_reduce_rms_norm.default\(\w+, \w+, None,")

    def test_the_matmul_before_it_leaves_the_collective_where_the_cost_model_says_so(self) -> None:
        """Also where the norm goes to peer views: either way it is fused with the collective."""
        for shape, strategy in (((8, 64), "template"), ((1024, 64), "peer_views")):
            code, record = self._compiled(behind_a_matmul, torch.float32, shape)
            self.assertEqual((record.family, record.strategy), ("matmul_all_reduce", "template"))
            with mock.patch.object(
                cost_model, "norm_is_better", return_value=cost_model.Verdict(True, "it saves more")
            ):
                code, record = self._compiled(behind_a_matmul, torch.float32, shape)
                self.assertNotEqual(record.family, "matmul_all_reduce")
                self.assertEqual(record.strategy, strategy)
                self.assertIn(
                    "no template: cost_model: it saves more" if strategy == "peer_views" else "it saves more",
                    str(record.detail),
                )
                self.assertIn("extern_kernels.mm", code)
                with config.patch(force=True):
                    _, record = self._compiled(behind_a_matmul, torch.float32, shape)
                self.assertEqual(record.family, "matmul_all_reduce")

    def test_many_rows_are_for_peer_views(self) -> None:
        _, record = self._compiled(with_residual, torch.float32, (1024, 64))
        self.assertEqual(record.strategy, "peer_views")
        with config.patch(force=True, peer_views=False):
            _, record = self._compiled(with_residual, torch.float32, (1024, 64))
        self.assertEqual(record.strategy, "template")
        symmpatterns.report().clear()
        with config.patch(peer_views=False), fake_group(2), inductor_config.patch(fx_graph_cache=False):
            compiled_code(bare, torch.randn(1024, 64), None, None)
        (record,) = symmpatterns.report().declined
        self.assertEqual((record.family, record.code), ("all_reduce_rms_norm", "cost_model"))

    def test_wide_rows_are_declined(self) -> None:
        wide = torch.randn(2, family.MAX_COLUMNS + 1)
        with config.patch(peer_views=False), fake_group(2), inductor_config.patch(fx_graph_cache=False):
            compiled_code(bare, wide, None, None)
        (record,) = symmpatterns.report().declined
        self.assertEqual((record.family, record.code), ("all_reduce_rms_norm", "too_wide"))

    @pytest.mark.slow  # values and protocol are tested apart, the pattern in one process
    def test_between_ranks(self) -> None:
        for tensors in zip(*run_ranks(rank_patterns, 2, timeout=250), strict=True):
            assert_same_on_all_ranks(tensors)
