"""Peer views: Inductor's own kernels communicating, against the same graph with the backend's collective.

    python -m torch.distributed.run --standalone --nproc-per-node 2 bench/bench_peer_views.py

Workloads
    all_reduce   scale -> all-reduce -> add residual -> RMSNorm
    from_input   the same without the scaling: what is reduced is the program's input, which no collective may change
    all_gather   add residual -> RMSNorm -> all-gather -> scale
    embedding    vocab-parallel embedding -> all-reduce; N is the hidden size
    softmax      statistics of a vocab-parallel cross-entropy: largest logit -> all-reduce max -> sum of exp -> all-reduce
    all_to_all   silu -> all-to-all of equal parts -> scale

Implementations
    peer views         push, pull or two-shot, as the cost model chooses
    template           all_reduce, from_input: torch.ops.symmpatterns.all_reduce_rms_norm
    gloo | nccl        the same compiled function, not rewritten
    symm_mem ...       all_reduce and all_gather on GPUs: torch's own symmetric-memory operators, called by hand

M is the number of rows, N the hidden size. For CUDA graphs everything is compiled with config.cuda_graphs, and for each
number of rows by itself; launched from Python, on two ranks, more than one row is compiled as a dynamic number (on more
ranks the algorithm depends on it). Results are checked against float64 first; rows go to
bench/results/peer_views_<workload>-<device>-w<ranks>.csv. Exit code 1 if any implementation was wrong.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import _by_hand
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
    start_ranks,
    write_rows,
)
from torch import Tensor

import symmpatterns

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def world() -> Any:
    return dist.group.WORLD


def all_reduce(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    h = funcol.wait_tensor(funcol.all_reduce(x * 1.5, "sum", world())) + residual
    return torch.nn.functional.rms_norm(h, (weight.shape[0],), weight)


def from_input(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    h = funcol.wait_tensor(funcol.all_reduce(x, "sum", world())) + residual
    return torch.nn.functional.rms_norm(h, (weight.shape[0],), weight)


def all_gather(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    y = torch.nn.functional.rms_norm(x + residual, (weight.shape[0],), weight)
    return funcol.wait_tensor(funcol.all_gather_tensor(y, 0, world())) * 2


def embedding(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """Rows of x are this rank's part of a table; the tokens come from the residual, which is equal on all ranks."""
    rows = x.shape[0]
    tokens = (residual[:, 0].abs() * 1000).long() % (rows * dist.get_world_size()) - rows * dist.get_rank()
    mine = (tokens >= 0) & (tokens < rows)
    found = torch.where(mine.unsqueeze(1), x[tokens.clamp(0, rows - 1)], 0)
    return funcol.wait_tensor(funcol.all_reduce(found, "sum", world())) * weight


