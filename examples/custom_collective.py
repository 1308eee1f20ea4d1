"""A custom collective that reads the peers' memory, and a compiled model that feeds it without a copy.

    python examples/custom_collective.py [world size]

The operator is written as its author would: it checks that its input is in symmetric memory, maps the peers' tensors,
and sums them. One line declares the need. The compiled function then computes its intermediate results straight into
symmetric memory; ``symmpatterns.report()`` says so.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

import symmpatterns
from symmpatterns.testing import run_ranks


@torch.library.custom_op("custom_collective::sum_ranks", mutates_args=())
def sum_ranks(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """The sum of every rank's `x`, which must be in symmetric memory."""
    handle = symmpatterns.rendezvous(x, group_name)  # raises for an ordinary tensor; free after the first call
    handle.barrier()  # everybody's input is written
    total = handle.buffers[0].clone()
    for peer in handle.buffers[1:]:
        total += peer
    handle.barrier()  # everybody has read: like any collective, it gives its input back when it ends
    return total


@sum_ranks.register_fake
def _(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return torch.empty_like(x)


symmpatterns.requires_symmetric_memory(sum_ranks, input="x")


def model(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, group_name: str) -> torch.Tensor:
    """A tensor-parallel MLP: columns of w1 and rows of w2 are this rank's."""
    hidden = torch.nn.functional.gelu(x @ w1)
    return x + sum_ranks(hidden @ w2, group_name)


def run(rank: int, world_size: int) -> tuple[float, str]:
    """Largest difference from the model with torch's all-reduce, and the report."""
    group_name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    torch.manual_seed(rank + 1)
    w1, w2 = torch.randn(128, 256) / 16, torch.randn(256, 128) / 16
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(3):
        y = compiled(x, w1, w2, group_name)

    expected = torch.nn.functional.gelu(x @ w1) @ w2
    dist.all_reduce(expected)
    return float((y - x - expected).abs().max()), str(symmpatterns.report())


def main(world_size: int = 2) -> None:
    """Runs the example on `world_size` processes of this machine."""
    results = run_ranks(run, world_size)
    print(results[0][1])
    for rank, (error, _) in enumerate(results):
        print(f"rank {rank}: largest difference from all_reduce {error:.1e}")
        assert error < 1e-4


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
