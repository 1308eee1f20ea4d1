"""In a profiler's trace the fused operators have names; torch's dispatcher records them, at no cost without a profiler."""

from __future__ import annotations

import unittest

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from symmpatterns.testing import fake_group


class ProfilerTest(unittest.TestCase):
    def test_names_in_a_trace(self) -> None:
        def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            total = funcol.all_reduce(x @ w, "sum", torch.distributed.group.WORLD)
            return total, funcol.all_reduce(total.relu(), "max", torch.distributed.group.WORLD)

        with fake_group(2):
            compiled = torch.compile(fn, fullgraph=True)
            x, w = torch.randn(8, 16), torch.randn(16, 16)
            compiled(x, w)
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
                compiled(x, w)
        counts = {event.key: event.count for event in trace.key_averages()}
        for name in ("matmul_all_reduce", "peer_buffers", "barrier_", "peer_sources"):
            self.assertEqual(counts.get(f"symmpatterns::{name}"), 1, counts)
        (fused,) = (event for event in trace.events() if event.name == "symmpatterns::matmul_all_reduce")
        self.assertEqual(fused.input_shapes[:2], [[8, 16], [16, 16]])
