"""Which kernel of a GEMM family is the quickest on these GPUs, and whether it beats what is not fused.

    python -m symmpatterns tune --ranks 2 [--families ...] [--shapes 4096x8192x4096 ...] [--output FILE]

Every choice that could be sensible for a shape is checked against float64 and timed, in CUDA graphs and launched from
Python, all of them taking turns, with the unfused alternatives. The one that gains most over the best of those, in both
ways of launching together, and how it compares are written to FILE, by default the user's tuning table
(symmpatterns/tables.py), in which entries of other shapes are kept. All times go to
bench/results/tune_<family>-<device>-w<ranks>.csv.

On CPU ranks this needs TRITON_INTERPRET=1 and tries the interpreter's choices: good for nothing but testing this script.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _common import (
    BY_HAND,
    LIMIT,
    Case,
    Implementation,
    Ranks,
    Row,
    device_name,
    result_path,
    rows_of,
    shapes_of,
    start_ranks,
    write_rows,
)
from bench_gemm_family import CUDA_SHAPES as FAMILY_SHAPES
from bench_gemm_family import all_gather_case, reduce_scatter_case
from bench_matmul_all_reduce import CUDA_SHAPES, make_case
from torch import Tensor

from symmpatterns import tables
from symmpatterns.operators._kernels import Choice, bound, implementation_of
from symmpatterns.workspace import get_workspace

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = {"matmul_all_reduce": CUDA_SHAPES, **FAMILY_SHAPES}
_SAMPLES = 5


def _tile(BM: int, BN: int, BK: int, num_warps: int, num_stages: int, **more: Any) -> dict[str, Any]:
    return {"tile": [BM, BN, BK], "num_warps": num_warps, "num_stages": num_stages, **more}


def candidates(family: str, m: int, world_size: int) -> list[Choice]:
    """What could be the quickest for m rows; the table's own plan comes first."""
    found = [Choice("kernel", {})]
    if family == "matmul_all_reduce":
        if m <= 16:
            for tile in ((16, 32, 256, 4, 5), (16, 64, 128, 4, 6), (16, 128, 128, 4, 5)):
                found.append(Choice("kernel", _tile(*tile, variant="one_shot")))
        elif m <= 64:
            for tile in ((64, 64, 128, 4, 4), (64, 64, 256, 4, 3)):
                found.append(Choice("kernel", _tile(*tile, variant="one_shot")))
        if 128 <= m <= 1024:
            found.append(Choice("kernel", _tile(64, 256, 64, 4, 4, variant="one_shot")))
            found.append(Choice("kernel", _tile(128, 128, 64, 4, 4, variant="one_shot")))
        if m >= 256:
            found += [
                Choice("kernel", _tile(128, 128, 64, 4, 3, variant="two_shot", per_sm=2, stagger=n)) for n in (90, 170)
            ]
        if m >= 1024 and world_size == 2:
            found += [Choice("kernel", _tile(128, 256, 64, 8, 3, variant="two_shot_tma", stagger=n)) for n in (0, 300)]
    if family == "matmul_reduce_scatter" and m >= 256:
        found.append(Choice("kernel", _tile(128, 128, 64, 4, 3, per_sm=2, stagger=170)))
        if world_size == 2:
            found += [Choice("kernel", _tile(128, 256, 64, 8, 3, variant="tma", stagger=n)) for n in (0, 100, 300)]
            found.append(Choice("kernel", _tile(128, 128, 64, 4, 4, variant="tma")))
    if family == "all_gather_matmul":
        found += [Choice("copy_engine", {})] if m >= 256 else []
    elif m >= 2048:
        found += [Choice("copy_engine", {"parts": count, "library": 1}) for count in (2, 3)]
        found.append(Choice("copy_engine", {"parts": 2, "library": 0}))
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--shapes", nargs="+", metavar="MxNxK", help="of a rank's matmul (default: a grid)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=_SAMPLES, help="samples of each choice")
    parser.add_argument("--budget-s", type=float, default=1800.0, help="begin no shape after so many seconds")
    parser.add_argument("--output", type=Path, help="default: the user's tuning table")
    parser.add_argument("--no-rows", action="store_true", help="do not write bench/results")
    return parser.parse_args(argv)


