"""A Llama-style decoder under DTensor tensor parallelism: forward, backward and an optimizer step, against eager."""

from __future__ import annotations

import collections
import unittest

import torch
from parameterized import parameterized
from torch import Tensor, nn

import symmpatterns
from symmpatterns.testing import run_ranks

DIM, HEADS, VOCABULARY, SEQUENCE = 32, 4, 64, 8
F = nn.functional


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = (y.unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(DIM, 64, bias=False), nn.Linear(DIM, 64, bias=False)
        self.down = nn.Linear(64, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attention, self.mlp = Attention(), SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.RMSNorm(DIM)
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def _parallelize(model: Llama, world_size: int, sequence_parallel: bool) -> None:
    """As torchtitan does it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (world_size,))
    between = Shard(1) if sequence_parallel else Replicate()
    parallelize_module(
        model,
        mesh,
        {
            "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
            "head": ColwiseParallel(input_layouts=between, output_layouts=Replicate()),
            **({"norm": SequenceParallel()} if sequence_parallel else {}),
        },
    )
    for layer in model.layers:
        plan: dict = {
            "attention.q": ColwiseParallel(),
            "attention.k": ColwiseParallel(),
            "attention.v": ColwiseParallel(),
            "attention.o": RowwiseParallel(output_layouts=between),
            "mlp.gate": ColwiseParallel(),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(output_layouts=between),
        }
        if sequence_parallel:
            gather = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
            plan |= {
                "attention_norm": SequenceParallel(),
                "mlp_norm": SequenceParallel(),
                "attention": PrepareModuleInput(**gather),
                "mlp": PrepareModuleInput(**gather),
            }
        parallelize_module(layer, mesh, plan)


def _train(rank: int, world_size: int, sequence_parallel: bool, options: dict) -> dict[str, object]:
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))

    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        model = Llama(layers=2)
        _parallelize(model, world_size, sequence_parallel)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        forward = torch.compile(model, fullgraph=True) if compiled else model
        seen = []
        for _ in range(4):
            optimizer.zero_grad()
            logits = forward(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            seen.append(float(loss))
        return seen

    expected = losses(compiled=False)
    with torch._inductor.config.patch(fx_graph_cache=False), symmpatterns.config.patch(**options):
        actual = losses(compiled=True)
    report = symmpatterns.report()
    return {
        "losses": (expected, actual),
        "rewrites": collections.Counter((r.strategy, r.family) for r in report.rewrites),
        "declined": [str(r) for r in report.declined],
    }


class LlamaTest(unittest.TestCase):
    def check(self, results: list[dict]) -> dict:
        for result in results:
            torch.testing.assert_close(*map(torch.tensor, result["losses"]), rtol=2e-4, atol=2e-4)
            self.assertEqual(result["rewrites"], results[0]["rewrites"])
        return results[0]

    @parameterized.expand([(2,)])
    def test_tensor_parallel(self, world_size: int) -> None:
        options = {"peer_views": False}
        result = self.check(run_ranks(_train, world_size, False, options, timeout=280))
        # Two per layer forward (o, down). Backward, the gradients of q, k, v and of gate, up are summed first, so there
        # the collective does not follow a matmul.
        self.assertGreaterEqual(result["rewrites"]["template", "matmul_all_reduce"], 4, result)

    def test_sequence_parallel(self) -> None:
        result = self.check(run_ranks(_train, 2, True, {"peer_views": False}, timeout=280))
        self.assertGreaterEqual(result["rewrites"]["template", "matmul_reduce_scatter"], 4, result)
        self.assertGreaterEqual(result["rewrites"]["template", "all_gather_matmul"], 4, result)

    def test_everything_on(self) -> None:
        for sequence_parallel in (False, True):
            result = self.check(run_ranks(_train, 2, sequence_parallel, {}, timeout=280))
            self.assertEqual(result["declined"], [])
