"""outs[i] = all_gather(a) @ bs[i] + biases[i], and the gathered matrix if it is wanted.

Every rank stores its shard in the peers' staging memory, piece by piece with a flag each, multiplies its own shard
meanwhile, and then the peers' shards as their pieces arrive. Further matrices `bs` are multiplied with the shards that
lie in the staging memory already. The gathered matrix exists only if the caller wants it.

Why the buffers are never overwritten too early, and why every wait ends, is in docs/memory-ordering.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from symmpatterns.triton_kernels import _plan
from symmpatterns.triton_kernels._launch import Launcher, early, launch_kernel
from symmpatterns.triton_kernels._plan import (
    check_call,
    check_matmul,
    describe,
    run_planned,
    sizes,
    spread,
    strides_of,
    tiles_for,
)
from symmpatterns.triton_kernels._shards import await_block, copy_shards, send_shard
from symmpatterns.triton_kernels._sync import (
    INTERPRETED,
    begin_call,
    count_call,
    half_of_last_call,
    raise_if_interpreted_call_failed,
    staging_of,
)
from symmpatterns.triton_kernels._tiles import finish_tile, store_tile, tile_position, tile_product
from symmpatterns.triton_kernels._workspace import WorkspaceLike, num_sms

# Arguments that differ between ranks or calls and must not give a kernel of their own when they are 1 or 16. (step_o
# and step_g may: whether they are multiples of 16 decides whether stores are vectors.)
_ANY_VALUE = ["shard_m", "step_s", "rank", "site", "timeout_ns"]


@triton.jit(do_not_specialize=_ANY_VALUE)
def gather_rows_kernel(
    a_desc, a, b, bias, scale_a, scale_b, out, gathered, staging_ptrs, flag_ptrs, state_ptr,
    shard_m, step_o, step_g, step_s, N, K, row_elements, stride_am, stride_ak, stride_bk, stride_bn,
    stride_om, stride_on, stride_gm, stride_gk, stride_sa, stride_sb, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, PIECES: tl.constexpr, SENDERS: tl.constexpr, EXCHANGE: tl.constexpr,
):  # fmt: skip
    """Persistent programs, all resident at once. Shard s makes the rows of out that begin s * step_o elements in, and
    whose scales begin at scale_a[s * step_s].

    EXCHANGE: send the shard and wait for the peers'; otherwise the call before this one did it, and its shards are
    still where they were, because no peer begins the next but one call before this rank begins the next.
    SENDERS: 0, every program sends its part of the shard and then multiplies; or so many programs only send.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    senders = programs if SENDERS == 0 else SENDERS
    blocks = tl.cdiv(shard_m, BM)
    tiles_n = tl.cdiv(N, BN)
    chunk = blocks * tiles_n  # tiles of a shard
    if EXCHANGE:
        ticket, half = begin_call(state_ptr, site)
        if program < senders:
            send_shard(
                a, staging_ptrs, flag_ptrs, half, rank, program, senders, shard_m, K, row_elements,
                stride_am, stride_ak, ticket, WORLD_SIZE, BM, BK, PIECES, False,
            )  # fmt: skip
    else:
        half = half_of_last_call(state_ptr)

    staging = staging_of(staging_ptrs, half, rank, WORLD_SIZE, a.dtype.element_ty)
    if program >= SENDERS:
        worker = program - SENDERS
        workers = programs - SENDERS
        for tile in tl.range(worker, chunk, workers):
            position_m, position_n = tile_position(tile, blocks, tiles_n, GROUP_M)
            first_m = position_m * BM
            first_n = position_n * BN
            acc = tile_product(
                tl.zeros([BM, BN], tl.float32), a_desc, b, first_m, first_n, 0, shard_m, N, K,
                stride_am, stride_ak, stride_bk, stride_bn, BM, BN, BK, A_DESC, B_DESC,
            )  # fmt: skip
            result = finish_tile(
                acc, bias, scale_a, scale_b, stride_sa, stride_sb, rank * step_s + first_m, first_n, shard_m - first_m, N,
                out.dtype.element_ty, BM, BN,
            )  # fmt: skip
            own = out + tl.cast(rank, tl.int64) * step_o
            store_tile(own, result, first_m, first_n, shard_m, N, stride_om, stride_on, BM, BN)
        # The peers' tiles go on where this worker's turn in the own ones ended.
        first_step = worker + tl.cdiv(max(chunk - worker, 0), workers) * workers
        for step in tl.range(first_step, chunk * WORLD_SIZE, workers):
            source = (rank + step // chunk) % WORLD_SIZE
            position_m, position_n = tile_position(step % chunk, blocks, tiles_n, GROUP_M)
            first_m = position_m * BM
            first_n = position_n * BN
            if EXCHANGE:
                await_block(
                    flag_ptrs, state_ptr, half, rank, source, position_m, blocks, ticket, timeout_ns, WORLD_SIZE,
                    PIECES,
                )  # fmt: skip
            # By pointers: TMA would read what the peers stored through another proxy, which needs one more fence.
            shard = tl.multiple_of(staging + (source * shard_m).to(tl.int64) * row_elements, 16)
            acc = tile_product(
                tl.zeros([BM, BN], tl.float32), shard, b, first_m, first_n, 0, shard_m, N, K,
                row_elements, 1, stride_bk, stride_bn, BM, BN, BK, "", B_DESC,
            )  # fmt: skip
            result = finish_tile(
                acc, bias, scale_a, scale_b, stride_sa, stride_sb, source * step_s + first_m, first_n,
                shard_m - first_m, N, out.dtype.element_ty, BM, BN,
            )  # fmt: skip
            theirs = out + source.to(tl.int64) * step_o
            store_tile(theirs, result, first_m, first_n, shard_m, N, stride_om, stride_on, BM, BN)

    if EXCHANGE:
        if gathered is not None:
            if program < senders:
                copy_shards(
                    a, gathered, staging, flag_ptrs, state_ptr, half, rank, program, senders, shard_m, step_g, K,
                    row_elements, stride_am, stride_ak, stride_gm, stride_gk, ticket, timeout_ns,
                    WORLD_SIZE, BM, BK, PIECES,
                )  # fmt: skip
        count_call(state_ptr, ticket, programs)


@triton.jit(do_not_specialize=_ANY_VALUE)
def gather_columns_kernel(
    a_desc, a, b, bias, scale_a, scale_b, out, gathered, staging_ptrs, flag_ptrs, state_ptr,
    shard_m, step_o, step_g, step_s, N, K, row_elements, stride_am, stride_ak, stride_bk, stride_bn,
    stride_om, stride_on, stride_gm, stride_gk, stride_sa, stride_sb, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, PIECES: tl.constexpr, SENDERS: tl.constexpr, EXCHANGE: tl.constexpr,
):  # fmt: skip
    """As gather_rows_kernel, but shard s is columns s K ... of the gathered matrix and meets rows s K ... of b.

    The products are added in rank order on every rank, not with the own shard first: ranks that multiply with the same
    b get the same bits. The own shard is read from the staging memory too, so that there is one loop over K: two would
    need twice the shared memory.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    senders = programs if SENDERS == 0 else SENDERS
    blocks = tl.cdiv(shard_m, BM)
    tiles_n = tl.cdiv(N, BN)
    if EXCHANGE:
        ticket, half = begin_call(state_ptr, site)
        if program < senders:
            send_shard(
                a, staging_ptrs, flag_ptrs, half, rank, program, senders, shard_m, K, row_elements,
                stride_am, stride_ak, ticket, WORLD_SIZE, BM, BK, PIECES, True,
            )  # fmt: skip
    else:
        half = half_of_last_call(state_ptr)

    staging = staging_of(staging_ptrs, half, rank, WORLD_SIZE, a.dtype.element_ty)
    if program >= SENDERS:
        for tile in tl.range(program - SENDERS, blocks * tiles_n, programs - SENDERS):
            position_m, position_n = tile_position(tile, blocks, tiles_n, GROUP_M)
            first_m = position_m * BM
            first_n = position_n * BN
            acc = tl.zeros([BM, BN], tl.float32)
            for source in tl.range(0, WORLD_SIZE, num_stages=1):
                first_k = source * K
                if EXCHANGE:
                    await_block(
                        flag_ptrs, state_ptr, half, rank, source, position_m, blocks, ticket, timeout_ns,
                        WORLD_SIZE, PIECES,
                    )  # fmt: skip
                shard = tl.multiple_of(staging + tl.cast(source * shard_m, tl.int64) * row_elements, 16)
                acc = tile_product(
                    acc, shard, b, first_m, first_n, first_k, shard_m, N, K,
                    row_elements, 1, stride_bk, stride_bn, BM, BN, BK, "", B_DESC,
                )  # fmt: skip
            result = finish_tile(
                acc, bias, scale_a, scale_b, stride_sa, stride_sb, first_m, first_n, shard_m - first_m, N,
                out.dtype.element_ty, BM, BN,
            )  # fmt: skip
            store_tile(out, result, first_m, first_n, shard_m, N, stride_om, stride_on, BM, BN)

    if EXCHANGE:
        if gathered is not None:
            if program < senders:
                copy_shards(
                    a, gathered, staging, flag_ptrs, state_ptr, half, rank, program, senders, shard_m, step_g, K,
                    row_elements, stride_am, stride_ak, stride_gm, stride_gk, ticket, timeout_ns,
                    WORLD_SIZE, BM, BK, PIECES,
                )  # fmt: skip
        count_call(state_ptr, ticket, programs)


# --- host side ----------------------------------------------------------------------------------------------------

# From this size of a shard on, 16 programs that only send keep the link busy while the others multiply; below, the
# quickest is that all programs send at once.
_SENDERS_BYTES = 4 << 20
_SENDERS = 16
_MAX_PIECES = 8


@dataclass(frozen=True, kw_only=True)
class Plan(_plan.Plan):
    """As every plan (`rows` are rows of every shard), and

    gather_dim  0: the shards are rows of the gathered matrix; 1: columns
    senders     the first so many of the programs only send; 0: all send and multiply
    pieces      a block of BM rows of a shard is sent in so many pieces along K, by as many programs
    """

    gather_dim: int
    senders: int
    pieces: int


def _row_elements(K: int, dtype: torch.dtype) -> int:
    """Elements from one staged row to the next: every row starts at a multiple of 16 bytes."""
    step = 16 // dtype.itemsize
    return triton.cdiv(K, step) * step


def plan(
    shard_m: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    world_size: int,
    num_sms: int,
    *,
    gather_dim: int = 0,
    pieces: int | None = None,
    senders: int | None = None,
    **overrides: Any,
) -> Plan:
    """The plan for all_gather(a[shard_m, K]) @ b (N: columns of the widest b); a function of its arguments alone.

    `num_sms` must be that of the smallest GPU of the group. What is given by keyword, here or for `_plan.sizes`,
    overrides the table. Raises ValueError for a plan that cannot run, TypeError for a dtype the kernels do not take.
    """
    if gather_dim not in (0, 1):
        raise ValueError(f"gather_dim must be 0 or 1, not {gather_dim}")
    table = tiles_for(shard_m, dtype, large=shard_m > 128)
    BM, _, BK = overrides.get("tile") or table[:3]
    blocks = max(triton.cdiv(shard_m, BM), 1)
    parts = pieces or max(1, min(_MAX_PIECES, num_sms // blocks, triton.cdiv(K, BK)))
    if senders is None:
        is_large = shard_m * K * dtype.itemsize >= _SENDERS_BYTES and num_sms >= 4 * _SENDERS
        senders = _SENDERS if is_large and not INTERPRETED else 0

    def needs(rows: int, BM: int, BN: int) -> tuple[int, int]:
        """(bytes of staging, flags): all shards, and a flag for each source, block of rows and piece."""
        staged = world_size * rows * _row_elements(K, dtype) * dtype.itemsize
        return staged, world_size * triton.cdiv(rows, BM) * parts

    common = sizes(shard_m, table, needs, programs=num_sms, **overrides)
    return Plan(gather_dim=gather_dim, senders=senders, pieces=parts, **common)


def launch(
    a: torch.Tensor,
    bs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None,
    outs: Sequence[torch.Tensor],
    gathered: torch.Tensor | None = None,
    *,
    staging_ptrs: torch.Tensor,
    flag_ptrs: torch.Tensor,
    state: torch.Tensor,
    rank: int,
    world_size: int,
    plan: Plan,
    timeout_s: float,
    site: int = 0,
    scale_a: torch.Tensor | None = None,
    scale_bs: Sequence[torch.Tensor | None] | None = None,
    launcher: Launcher = launch_kernel,
) -> None:
    """outs[i] = all_gather(a) @ bs[i] + biases[i], and gathered = all_gather(a), on the current stream.

    a [m, K]; gather_dim 0: gathered [W m, K], bs[i] [K, N_i], outs[i] [W m, N_i]; gather_dim 1: gathered [m, W K],
    bs[i] [W K, N_i], outs[i] [m, N_i]; biases[i] [N_i] contiguous or None, gathered may be None. All of any strides,
    not overlapping. float8 operands have scales, `scale_a` those of the gathered matrix. The rest is as in
    `matmul_all_reduce.launch`, without batches.
    """
    biases = [None] * len(bs) if biases is None else biases
    scale_bs = [None] * len(bs) if scale_bs is None else scale_bs
    if not bs or not len(bs) == len(outs) == len(biases) == len(scale_bs):
        raise ValueError(
            f"{len(bs)} matrices, {len(outs)} outputs, {len(biases)} biases and {len(scale_bs)} scales do not belong "
            "together"
        )
    shard_m, K = a.shape
    by_rows = plan.gather_dim == 0
    whole = (world_size * shard_m, K) if by_rows else (shard_m, world_size * K)
    for b, bias, out, scale_b in zip(bs, biases, outs, scale_bs):
        check_matmul(a, b, bias, out, shape=whole, scales=(scale_a, scale_b))
    if gathered is not None and (gathered.shape != whole or gathered.dtype != a.dtype or gathered.device != a.device):
        raise ValueError(
            f"gathered is {list(gathered.shape)} {gathered.dtype} on {gathered.device}, "
            f"the gathered matrix {list(whole)} {a.dtype} on {a.device}"
        )
    check_call(plan)
    if not 0 <= plan.senders < plan.programs:
        raise ValueError(f"{plan.senders} of {plan.programs} programs only send: none is left to multiply")
    kernel = gather_rows_kernel if by_rows else gather_columns_kernel
    # A call must hear from every rank: one that multiplies nothing and copies nothing would not.
    products = [product for product in zip(bs, biases, outs, range(len(bs))) if product[0].shape[1] > 0]
    if not products and gathered is not None:
        products = [(bs[0], biases[0], outs[0], 0)]
    b_allowed = plan.use_tma and (by_rows or K % plan.BK == 0)  # see tile_product
    operands = [describe(b, (plan.BK, plan.BN), allowed=b_allowed) for b, _, _, _ in products]
    for start in range(0, shard_m, plan.rows):
        a_rows = a[start : start + plan.rows]
        rows = a_rows.shape[0]
        blocks = triton.cdiv(rows, plan.BM)
        a_arg, a_desc = describe(a_rows, (plan.BM, plan.BK), allowed=plan.use_tma and by_rows)
        for i, ((b, bias, out, index), (b_arg, b_desc)) in enumerate(zip(products, operands)):
            row_scales, scale_b = spread((scale_a, scale_bs[index]), whole[0], b.shape[1])
            exchange = i == 0  # the others find the shards in the staging memory
            copy = gathered[start:] if gathered is not None and exchange else None
            step_g = 0 if copy is None else shard_m * copy.stride(0) if by_rows else K * copy.stride(1)
            senders = plan.senders if exchange else 0
            work = blocks * max(plan.pieces, world_size * triton.cdiv(b.shape[1], plan.BN))
            args = (
                a_arg, a_rows, b_arg, bias, None if row_scales is None else row_scales[start:], scale_b, out[start:], copy,
                staging_ptrs, flag_ptrs, state,
                rows, shard_m * out.stride(0), step_g, shard_m, b.shape[1], K, _row_elements(K, a.dtype),
                *a.stride(), *b.stride(), *out.stride(), *((0, 0) if copy is None else copy.stride()),
                *strides_of(row_scales, scale_b), rank, site, int(timeout_s * 1e9),
            )  # fmt: skip
            constants = plan.constants(world_size, a_desc, b_desc)
            constants |= {"PIECES": plan.pieces, "SENDERS": senders, "EXCHANGE": exchange, **early(state, a.nbytes)}
            launcher(kernel, min(plan.programs, work + senders), _sources(index, len(bs)), args, constants)
            raise_if_interpreted_call_failed(state, rank)


def _sources(index: int, count: int) -> dict[str, int]:
    """The parameters that hold operands, as `run` counts them, when product `index` of `count` is computed."""
    first = 2 + index
    return {
        "a_desc": 0, "a": 0, "gathered": 1, "b": first, "bias": first + count, "out": first + 2 * count,
        "scale_b": first + 3 * count, "scale_a": 2 + 4 * count,
    }  # fmt: skip


_cached_plan = functools.lru_cache(maxsize=4096)(plan)


def run(
    a: torch.Tensor,
    bs: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    gathered: torch.Tensor | None,
    workspace: WorkspaceLike,
    gather_dim: int = 0,
    biases: Sequence[torch.Tensor | None] | None = None,
    scale_a: torch.Tensor | None = None,
    scale_bs: Sequence[torch.Tensor | None] | None = None,
    **overrides: Any,
) -> None:
    """`launch` with the table's plan, or what `overrides` make of it, on a workspace; see `run_planned`."""

    def choose() -> Plan:
        widest = max(b.shape[1] for b in bs)
        return _cached_plan(
            a.shape[0],
            widest,
            a.shape[1],
            a.dtype,
            workspace.world_size,
            num_sms(a),
            gather_dim=gather_dim,
            **overrides,
        )

    nothing = [None] * len(bs)
    operands = (a, gathered, *bs, *(biases or nothing), *outs, *(scale_bs or nothing), scale_a)
    start = functools.partial(launch, a, bs, biases, outs, gathered, scale_a=scale_a, scale_bs=scale_bs)
    options = gather_dim, len(bs), *overrides.items()
    run_planned(workspace, "all_gather_matmul", options, operands, choose, start)
