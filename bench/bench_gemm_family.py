"""matmul -> reduce-scatter and all-gather -> matmul: the fused operators against their alternatives.

    python -m torch.distributed.run --standalone --nproc-per-node 2 bench/bench_gemm_family.py

Implementations
    fused                  torch.ops.symmpatterns.matmul_reduce_scatter, torch.ops.symmpatterns.all_gather_matmul
    mm + gloo | nccl       torch.mm and the process group's collective
    symm_mem fused         torch.ops.symm_mem.fused_matmul_reduce_scatter, fused_all_gather_matmul (CUDA)
    mm alone               no communication: the limit

M, N and K are those of a rank's matmul: M is the rows of the whole product. Rows go to
bench/results/matmul_reduce_scatter-<device>-w<ranks>.csv and all_gather_matmul-<device>-w<ranks>.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory  # registers torch.ops.symm_mem.fused_*
from _common import (
    DTYPES,
    LIMIT,
    Case,
    Implementation,
    Product,
    Ranks,
    Row,
    device_name,
    result_path,
    rows_of,
    shapes_of,
    show,
    start_ranks,
    write_rows,
)
from torch import Tensor

import symmpatterns  # noqa: F401  (registers the operators)

CPU_SHAPES = [(m, n, n) for n in (256, 1024) for m in (16, 256, 1024)]
# Llama-3.1 70B over two ranks: attention-out and down projections (reduce-scatter), QKV and gate-up (gather)
CUDA_SHAPES = {
    "matmul_reduce_scatter": [*((m, 8192, 4096) for m in (256, 1024, 4096, 8192)), (4096, 8192, 14336)],
    "all_gather_matmul": [*((m, 5120, 8192) for m in (256, 1024, 4096, 8192)), (4096, 28672, 8192)],
}


def reduce_scatter_case(ranks: Ranks, m: int, n: int, k: int, dtype: torch.dtype) -> Case:
    """[m, k] @ [k, n] on every rank, summed, rows scattered."""
    product = Product.random(ranks, m, n, k, dtype)
    a, b, scales = product.a, product.b, product.scales
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    ours, theirs = torch.ops.symmpatterns, torch.ops.symm_mem

    def collective() -> Tensor:
        out = a.new_empty(m // ranks.world_size, n, dtype=product.out_dtype)
        dist.reduce_scatter_tensor(out, product.run())
        return out

    def upstream() -> Tensor:
        if not scales:
            result: Tensor = theirs.fused_matmul_reduce_scatter(a, b, "sum", 0, name)
        else:
            result = theirs.fused_scaled_matmul_reduce_scatter(
                a, b, *scales.values(), "sum", 0, 0, name, [m, n], out_dtype=product.out_dtype
            )
        return result

    exact = product.exact()
    dist.all_reduce(exact)
    own = exact.chunk(ranks.world_size)[ranks.rank]
    case = Case(m, n, k, dtype, own, collective(), same_on_all_ranks=False, operands=(a, b))
    runs: dict[str, Callable[[], Tensor]] = {
        "fused": lambda: ours.matmul_reduce_scatter(a, b, "sum", 0, name, **scales),
        f"mm + {dist.get_backend()}": collective,
    }
    if ranks.device.type == "cuda":
        runs["symm_mem fused"] = upstream
    case.implementations = [Implementation(key, run) for key, run in runs.items()]
    case.implementations.append(Implementation(LIMIT, product.run, is_limit=True))
    return case


def all_gather_case(ranks: Ranks, m: int, n: int, k: int, dtype: torch.dtype) -> Case:
    """m / W rows of every rank gathered, then [m, k] @ [k, n]."""
    own = Product.random(ranks, m // ranks.world_size, n, k, dtype)
    shard, b, scales = own.a, own.b, own.scales
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    ours, theirs = torch.ops.symmpatterns, torch.ops.symm_mem

    def gather() -> Tensor:
        full = shard.new_empty(m, k)
        # As bytes: not every backend knows float8.
        dist.all_gather_into_tensor(
            *((full, shard) if not scales else (full.view(torch.uint8), shard.view(torch.uint8)))
        )
        return full

    def fused() -> Tensor:
        options = {"scale_a": scales["scale_a"], "scale_bs": [scales["scale_b"]]} if scales else {}
        result: Tensor = ours.all_gather_matmul(shard, [b], 0, name, False, **options)[1][0]
        return result

    def upstream() -> Tensor:
        if not scales:
            result: Tensor = theirs.fused_all_gather_matmul(shard, [b], 0, name)[1][0]
        else:
            result = theirs.fused_all_gather_scaled_matmul(
                shard, [b], scales["scale_a"], [scales["scale_b"]], 0, name, [None], [None], [own.out_dtype], [False]
            )[1][0]
        return result

    whole = own.with_a(gather())
    case = Case(m, n, k, dtype, whole.exact(), whole.run(), same_on_all_ranks=False, operands=(shard, b))
    runs: dict[str, Callable[[], Tensor]] = {
        "fused": fused,
        f"mm + {dist.get_backend()}": lambda: own.with_a(gather()).run(),
    }
    if ranks.device.type == "cuda":
        runs["symm_mem fused"] = upstream
    case.implementations = [Implementation(key, run) for key, run in runs.items()]
    case.implementations.append(Implementation(LIMIT, whole.run, is_limit=True))
    return case


CASES = {"matmul_reduce_scatter": reduce_scatter_case, "all_gather_matmul": all_gather_case}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--shapes", nargs="+", metavar="MxNxK", help="of a rank's matmul (default: a grid)")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=21, help="samples of each implementation")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    ranks = start_ranks()
    on_gpu = ranks.device.type == "cuda"
    all_correct = True
    for family in args.families:
        ranks.say(f"{family} on {ranks.world_size} ranks, {device_name(ranks.device)}, torch {torch.__version__}")
        rows: list[Row] = []
        for dtype in args.dtypes:
            for m, n, k in shapes_of(args.shapes, CUDA_SHAPES[family] if on_gpu else CPU_SHAPES):
                case = CASES[family](ranks, m, n, k, DTYPES[dtype])
                new, correct = rows_of(ranks, family, case, ["eager", "graph"] if on_gpu else ["eager"], args.rounds)
                all_correct &= correct
                rows += new
                show(ranks, new)
        if ranks.rank == 0 and rows and not args.no_save:
            path = result_path(ranks, family)
            write_rows(path, rows)
            print(f"rows: {path}")
    dist.destroy_process_group()
    return 0 if all_correct else 1


if __name__ == "__main__":
    sys.exit(main())
