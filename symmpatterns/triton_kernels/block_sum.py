"""out = the sum over ranks of one block of a product: this rank's, computed here, and the peers', which lie here already.

No flags: whoever launches it has waited for the peers' products. Between the ranks the work of the copy engines is done
by symmpatterns/copy_engine/.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from symmpatterns.triton_kernels._launch import Launcher, repeat
from symmpatterns.triton_kernels._plan import (
    TRITON_DTYPES,
    Plan,
    Scales,
    check_matmul,
    describe,
    sizes,
    spread,
    strides_of,
    tiles_for,
)
from symmpatterns.triton_kernels._sync import await_kernel_before
from symmpatterns.triton_kernels._tiles import finish_tile, round_to, store_tile, tile_position, tile_product
from symmpatterns.triton_kernels._workspace import WorkspaceLike, num_sms

# Multiprocessors that no persistent program occupies, so that a barrier of one warp finds room beside this kernel.
_SPARE_SMS = 4


@triton.jit(do_not_specialize=["M", "rank"])
def block_sum_kernel(
    a, b, bias, scale_a, scale_b, staged, out, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    stride_sa, stride_sb, stride_tr, stride_tm, stride_om, stride_on, rank,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, AVERAGE: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Persistent programs. staged: the block of source s begins s * stride_tr elements in, rows stride_tm apart; None: the
    product alone."""
    await_kernel_before()
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        position_m, position_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        first_m = position_m * BM
        first_n = position_n * BN
        acc = tile_product(
            tl.zeros([BM, BN], tl.float32), a, b, first_m, first_n, 0, M, N, K,
            stride_am, stride_ak, stride_bk, stride_bn, BM, BN, BK, A_DESC, B_DESC,
        )  # fmt: skip
        own = finish_tile(
            acc, bias, scale_a, scale_b, stride_sa, stride_sb, first_m, first_n, M - first_m, N, PARTIAL, BM, BN
        )
        if staged is not None:
            offs_m = first_m + tl.arange(0, BM)
            offs_n = first_n + tl.arange(0, BN)
            mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
            places = staged + offs_m[:, None].to(tl.int64) * stride_tm + offs_n[None, :]
            total = tl.zeros([BM, BN], tl.float32)
            # num_stages=1: the loop over K has the shared memory
            for source in tl.range(0, WORLD_SIZE, num_stages=1):
                if source == rank:
                    total += own.to(tl.float32)
                else:
                    theirs = tl.load(places + tl.cast(source, tl.int64) * stride_tr, mask=mask, other=0.0)
                    total += theirs.to(tl.float32)
            if AVERAGE:
                total = tl.div_rn(total, tl.full([BM, BN], WORLD_SIZE, tl.float32))
            result = round_to(total, out.dtype.element_ty)
        else:
            result = own
        store_tile(out, result, first_m, first_n, M, N, stride_om, stride_on, BM, BN)


@functools.lru_cache(maxsize=4096)
def plan(M: int, dtype: torch.dtype, num_sms: int) -> Plan:
    """The plan for M rows of operands of `dtype`; there is no protocol, so ranks may differ in it."""
    resident = num_sms - _SPARE_SMS if num_sms > 4 * _SPARE_SMS else num_sms
    return Plan(**sizes(M, tiles_for(M, dtype, large=M > 128), lambda rows, BM, BN: (0, 0), programs=resident))


def run(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    scales: Scales,
    staged: torch.Tensor | None,
    out: torch.Tensor,
    workspace: WorkspaceLike,
    op: str = "sum",
    partial: torch.dtype | None = None,
) -> None:
    """out[M, N] = sum (op "avg": mean) over ranks of a block's products, on the current stream.

    This rank's is a[M, K] @ b[K, N] + bias[N], rounded to `partial` (default: out's dtype); rank s's is staged[s], where
    staged [W, M, N] has rows without gaps and this rank's entry is not looked at. With `staged` None, out is the product.
    Otherwise as in `matmul_all_reduce.launch`: the sum runs in rank order, in fp32.
    """

    def first(launcher: Launcher) -> None:
        check_matmul(a, b, bias, out, scales=scales, partial=partial)
        M, K = a.shape
        N = b.shape[1]
        chosen = plan(M, a.dtype, num_sms(a))
        scale_a, scale_b = spread(scales, M, N)
        a_arg, a_desc = describe(a, (chosen.BM, chosen.BK))
        b_arg, b_desc = describe(b, (chosen.BK, chosen.BN))
        tiles = triton.cdiv(M, chosen.BM) * triton.cdiv(N, chosen.BN)
        steps = (0, 0) if staged is None else staged.stride()[:2]
        args = (
            a_arg, b_arg, bias, scale_a, scale_b, staged, out, M, N, K,
            *a.stride(), *b.stride(), *strides_of(scale_a, scale_b), *steps, *out.stride(), workspace.rank,
        )  # fmt: skip
        constants = chosen.constants(workspace.world_size, a_desc, b_desc) | {
            "AVERAGE": op == "avg",
            "PARTIAL": TRITON_DTYPES[partial or out.dtype],
        }
        launcher(block_sum_kernel, min(chosen.programs, tiles), _SOURCES, args, constants)

    repeat(workspace, ("block_sum", op, partial), (a, b, bias, *scales, staged, out), first)


# The parameters that hold operands, as `run` counts them.
_SOURCES = {"a": 0, "b": 1, "bias": 2, "scale_a": 3, "scale_b": 4, "staged": 5, "out": 6}
