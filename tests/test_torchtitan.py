"""Training as torchtitan sets it up: tensor and sequence parallelism, each block compiled by itself, a parallel loss.

torchtitan itself is not needed: `parallelize` does to a model what its ``parallelize_llama`` does.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import symmpatterns
from symmpatterns.testing import run_ranks

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 2


def parallelize(model: Any, mesh: Any) -> None:
    """Tensor parallelism, then `torch.compile` of each block in its place."""
    import llama

    llama.parallelize(model, mesh, sequence_parallel=True, loss_parallel=True)
    # torch loses the gradient of an input of compiled code that is still under way, symmpatterns or not. The clone waits.
    model.embedding.register_forward_hook(lambda module, inputs, output: output.clone())
    for name, block in model.layers.named_children():
        # With sizes that change torch 2.13 cannot compile a block on DTensors of a sequence, symmpatterns or not.
        compiled = torch.compile(block, fullgraph=True, dynamic=False)
        model.layers.register_module(name, compiled)


def _train(rank: int, world_size: int) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "examples"))
    import llama
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh("cpu", (world_size,))
    shape = llama.Shape(layers=LAYERS, dim=32, hidden=64, vocabulary=64)
    tokens = torch.randint(shape.vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))

    def losses(split: bool) -> list[float]:
        torch.manual_seed(0)
        model = llama.Llama(shape)
        if split:
            parallelize(model, mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        seen = []
        for _ in range(3):
            optimizer.zero_grad()
            with loss_parallel() if split else contextlib.nullcontext():
                logits = model(tokens[:, :-1])
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss = loss.detach()
            seen.append(float(loss.full_tensor() if hasattr(loss, "full_tensor") else loss))
        return seen

    expected, actual = losses(split=False), losses(split=True)
    report = symmpatterns.report()
    return {
        "losses": (actual, expected),
        "rewrites": collections.Counter(r.family for r in report.rewrites),
        "declined": [str(r) for r in report.declined],
    }


class TorchtitanTest(unittest.TestCase):
    @pytest.mark.slow
    def test_blocks_compiled_one_by_one(self) -> None:
        for result in run_ranks(_train, 2, timeout=280):
            torch.testing.assert_close(*map(torch.tensor, result["losses"]), rtol=2e-4, atol=2e-4)
            self.assertEqual(result["declined"], [])
            self.assertEqual(
                result["rewrites"],
                # One graph serves all blocks. Embedding, last norm and head are not compiled.
                {
                    "all_gather_matmul": 2 + 2,  # before q, k, v; before gate and up; the gradients of o's and down's
                    "matmul_reduce_scatter": 2,  # after o, after down
                    "peer_reduce_scatter": 2,  # the gradients of q, k, v together, and those of gate and up
                },
            )
