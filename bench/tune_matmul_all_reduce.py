"""Which kernel, tile and grid is the quickest for matmul -> all-reduce on these GPUs: where the tables come from.

    python -m torch.distributed.run --nproc-per-node 2 --standalone bench/tune_matmul_all_reduce.py \\
        --shapes 1024x8192x4096 --plans two_shot:128,256,64,8,4 two_shot_tma:128,256,64,8,3 one_shot:128,128,64,4,3

A plan is VARIANT:BM,BN,BK,WARPS,STAGES[:PROGRAMS_A_MULTIPROCESSOR[:STAGGER]]. Without --plans a
list of sensible ones is tried, whatever can be launched. Every result is compared with float64 before it is timed.
Times are those of CUDA-graph replays, all plans taking turns. Rows go to bench/results/tune_*.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from _common import Case, Implementation, Ranks, Row, device_name, result_path, rows_of, start_ranks, write_rows
from bench_matmul_all_reduce import CUDA_SHAPES, _symm_mem_operators, shapes_of
from torch import Tensor

from symmpatterns.symmetric_memory import get_workspace
from symmpatterns.triton_kernels import matmul_all_reduce
from symmpatterns.triton_kernels._workspace import launch_arguments, num_sms

NAME = "tune_matmul_all_reduce"
LIMIT = "mm alone"


@dataclass(frozen=True)
class Candidate:
    """A plan to try, for matrices of least to most rows."""

    variant: str
    tile: tuple[int, int, int]
    num_warps: int
    num_stages: int
    per_sm: int = 1
    stagger: int = 0
    least: int = 0
    most: int = 1 << 30

    @property
    def name(self) -> str:
        sizes = ",".join(map(str, (*self.tile, self.num_warps, self.num_stages)))
        return f"{self.variant}:{sizes}:{self.per_sm}:{self.stagger}"


# Two programs a multiprocessor must fit: up to 113 KiB of shared memory and 4 warps each.
CANDIDATES = [
    Candidate("one_shot", (128, 64, 128), 4, 4, most=512),
    Candidate("one_shot", (128, 128, 64), 4, 3, most=1024),
    Candidate("one_shot", (128, 128, 128), 8, 3, least=256, most=1024),
    Candidate("two_shot", (128, 128, 64), 4, 4, most=1024),
    Candidate("two_shot", (128, 128, 64), 4, 3, per_sm=2, least=512),
    Candidate("two_shot", (128, 256, 64), 8, 4, least=512),
    Candidate("two_shot_tma", (128, 64, 128), 4, 4, most=512),
    Candidate("two_shot_tma", (128, 128, 64), 4, 4, least=256, most=2048),
    Candidate("two_shot_tma", (128, 128, 64), 4, 2, per_sm=2, least=512),
    Candidate("two_shot_tma", (128, 256, 64), 8, 3, least=512),
    Candidate("two_shot_tma", (256, 128, 64), 8, 3, least=512),
    Candidate("two_shot_tma", (64, 256, 64), 4, 2, per_sm=2, least=512),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="MxNxK", help="K is each rank's share (default: a grid)")
    parser.add_argument("--plans", nargs="+", metavar="PLAN", help="see above; each is tried for every shape")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each plan")
    parser.add_argument("--budget-s", type=float, default=600.0, help="begin no shape after so many seconds")
    return parser.parse_args(argv)


def candidate_of(text: str) -> Candidate:
    try:
        variant, sizes, *rest = text.split(":")
        BM, BN, BK, num_warps, num_stages = (int(size) for size in sizes.split(","))
        return Candidate(variant, (BM, BN, BK), num_warps, num_stages, *(int(n) for n in rest))
    except (TypeError, ValueError) as error:
        sys.exit(f"--plans takes VARIANT:BM,BN,BK,WARPS,STAGES[:PROGRAMS[:STAGGER]], not {text!r} ({error})")


def implementation_of(
    ranks: Ranks, candidate: Candidate, a: Tensor, b: Tensor, group: dist.ProcessGroup
) -> Implementation | None:
    """The candidate, compiled and run once; None where some rank cannot, after saying why."""
    workspace = get_workspace(group.group_name, a.device)
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    call: Callable[[], Tensor] | None = None
    complaint = ""
    try:
        plan = matmul_all_reduce.plan(
            a.shape[0], b.shape[1], a.shape[1], a.dtype, ranks.world_size, num_sms(a), variant=candidate.variant,
            tile=candidate.tile, num_warps=candidate.num_warps, num_stages=candidate.num_stages,
            programs=candidate.per_sm * num_sms(a), stagger=candidate.stagger,
        )  # fmt: skip
        workspace.reserve(plan.staging_bytes, plan.flags)
        arguments = launch_arguments(workspace)

        def call() -> Tensor:
            matmul_all_reduce.launch(a, b, None, out, plan=plan, **arguments)
            return out

        call()
        torch.cuda.synchronize(a.device)
    except Exception as error:  # what a launch raises before it starts: too much shared memory, a tile that fails
        complaint = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    if ranks.slowest([float(bool(complaint))])[0]:
        ranks.say(f"  skipped {candidate.name}: {complaint or 'fails on another rank'}")
        return None
    assert call is not None
    return Implementation(candidate.name, call)


def make_case(ranks: Ranks, shape: tuple[int, int, int], candidates: list[Candidate]) -> Case:
    m, n, k = shape
    dtype = torch.bfloat16
    generator = torch.Generator(ranks.device).manual_seed(1000 + ranks.rank)
    a = torch.randn(m, k, device=ranks.device, generator=generator).to(dtype)
    b = (torch.randn(k, n, device=ranks.device, generator=generator) / k**0.5).to(dtype)
    group = dist.group.WORLD
    assert group is not None
    exact = a.double() @ b.double()
    dist.all_reduce(exact)
    reference = torch.mm(a, b)
    dist.all_reduce(reference)
    case = Case(m, n, k, dtype, exact, reference)
    for candidate in candidates:
        implementation = implementation_of(ranks, candidate, a, b, group)
        if implementation is not None:
            case.implementations.append(implementation)
    case.implementations += _symm_mem_operators(a, b, group)
    case.implementations.append(Implementation(LIMIT, lambda: torch.mm(a, b), is_limit=True))
    return case


def show(ranks: Ranks, rows: list[Row]) -> None:
    ranks.say(f"{rows[0].M}x{rows[0].N}x{rows[0].K}")
    for row in sorted(rows, key=lambda row: row.p50_us):
        ranks.say(f"  {row.p50_us:9.1f} us (p20 {row.p20_us:.1f}, p80 {row.p80_us:.1f})  {row.implementation}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    began = time.monotonic()
    ranks = start_ranks()
    if ranks.device.type != "cuda":
        sys.exit("tuning needs a GPU for every rank")
    ranks.say(f"{NAME} on {ranks.world_size} ranks, {device_name(ranks.device)}, torch {torch.__version__}")
    shapes = shapes_of(args.shapes, [shape for shape in CUDA_SHAPES if shape[0] >= 256])
    rows: list[Row] = []
    all_correct = True
    for shape in shapes:
        if ranks.slowest([time.monotonic() - began])[0] > args.budget_s:
            ranks.say(f"out of time before {shape}")
            break
        if args.plans is None:
            candidates = [each for each in CANDIDATES if each.least <= shape[0] <= each.most]
        else:
            candidates = [candidate_of(text) for text in args.plans]
        case = make_case(ranks, shape, candidates)
        new, correct = rows_of(ranks, NAME, case, ["graph"], args.rounds)
        all_correct &= correct
        rows += new
        show(ranks, new)
        if ranks.rank == 0:
            write_rows(result_path(ranks, NAME), rows)
    dist.destroy_process_group()
    return 0 if all_correct else 1


if __name__ == "__main__":
    sys.exit(main())
