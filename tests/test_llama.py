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

    forward_rewrites: collections.Counter = collections.Counter()

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
            if not seen:  # the graph of the backward pass is compiled when it is first needed
                forward_rewrites.update(r.family for r in symmpatterns.report().rewrites)
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
    rewrites = collections.Counter(r.family for r in report.rewrites)
    return {
        "losses": (expected, actual),
        "forward": dict(forward_rewrites),
        "backward": dict(rewrites - forward_rewrites),
        "declined": dict(collections.Counter((r.collective, r.code) for r in report.declined)),
    }


class LlamaTest(unittest.TestCase):
    """Losses are those of the unsplit model in eager mode; each collective of forward and backward is accounted for."""

    def check(self, layers: int, sequence_parallel: bool, loss_parallel: bool, forward: dict, backward: dict) -> None:
        for result in run_ranks(_train, 2, layers, sequence_parallel, loss_parallel, timeout=280):
            torch.testing.assert_close(*map(torch.tensor, result["losses"]), rtol=2e-4, atol=2e-4)
            self.assertEqual(result["forward"], forward)
            self.assertEqual(result["backward"], backward)
            self.assertEqual(result["declined"], {})

    def test_tensor_parallel(self, layers: int = 1) -> None:
        forward = {
            "matmul_all_reduce": 2 * layers,  # after attention and after the MLP
            "peer_all_reduce": 1,  # the embedding, whose vocabulary is split
            "peer_all_gather": 1,  # the logits
        }
        # Each of q, k, v, gate, up gives its own gradient of their input, and so does the head.
        backward = {"matmul_all_reduce": 5 * layers + 1}
        self.check(layers, False, False, forward, backward)

    def test_sequence_and_loss_parallel(self, layers: int = 1) -> None:
        forward = {
            "all_gather_matmul": 2 * layers + 1,  # before q, k, v, before gate and up, and before the head
            "matmul_reduce_scatter": 2 * layers,  # after o and after down
            "peer_reduce_scatter": 1,  # the embedding
        }
        backward = {
            "all_gather_matmul": 2 * layers,  # before o's and down's gradients
            "matmul_reduce_scatter": 1,  # the head's gradient of its input
            "peer_reduce_scatter": 2 * layers,  # the gradients of q, k, v, added before; those of gate and up
            "peer_all_gather": 1,  # the embedding's gradient; the logits stay split
        }
        self.check(layers, True, True, forward, backward)

    @pytest.mark.slow
    def test_two_layers(self) -> None:
        self.test_tensor_parallel(layers=2)
        self.test_sequence_and_loss_parallel(layers=2)

    @pytest.mark.slow
    def test_sequence_parallel_with_whole_logits(self) -> None:
        forward = {"all_gather_matmul": 3, "matmul_reduce_scatter": 2, "peer_reduce_scatter": 1}
        forward["peer_all_gather"] = 1  # the logits
        backward = {"all_gather_matmul": 2, "matmul_reduce_scatter": 1, "peer_reduce_scatter": 2, "peer_all_gather": 1}
        self.check(1, True, False, forward, backward)

    @pytest.mark.slow
    def test_loss_parallel_alone(self) -> None:
        forward, backward = {"matmul_all_reduce": 2, "peer_all_reduce": 1}, {"matmul_all_reduce": 6}
        self.check(1, False, True, forward, backward)