def call_of(family: str, choice: Choice, a: Tensor, b: Tensor, group_name: str) -> Callable[[], Tensor]:
    """The operator's implementation under `choice`, for the operands of a case."""
    workspace = get_workspace(group_name, a.device)
    run = bound(family, implementation_of(family, "triton", a), choice)
    rows = a.shape[0]
    if family == "matmul_all_reduce":
        out = a.new_empty(rows, b.shape[1])
        arguments: tuple[Any, ...] = (a, b, None, out, workspace, "sum")
    elif family == "matmul_reduce_scatter":
        out = a.new_empty(rows // workspace.world_size, b.shape[1])
        arguments = (a, b, None, out, workspace, "sum", 0)
    else:
        out = a.new_empty(rows * workspace.world_size, b.shape[1])
        arguments = (a, [b], [out], None, workspace, 0)

    def call() -> Tensor:
        run(*arguments)
        return out

    return call


def case_of(ranks: Ranks, family: str, m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Case, Tensor, Tensor]:
    """The benchmark's case without the fused operator, and the operands of the fused one."""
    if family == "matmul_all_reduce":
        case = make_case(ranks, m, n, k, dtype, interpreter=False)
    else:
        make = reduce_scatter_case if family == "matmul_reduce_scatter" else all_gather_case
        case = make(ranks, m, n, k, dtype)
    case.implementations = [each for each in case.implementations if each.name != "fused"]
    assert case.operands is not None
    return case, *case.operands


def usable(ranks: Ranks, family: str, choice: Choice, a: Tensor, b: Tensor) -> Implementation | None:
    """The choice, compiled and run once; None where some rank cannot, after saying why."""
    complaint = ""
    call: Callable[[], Tensor] | None = None
    try:
        call = call_of(family, choice, a, b, dist.group.WORLD.group_name)  # type: ignore[union-attr]
        call()
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
    except Exception as error:  # what a launch raises before it starts: too much shared memory, a tile that fails
        complaint = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    if ranks.slowest([float(bool(complaint))])[0]:
        ranks.say(f"  skipped {choice}: {complaint or 'fails on another rank'}")
        return None
    assert call is not None
    return Implementation(str(choice), call)


def entries_of(
    family: str, rows: Sequence[Row], choices: Sequence[Choice]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(measured points, the choice) of one shape, as a tuning table has them."""
    first = rows[0]
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(row.implementation, {})[row.launch] = row.p50_us
    named = {str(choice): choice for choice in choices if str(choice) in times}
    others = [by_launch for name, by_launch in times.items() if name not in (*named, LIMIT, *BY_HAND)]

    def gain(name: str) -> float:
        """What is left of the time, over the ways of launching; where a choice is slower it is not used."""
        bests = {launch: min(each[launch] for each in others) for launch in times[name]}
        return sum(min(time, bests[launch]) / bests[launch] for launch, time in times[name].items())

    best = min(named, key=lambda name: (gain(name), sum(times[name].values())))
    common = {
        "family": family, "device": first.device if first.device.startswith("NVIDIA") else "cpu",
        "world_size": first.world_size, "dtype": first.dtype, "size": [first.M, first.N, first.K],
    }  # fmt: skip
    measured = [
        {**common, "launch": launch, "fused_us": fused, "best_other_us": min(each[launch] for each in others)}
        for launch, fused in times[best].items()
    ]
    return measured, {**common, "choice": {"variant": named[best].variant, "options": named[best].options}}


def merge(path: Path, measured: list[dict[str, Any]], choices: list[dict[str, Any]]) -> None:
    """Adds entries to a table; they replace those of the same site."""
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        table = {}

    def key(entry: dict[str, Any]) -> str:
        names = ("family", "device", "world_size", "dtype", "size", "launch")
        return json.dumps([entry.get(name) for name in names])

    for kind, new in (("measured", measured), ("choices", choices)):
        known = {key(entry): entry for entry in [*table.get(kind, []), *new]}
        table[kind] = list(known.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    temporary.replace(path)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    began = time.monotonic()
    ranks = start_ranks()
    on_gpu = ranks.device.type == "cuda"
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("tuning needs a GPU for every rank (CPU tensors have one implementation)")
    output = args.output or tables.user_file()
    ranks.say(f"tuning on {ranks.world_size} ranks, {device_name(ranks.device)}, torch {torch.__version__}")
    all_correct = True
    for family in args.families:
        rows: list[Row] = []
        for m, n, k in shapes_of(args.shapes, SHAPES[family]):
            if ranks.slowest([time.monotonic() - began])[0] > args.budget_s:
                ranks.say(f"out of time before {family} {m}x{n}x{k}")
                break
            case, a, b = case_of(ranks, family, m, n, k, DTYPES[args.dtype])
            choices = []
            for choice in candidates(family, m, ranks.world_size):
                implementation = usable(ranks, family, choice, a, b)
                if implementation is not None:
                    choices.append(choice)
                    case.implementations.append(implementation)
            new, correct = rows_of(
                ranks, f"tune_{family}", case, ["graph", "eager"] if on_gpu else ["eager"], args.rounds
            )
            all_correct &= correct
            rows += new
            ranks.say(f"{family} {m}x{n}x{k}")
            for launch in dict.fromkeys(row.launch for row in new):
                for row in sorted((row for row in new if row.launch == launch), key=lambda row: row.p50_us):
                    ranks.say(f"  {launch:>5} {row.p50_us:9.1f} us  {row.implementation}")
            if ranks.rank == 0:
                measured, choice_entry = entries_of(family, new, choices)
                merge(output, measured, [choice_entry])
                if not args.no_rows:
                    write_rows(result_path(ranks, f"tune_{family}"), rows)
    ranks.say(f"table: {output}")
    dist.destroy_process_group()
    return 0 if all_correct else 1


if __name__ == "__main__":
    sys.exit(main())
