"""A custom collective on symmetric input, allocated in place by the compiler, against the same one with a copy in front.

    python -m torch.distributed.run --standalone --nproc-per-node 2 bench/bench_custom_collective.py

The collective reads its peers' memory and sums. Its author has three choices, each measured in a compiled function whose
producer is a pointwise kernel:

    in place   the operator declares its input, and the producer's buffer is allocated in symmetric memory
    copy in    the operator copies its input to a symmetric buffer of its own first: what one does without this library
    gloo|nccl  the backend's all-reduce, not rewritten, for comparison

M is the number of rows, N their length. Results are checked against float64 first; rows go to
bench/results/custom_collective-<device>-w<ranks>.csv. Exit code 1 if any implementation was wrong.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from _common import (
    Case,
    Implementation,
    Ranks,
    Row,
    compiled_alone,
    device_name,
    result_path,
    rows_of,
    show,
    start_ranks,
    write_rows,
)
from torch import Tensor

import symmpatterns

COLUMNS = 1024
_library = torch.library.Library("bench_custom_collective", "DEF")
_staging: dict[tuple[torch.Size, torch.dtype, torch.device], tuple[Tensor, Any]] = {}


def _sum(x: Tensor, group_name: str) -> Tensor:
    return _sum_of(symmpatterns.rendezvous(x, group_name))


def _sum_of(handle: Any) -> Tensor:
    handle.barrier()
    total: Tensor = handle.buffers[0] + handle.buffers[1] if handle.world_size > 1 else handle.buffers[0].clone()
    for peer in handle.buffers[2:]:
        total += peer
    handle.barrier()
    return total


def _copy_in_and_sum(x: Tensor, group_name: str) -> Tensor:
    key = (x.shape, x.dtype, x.device)
    if key not in _staging:
        staging = symmpatterns.empty(x.shape, dtype=x.dtype, device=x.device)
        _staging[key] = staging, symmpatterns.rendezvous(staging, group_name)
    staging, handle = _staging[key]
    staging.copy_(x)
    return _sum_of(handle)


for _name, _implementation in (("in_place", _sum), ("copy_in", _copy_in_and_sum)):
    _library.define(f"{_name}(Tensor x, str group_name) -> Tensor")
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"bench_custom_collective::{_name}", lambda x, group_name: torch.empty_like(x), lib=_library
    )
symmpatterns.requires_symmetric_memory(torch.ops.bench_custom_collective.in_place)


def producer(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x) * 1.5


def with_operator(x: Tensor, op: Callable[[Tensor, str], Tensor], group_name: str) -> Tensor:
    return op(producer(x), group_name) + 1


def with_backend(x: Tensor) -> Tensor:
    return funcol.wait_tensor(funcol.all_reduce(producer(x), "sum", dist.group.WORLD)) + 1  # type: ignore[arg-type]


def make_implementations(group_name: str) -> dict[str, Callable[[Tensor], Tensor]]:
    ops = torch.ops.bench_custom_collective
    made: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, op in (("in place", ops.in_place), ("copy in", ops.copy_in)):
        made[name] = functools.partial(compiled_alone(with_operator, name), op=op, group_name=group_name)
    plain = compiled_alone(with_backend, "plain")

    def not_rewritten(x: Tensor) -> Tensor:
        with symmpatterns.config.patch(enabled=False):
            result: Tensor = plain(x)
        return result

    made[dist.get_backend()] = not_rewritten
    return made


def make_case(ranks: Ranks, made: dict[str, Callable[[Tensor], Tensor]], rows: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator(ranks.device).manual_seed(1000 + ranks.rank)
    x = torch.randn(rows, COLUMNS, device=ranks.device, generator=generator).to(dtype)
    exact, reference = producer(x.double()), producer(x)
    for total in (exact, reference):
        dist.all_reduce(total)
    case = Case(rows, COLUMNS, 0, dtype, exact + 1, reference + 1)
    for name, call in made.items():
        case.implementations.append(Implementation(name, functools.partial(call, x)))
    return case


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, help="default: 4 KiB to 16 MiB a rank")
    parser.add_argument("--rounds", type=int, default=11, help="samples of each implementation")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args(argv)
    torch._dynamo.config.cache_size_limit = 64
    ranks = start_ranks()
    on_gpu = ranks.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    made = make_implementations(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    rows: list[Row] = []
    wrong = False
    ranks.say(f"custom collective on {ranks.world_size} ranks, {device_name(ranks.device)}, torch {torch.__version__}")
    for count in args.rows or [1, 16, 256, 1024, 4096]:
        case = make_case(ranks, made, count, dtype)
        launches = ["eager", "graph"] if on_gpu else ["eager"]
        new, correct = rows_of(ranks, "custom_collective", case, launches, args.rounds)
        wrong |= not correct
        rows += new
        if new:
            show(ranks, new)
    if ranks.rank == 0 and rows and not args.no_save:
        path = result_path(ranks, "custom_collective")
        write_rows(path, rows)
        print(f"rows: {path}")
    dist.destroy_process_group()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
