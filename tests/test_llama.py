"""A Llama-style decoder under DTensor tensor parallelism: forward, backward and an optimizer step, against eager."""

from __future__ import annotations

import collections
import contextlib
import sys
import unittest
from pathlib import Path

import pytest
import torch
from torch import nn

import symmpatterns
from symmpatterns.testing import run_ranks

ROOT = Path(__file__).resolve().parents[1]
F = nn.functional


def _train(rank: int, world_size: int, layers: int, sequence_parallel: bool, loss_parallel: bool) -> dict[str, object]:
    sys.path.insert(0, str(ROOT / "examples"))
    import llama
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel as split_loss

    mesh = init_device_mesh("cpu", (world_size,))
    shape = llama.Shape(layers=layers, dim=32, hidden=64, vocabulary=64)
    tokens = torch.randint(shape.vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))

    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        model = llama.Llama(shape)
        if compiled:
            llama.parallelize(model, mesh, sequence_parallel, loss_parallel)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        forward = torch.compile(model, fullgraph=True) if compiled else model
        seen = []
        for _ in range(4):
            optimizer.zero_grad()
            logits = forward(tokens[:, :-1])
            with split_loss() if compiled and loss_parallel else contextlib.nullcontext():
                loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                loss.backward()
            optimizer.step()
            loss = loss.detach()
            seen.append(float(loss.full_tensor() if hasattr(loss, "full_tensor") else loss))
        return seen

    expected = losses(compiled=False)
    actual = losses(compiled=True)
    report = symmpatterns.report()
    return {
        "losses": (expected, actual),
        "rewrites": dict(collections.Counter((r.strategy, r.family) for r in report.rewrites)),
        "declined": dict(collections.Counter((r.collective, r.code) for r in report.declined)),
    }


class LlamaTest(unittest.TestCase):
    """Losses are those of the unsplit model in eager mode; each collective of forward and backward is accounted for."""

    def check(self, layers: int, sequence_parallel: bool, loss_parallel: bool, wanted: dict) -> None:
        for result in run_ranks(_train, 2, layers, sequence_parallel, loss_parallel, timeout=280):
            torch.testing.assert_close(*map(torch.tensor, result["losses"]), rtol=2e-4, atol=2e-4)
            self.assertEqual(result["rewrites"], wanted)
            self.assertEqual(result["declined"], {})

    @pytest.mark.slow
    def test_tensor_parallel(self, layers: int = 1) -> None:
        wanted = {
            # Forward after attention and after the MLP; backward each of q, k, v, gate, up gives its own gradient of
            # their input, and so does the head.
            ("template", "matmul_all_reduce"): (2 + 5) * layers + 1,
            ("peer_views", "peer_all_reduce"): 1,  # the embedding, whose vocabulary is split
            ("peer_views", "peer_all_gather"): 1,  # the logits
        }
        self.check(layers, False, False, wanted)

    def test_sequence_and_loss_parallel(self, layers: int = 1) -> None:
        wanted = {
            # Forward before q, k, v, before gate and up, and before the head; backward before o's and down's gradients.
            ("template", "all_gather_matmul"): (2 + 2) * layers + 1,
            # Forward after o and after down; backward the head's gradient of its input.
            ("template", "matmul_reduce_scatter"): 2 * layers + 1,
            # Backward the gradients of q, k, v are added before they are scattered, those of gate and up too; and the
            # embedding, forward.
            ("peer_views", "peer_reduce_scatter"): 2 * layers + 1,
            ("peer_views", "peer_all_gather"): 1,  # the embedding's gradient; the logits stay split
        }
        self.check(layers, True, True, wanted)

    @pytest.mark.slow
    def test_two_layers(self) -> None:
        self.test_tensor_parallel(layers=2)
        self.test_sequence_and_loss_parallel(layers=2)

    @pytest.mark.slow
    def test_sequence_parallel_with_whole_logits(self) -> None:
        wanted = {
            ("template", "all_gather_matmul"): 5,
            ("template", "matmul_reduce_scatter"): 3,
            ("peer_views", "peer_reduce_scatter"): 3,
            ("peer_views", "peer_all_gather"): 2,  # the logits as well
        }
        self.check(1, True, False, wanted)

    @pytest.mark.slow
    def test_loss_parallel_alone(self) -> None:
        wanted = {("template", "matmul_all_reduce"): 8, ("peer_views", "peer_all_reduce"): 1}
        self.check(1, False, True, wanted)
