"""matmul -> all-reduce: the fused operator against its alternatives, on CPU processes or on GPUs.

    python -m symmpatterns bench --ranks 2            (or: make bench RANKS=2)

Implementations
    fused                     torch.ops.symmpatterns.matmul_all_reduce
    fused, interpreted        the same with the Triton kernels in Triton's interpreter (CPU, --interpreter; slow)
    mm + gloo | mm + nccl     torch.mm, then torch.distributed.all_reduce
    mm + symm_mem one-shot    torch.mm into symmetric memory, then torch.ops.symm_mem.one_shot_all_reduce (CUDA)
    mm + symm_mem two-shot    the same with two_shot_all_reduce_ (CUDA)
    mm alone                  no communication: the limit

Every result is checked against float64 first. Rows go to bench/results/matmul_all_reduce-<device>-w<ranks>.csv, a plot
beside them. Exit code 1 if any implementation was wrong; it gets no row.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
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
from _plot import plot
from torch import Tensor

import symmpatterns

NAME = "matmul_all_reduce"
CPU_SHAPES = [(m, n, n) for n in (256, 1024) for m in (1, 16, 64, 256, 1024)]
CUDA_SHAPES = [
    *((m, 8192, 4096) for m in (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)),
    *((m, 8192, 14336) for m in (16, 4096)),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="MxNxK", help="K is each rank's share (default: a grid)")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), help="default: float32 bfloat16; CUDA: bfloat16")
    parser.add_argument("--rounds", type=int, default=21, help="samples of each implementation")
    parser.add_argument("--interpreter", action="store_true", help="also the Triton kernels in Triton's interpreter")
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser.parse_args(argv)


def make_case(ranks: Ranks, m: int, n: int, k: int, dtype: torch.dtype, interpreter: bool) -> Case:
    """Random operands and everything that multiplies and reduces them."""
    product = Product.random(ranks, m, n, k, dtype)
    a, b = product.a, product.b
    group = dist.group.WORLD
    assert group is not None

    def collective() -> Tensor:
        partial = product.run()
        dist.all_reduce(partial)
        return partial

    def fused() -> Tensor:
        result: Tensor = torch.ops.symmpatterns.matmul_all_reduce(a, b, "sum", group.group_name, **product.scales)
        return result

    def interpreted() -> Tensor:
        with symmpatterns.config.patch(host_kernels="triton"):
            return fused()

    exact = product.exact()
    dist.all_reduce(exact)
    case = Case(m, n, k, dtype, exact, reference=collective(), operands=(a, b))
    case.implementations.append(Implementation("fused", fused))
    if interpreter:
        case.implementations.append(Implementation("fused, interpreted", interpreted))
    case.implementations.append(Implementation(f"mm + {dist.get_backend()}", collective))
    if ranks.device.type == "cuda":
        case.implementations += _symm_mem_operators(product, group)
    case.implementations.append(Implementation(LIMIT, product.run, is_limit=True))
    return case


def _symm_mem_operators(product: Product, group: dist.ProcessGroup) -> list[Implementation]:
    """torch's own one-shot and two-shot all-reduce, which read the product from symmetric memory."""
    import torch.distributed._symmetric_memory as symm_mem

    a = product.a
    staging = symm_mem.empty(a.shape[0], product.b.shape[1], dtype=product.out_dtype, device=a.device)
    symm_mem.rendezvous(staging, group)

    def one_shot() -> Tensor:
        product.run(out=staging)
        result: Tensor = torch.ops.symm_mem.one_shot_all_reduce(staging, "sum", group.group_name)
        return result

    def two_shot() -> Tensor:
        product.run(out=staging)
        result: Tensor = torch.ops.symm_mem.two_shot_all_reduce_(staging, "sum", group.group_name)
        return result

    return [Implementation("mm + symm_mem one-shot", one_shot), Implementation("mm + symm_mem two-shot", two_shot)]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    ranks = start_ranks()
    on_gpu = ranks.device.type == "cuda"
    if args.interpreter and (on_gpu or os.environ.get("TRITON_INTERPRET") != "1"):
        sys.exit("--interpreter measures the Triton kernels on CPU: set TRITON_INTERPRET=1 in the environment")
    shapes = shapes_of(args.shapes, CUDA_SHAPES if on_gpu else CPU_SHAPES)
    dtypes = args.dtypes or (["bfloat16"] if on_gpu else ["float32", "bfloat16"])
    launches = ["eager", "graph"] if on_gpu else ["eager"]
    ranks.say(f"{NAME} on {ranks.world_size} ranks, {device_name(ranks.device)}, torch {torch.__version__}")
    rows: list[Row] = []
    all_correct = True
    for dtype in dtypes:
        for m, n, k in shapes:
            case = make_case(ranks, m, n, k, DTYPES[dtype], args.interpreter)
            new, correct = rows_of(ranks, NAME, case, launches, args.rounds)
            all_correct &= correct
            rows += new
            show(ranks, new)
    if ranks.rank == 0 and rows and not args.no_save:
        path = result_path(ranks, NAME)
        write_rows(path, rows)
        print(f"rows: {path}")
        picture = path.with_suffix(".png")
        title = f"matmul -> all-reduce, {ranks.world_size} ranks, {device_name(ranks.device)}"
        drawn = plot(picture, rows, title)
        print(f"plot: {picture}" if drawn else "no plot: matplotlib is not installed")
    dist.destroy_process_group()
    return 0 if all_correct else 1


if __name__ == "__main__":
    sys.exit(main())
