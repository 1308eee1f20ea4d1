"""Host time of a call of a declared operator against the same call of an undeclared one; no kernel in either.

    python bench/bench_declared_call.py

Chains of 16 calls in one compiled function on two ranks; processor time of the calling thread, least of 40 runs of 100.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

import symmpatterns
from symmpatterns.testing import run_ranks

CALLS, REPEATS, RUNS = 16, 100, 40

_library = torch.library.Library("bench_declared_call", "DEF")
for _name in ("declared", "plain"):
    _library.define(f"{_name}(Tensor x, str group_name) -> Tensor")
    _library.impl(_name, lambda x, group_name: torch.empty_like(x), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"bench_declared_call::{_name}", lambda x, group_name: torch.empty_like(x), lib=_library
    )
symmpatterns.requires_symmetric_memory(torch.ops.bench_declared_call.declared)


def _microseconds(op: Any, group_name: str) -> float:
    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(CALLS):
            x = op(x.sin(), group_name)
        return x

    compiled = torch.compile(chain)
    x = torch.randn(8, 16)
    for _ in range(50):
        compiled(x)
    best = float("inf")
    for _ in range(RUNS):
        start = time.thread_time()
        for _ in range(REPEATS):
            compiled(x)
        best = min(best, time.thread_time() - start)
    return best / REPEATS / CALLS * 1e6


def run(rank: int, world_size: int) -> tuple[float, float]:
    """(declared, plain), in microseconds a call."""
    group_name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    ops = torch.ops.bench_declared_call
    return _microseconds(ops.declared, group_name), _microseconds(ops.plain, group_name)


def main() -> None:
    """Prints the two times and their difference for each rank."""
    for rank, (declared, plain) in enumerate(run_ranks(run, 2)):
        print(f"rank {rank}: declared {declared:.1f} us, plain {plain:.1f} us, difference {declared - plain:.1f} us")


if __name__ == "__main__":
    main()