def softmax(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    logits = x.float() if x.dtype != torch.float64 else x
    largest = funcol.wait_tensor(funcol.all_reduce(logits.amax(-1), "max", world()))
    total = (logits - largest.unsqueeze(1)).exp().sum(-1)
    return (largest + funcol.wait_tensor(funcol.all_reduce(total, "sum", world())).log()).to(x.dtype)


def all_to_all(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    y = torch.nn.functional.silu(x)
    return funcol.wait_tensor(funcol.all_to_all_single(y, None, None, world())) * weight


WORKLOADS: dict[str, Callable[..., Tensor]] = {
    each.__name__: each for each in (all_reduce, from_input, all_gather, embedding, softmax, all_to_all)
}
# Not where RMSNorm comes last: each rank picks the loop for RMSNorm's own sum by timing it, so ranks may add in different
# orders, with the backend's collective as well.
_SAME_ON_ALL_RANKS = ("all_gather", "embedding", "softmax")


def dynamic(ranks: Ranks, launch: str) -> bool | None:
    """For `torch.compile`: whether the number of rows, where it is marked, becomes a symbol."""
    return None if launch == "eager" and ranks.world_size == 2 else False


def compiled(ranks: Ranks, launch: str, fn: Callable[..., Tensor], name: str, **changes: Any) -> Callable[..., Tensor]:
    """`fn`, compiled on its own whenever it is called with `changes` of the configuration."""
    own = compiled_alone(fn, name, dynamic(ranks, launch))

    def call(*arguments: Tensor) -> Tensor:
        with symmpatterns.config.patch(cuda_graphs=launch == "graph", **changes):
            result: Tensor = own(*arguments)
        return result

    return call


def make_implementations(ranks: Ranks, workload: str, launch: str, by_hand: bool) -> dict[str, Callable[..., Tensor]]:
    make = partial(compiled, ranks, launch, WORKLOADS[workload])
    made = {"peer views": make("peer views", force=True, template=False)}
    if workload in ("all_reduce", "from_input"):
        made["template"] = make("template", force=True, peer_views=False)
    made[dist.get_backend()] = make("collective", enabled=False)
    if by_hand and ranks.device.type == "cuda":
        made |= _by_hand.implementations(workload, dynamic(ranks, launch))
    return made


def make_case(
    ranks: Ranks,
    workload: str,
    launch: str,
    made: dict[str, Callable[..., Tensor]],
    rows: int,
    hidden: int,
    dtype: torch.dtype,
) -> Case:
    generator = torch.Generator(ranks.device).manual_seed(1000 + ranks.rank)
    shared = torch.Generator(ranks.device).manual_seed(7)
    x = torch.randn(rows, hidden, device=ranks.device, generator=generator).to(dtype)
    residual = torch.randn(rows, hidden, device=ranks.device, generator=shared).to(dtype)
    weight = torch.randn(hidden, device=ranks.device, generator=shared).to(dtype)
    arguments = (x, residual, weight)
    if rows > 1 and dynamic(ranks, launch) is None:  # a size of 1 is always compiled on its own
        for tensor in (x, residual):
            torch._dynamo.mark_dynamic(tensor, 0)
    exact = WORKLOADS[workload](*(a.double() for a in arguments))
    reference = WORKLOADS[workload](*arguments)
    case = Case(rows, hidden, 0, dtype, exact, reference, same_on_all_ranks=workload in _SAME_ON_ALL_RANKS)
    for name, call in made.items():
        case.implementations.append(Implementation(name, lambda call=call: call(*arguments)))  # type: ignore[misc]
    return case


def show(ranks: Ranks, workload: str, rows: list[Row]) -> None:
    for launch in dict.fromkeys(row.launch for row in rows):
        times = {row.implementation: row.p50_us for row in rows if row.launch == launch}
        size = rows[0].M * rows[0].N * DTYPES[rows[0].dtype].itemsize >> 10
        line = f"{workload:>10} {rows[0].M:>6}x{rows[0].N} {size:>6} KiB {rows[0].dtype:>9} {launch:>6}  "
        line += "  ".join(f"{name} {t:.1f} us" for name, t in times.items())
        base = times.get(dist.get_backend())
        if base is not None and "peer views" in times:
            line += f"  -> {base / times['peer views']:.2f}x"
        ranks.say(line)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--rows", nargs="+", type=int, help="default: 4 KiB to 16 MiB a rank")
    parser.add_argument("--hidden", type=int, help="default: 512; CUDA: 8192")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES))
    parser.add_argument("--launches", nargs="+", choices=["eager", "graph"], help="default: both on GPUs")
    parser.add_argument("--rounds", type=int, default=11, help="samples of each implementation")
    parser.add_argument(
        "--by-hand", action=argparse.BooleanOptionalAction, default=True, help="measure torch's operators too"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args(argv)
    ranks = start_ranks()
    on_gpu = ranks.device.type == "cuda"
    if "graph" in (args.launches or []) and not on_gpu:
        parser.error("--launches graph needs a GPU for each rank")
    hidden = args.hidden or (8192 if on_gpu else 512)
    counts = args.rows or ([8, 64, 512, 4096] if on_gpu else [2, 8, 32, 128, 512, 2048, 8192])
    wrong = False
    ranks.say(f"peer views on {ranks.world_size} ranks, {device_name(ranks.device)}, torch {torch.__version__}")
    for workload in args.workloads:
        rows: list[Row] = []
        dtypes = args.dtypes or (["bfloat16"] if on_gpu else ["float32"])
        for dtype, launch in itertools.product(dtypes, args.launches or (["eager", "graph"] if on_gpu else ["eager"])):
            made = make_implementations(ranks, workload, launch, args.by_hand)
            for count in counts:
                case = make_case(ranks, workload, launch, made, count, hidden, DTYPES[dtype])
                new, correct = rows_of(ranks, f"peer_views_{workload}", case, [launch], args.rounds)
                wrong |= not correct
                rows += new
                if new:
                    show(ranks, workload, new)
        if ranks.rank == 0 and rows and not args.no_save:
            path = result_path(ranks, f"peer_views_{workload}")
            write_rows(path, rows)
            print(f"rows: {path}")
    dist.destroy_process_group()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
