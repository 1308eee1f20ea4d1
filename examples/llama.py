"""A Llama-style decoder and how it is split over ranks: what llama_training_step.py and decode_loop.py have in common.

Nothing here knows of symmpatterns: it is a model and a plan for ``parallelize_module``, as torchtitan has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

F = nn.functional
Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [batch, own heads, max_tokens, head_dim]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `heads`, `kv_heads`, `hidden` and `vocabulary` must divide by the number of ranks."""

    layers: int = 2
    dim: int = 64
    heads: int = 8
    kv_heads: int = 4
    hidden: int = 128
    vocabulary: int = 256

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over the tokens at hand or over a cache."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.q = nn.Linear(shape.dim, shape.heads * shape.head_dim, bias=False)
        self.k = nn.Linear(shape.dim, shape.kv_heads * shape.head_dim, bias=False)
        self.v = nn.Linear(shape.dim, shape.kv_heads * shape.head_dim, bias=False)
        self.o = nn.Linear(shape.heads * shape.head_dim, shape.dim, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        # A rank has the heads that its shares of q, k and v have: -1 finds out how many.
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        q, k = rotate(q, positions), rotate(k, positions)
        mask = None
        if cache is not None:
            k, v = (kept.index_copy_(2, positions, new) for kept, new in zip(cache, (k, v)))
            mask = torch.arange(k.shape[2], device=x.device) <= positions[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of [batch, heads, tokens, head_dim]."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class SwiGLU(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(shape.dim, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(shape.dim, eps=1e-5) for _ in range(2))
        self.attention, self.mlp = Attention(shape), SwiGLU(shape)

    def forward(self, x: Tensor, positions: Tensor, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, cache)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """tokens [batch, tokens] -> logits [batch, tokens, vocabulary]; `positions` [tokens] and `cache` for decoding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.dim)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, eps=1e-5)
        self.head = nn.Linear(shape.dim, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = self.embedding(tokens)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        for number, layer in enumerate(self.layers):
            x = layer(x, positions, None if cache is None else cache[number])
        return self.head(self.norm(x))


def parallelize(model: Llama, mesh: DeviceMesh, sequence_parallel: bool = False, loss_parallel: bool = False) -> None:
    """Splits the model over a mesh of one dimension, in place.

    Every layer keeps two all-reduces; with `sequence_parallel`, two pairs of all-gather and reduce-scatter, and the
    tokens in between are split over the ranks. With `loss_parallel` the logits stay split (a DTensor, for
    ``torch.distributed.tensor.parallel.loss_parallel``) instead of being gathered.
    """
    between = Shard(1) if sequence_parallel else Replicate()
    head = (
        {"output_layouts": Shard(-1), "use_local_output": False} if loss_parallel else {"output_layouts": Replicate()}
    )
    plan: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, **head),
    }
    for name in ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"):
        plan[f"layers.*.{name}"] = ColwiseParallel()
    for name in ("attention.o", "mlp.down"):
        plan[f"layers.*.{name}"] = RowwiseParallel(output_layouts=between)
    if sequence_parallel:
        plan |= {name: SequenceParallel() for name in ("norm", "layers.*.attention_norm", "layers.*.mlp_norm")}
        # Gathered once for all the projections that read it, not once for each.
        kept = (None, None)
        plan["layers.*.attention"] = PrepareModuleInput(
            input_layouts=(Shard(1), *kept), desired_input_layouts=(Replicate(), *kept)
        )
        plan["layers.*.mlp"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    parallelize_module(model, mesh, plan)
