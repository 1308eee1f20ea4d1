"""outs[i] = all_gather(a) @ bs[i] + biases[i], the gather along dimension 0, and the gathered matrix if it is wanted.

Every rank stores its shard in the peers' staging memory, piece by piece with a flag each, multiplies its own shard
meanwhile, and then the peers' shards as their pieces arrive. Further matrices `bs` are multiplied with the shards that
lie in the staging memory already. The gathered matrix exists only if the caller wants it.

Why the buffers are never overwritten too early, and why every wait ends, is in docs/memory-ordering.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from symmpatterns.triton_kernels._sync import (
    INTERPRETED,
    await_flag,
    begin_call,
    end_call,
    last_call,
    publish_to_peers,
    raise_if_interpreted_call_failed,
    staging_of,
)
from symmpatterns.triton_kernels._tiles import (
    GROUP_M,
    add_bias,
    check_matmul,
    describe,
    fitting_rows,
    round_to,
    store_tile,
    tile_position,
    tile_product,
    tiles_for,
)
from symmpatterns.triton_kernels._workspace import WorkspaceLike, launch_arguments, num_sms, timeouts_named


@triton.jit
def send_piece(
    a, staging_ptrs, half, rank, first_m, shard_m, first_k, end_k, row_elements, stride_am, stride_ak,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Stores rows first_m ... of columns first_k to end_k of the own shard at every peer; publish the piece afterwards.

    Shard s lies in the staging memory as rows of row_elements elements from row s * shard_m on.
    """
    offs_m = first_m + tl.arange(0, BM)
    there = (rank * shard_m + offs_m).to(tl.int64)[:, None] * row_elements
    for k in tl.range(first_k, end_k, BK, num_stages=1):
        offs_k = k + tl.arange(0, BK)
        mask = (offs_m[:, None] < shard_m) & (offs_k[None, :] < end_k)
        block = tl.load(
            a + offs_m[:, None].to(tl.int64) * stride_am + offs_k[None, :].to(tl.int64) * stride_ak, mask=mask
        )
        for distance in tl.range(1, WORLD_SIZE, num_stages=1):
            peer = (rank + distance) % WORLD_SIZE
            staging = staging_of(staging_ptrs, half, peer, WORLD_SIZE, block.dtype)
            tl.store(staging + there + offs_k[None, :], block, mask=mask)


@triton.jit
def copy_block(
    source, target, first_m, rows, K, row_elements, stride_sk, stride_m, stride_k, BM: tl.constexpr, BK: tl.constexpr
):
    """target[first_m : first_m + BM, :K] = the same rows of source, as far as `rows` reaches."""
    offs_m = first_m + tl.arange(0, BM)
    for k in tl.range(0, K, BK, num_stages=1):
        offs_k = k + tl.arange(0, BK)
        mask = (offs_m[:, None] < rows) & (offs_k[None, :] < K)
        here = offs_m[:, None].to(tl.int64) * row_elements + offs_k[None, :].to(tl.int64) * stride_sk
        block = tl.load(source + here, mask=mask, cache_modifier=".cg")
        there = offs_m[:, None].to(tl.int64) * stride_m + offs_k[None, :].to(tl.int64) * stride_k
        tl.store(target + there, block, mask=mask)


@triton.jit
def await_block(
    flag_ptrs, state_ptr, half, rank, source, first_flag, epoch, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Returns when all pieces of one block of rows of `source`'s shard have arrived."""
    for piece in tl.range(0, PIECES, num_stages=1):
        await_flag(flag_ptrs, half, rank, source, first_flag + piece, epoch, state_ptr, site, timeout_ns, WORLD_SIZE)


@triton.jit(do_not_specialize=["shard_m", "step_m", "rank", "site", "timeout_ns"])
def all_gather_matmul_kernel(
    a_desc, a, b, bias, out, gathered, staging_ptrs, flag_ptrs, state_ptr, shard_m, step_m, N, K, row_elements,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, stride_gm, stride_gk, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, PIECES: tl.constexpr, SENDERS: tl.constexpr, EXCHANGE: tl.constexpr,
):  # fmt: skip
    """Persistent programs, all resident at once. Shard s becomes rows s step_m ... of out and gathered.

    EXCHANGE: send the shard and wait for the peers'; otherwise the call before this one did it, and its shards are
    still where they were, because no peer begins the next but one call before this rank begins the next.
    SENDERS: 0, every program sends its part of the shard and then multiplies; or so many programs only send.
    A flag for each source, block of BM rows and piece of K.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    blocks = tl.cdiv(shard_m, BM)
    tiles_n = tl.cdiv(N, BN)
    chunk = blocks * tiles_n  # tiles of a shard
    if EXCHANGE:
        epoch, half = begin_call(state_ptr)
        senders = SENDERS if SENDERS > 0 else programs
        if program < senders:
            piece_k = tl.cdiv(tl.cdiv(K, PIECES), BK) * BK
            for step in tl.range(program, blocks * PIECES, senders, num_stages=1):
                first_k = (step % PIECES) * piece_k
                send_piece(
                    a, staging_ptrs, half, rank, (step // PIECES) * BM, shard_m, first_k, min(first_k + piece_k, K),
                    row_elements, stride_am, stride_ak, WORLD_SIZE, BM, BK,
                )  # fmt: skip
                flag = rank * blocks * PIECES + step
                publish_to_peers(flag_ptrs, half, rank, flag, epoch, WORLD_SIZE)
    else:
        epoch, half = last_call(state_ptr)

    staging = staging_of(staging_ptrs, half, rank, WORLD_SIZE, out.dtype.element_ty)
    if program >= SENDERS:
        worker = program - SENDERS
        workers = programs - SENDERS
        for tile in tl.range(worker, chunk, workers):
            position_m, position_n = tile_position(tile, blocks, tiles_n, GROUP_M)
            first_m = position_m * BM
            first_n = position_n * BN
            acc = tile_product(
                a_desc, b, first_m, first_n, shard_m, N, K, stride_am, stride_ak, stride_bk, stride_bn,
                BM, BN, BK, A_DESC, B_DESC,
            )  # fmt: skip
            result = round_to(add_bias(acc, bias, first_n, N, BN), out.dtype.element_ty)
            own = out + (rank * step_m).to(tl.int64) * stride_om
            store_tile(own, result, first_m, first_n, shard_m, N, stride_om, stride_on, BM, BN)
        # The peers' tiles go on where this worker's turn in the own ones ended.
        first_step = worker + tl.cdiv(max(chunk - worker, 0), workers) * workers
        for step in tl.range(first_step, chunk * WORLD_SIZE, workers):
            source = (rank + step // chunk) % WORLD_SIZE
            position_m, position_n = tile_position(step % chunk, blocks, tiles_n, GROUP_M)
            first_m = position_m * BM
            first_n = position_n * BN
            if EXCHANGE:
                first_flag = (source * blocks + position_m) * PIECES
                await_block(
                    flag_ptrs, state_ptr, half, rank, source, first_flag, epoch, site, timeout_ns, WORLD_SIZE, PIECES
                )
            # By pointers: TMA would read what the peers stored through another proxy, which needs one more fence.
            shard = tl.multiple_of(staging + (source * shard_m).to(tl.int64) * row_elements, 16)
            acc = tile_product(
                shard, b, first_m, first_n, shard_m, N, K, row_elements, 1, stride_bk, stride_bn,
                BM, BN, BK, "", B_DESC,
            )  # fmt: skip
            result = round_to(add_bias(acc, bias, first_n, N, BN), out.dtype.element_ty)
            theirs = out + (source * step_m).to(tl.int64) * stride_om
            store_tile(theirs, result, first_m, first_n, shard_m, N, stride_om, stride_on, BM, BN)

    if EXCHANGE:
        if gathered is not None:
            if program < senders:
                for step in tl.range(program, blocks * WORLD_SIZE, senders, num_stages=1):
                    source = (rank + step // blocks) % WORLD_SIZE
                    block = step % blocks
                    target = gathered + (source * step_m).to(tl.int64) * stride_gm
                    if source == rank:
                        copy_block(
                            a, target, block * BM, shard_m, K, stride_am, stride_ak, stride_gm, stride_gk, BM, BK
                        )
                    else:
                        first_flag = (source * blocks + block) * PIECES
                        await_block(
                            flag_ptrs, state_ptr, half, rank, source, first_flag, epoch, site, timeout_ns, WORLD_SIZE,
                            PIECES,
                        )  # fmt: skip
                        shard = staging + (source * shard_m).to(tl.int64) * row_elements
                        copy_block(shard, target, block * BM, shard_m, K, row_elements, 1, stride_gm, stride_gk, BM, BK)
        end_call(state_ptr, epoch, programs)


# --- host side ----------------------------------------------------------------------------------------------------

# From this size of a shard on, 16 programs that only send keep the link busy while the others multiply; below, the
# quickest is that all programs send at once.
_SENDERS_BYTES = 4 << 20
_SENDERS = 16
_MAX_PIECES = 8


@dataclass(frozen=True)
class Plan:
    """How one shape is computed; must be equal on all ranks of the group.

    BM, BN, BK     tile of the output and step along K, in elements
    programs       size of the grid, at most what is resident at once
    senders        the first so many of these programs only send; 0: all send and multiply
    pieces         a block of BM rows of a shard is sent in so many pieces along K, by as many programs
    rows           a launch gathers so many rows of every shard at a time, each time as one call of the protocol
    staging_bytes  of one half of the workspace; flags: of one half. Reserve both before the launch.
    use_tma        read operands by TMA where their strides allow it
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    programs: int
    senders: int
    pieces: int
    rows: int
    staging_bytes: int
    flags: int
    use_tma: bool


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
    tile: tuple[int, int, int] | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    pieces: int | None = None,
    senders: int | None = None,
    rows: int | None = None,
    use_tma: bool = True,
) -> Plan:
    """The plan for all_gather(a[shard_m, K]) @ b[K, N] (N of the widest b); a function of its arguments alone.

    `num_sms` must be that of the smallest GPU of the group. What is given by keyword overrides the table. Raises
    ValueError for a plan that cannot run, TypeError for a dtype the kernels do not take.
    """
    BM, BN, BK, table_warps, table_stages = tiles_for(shard_m, dtype, large=shard_m > 128)
    if tile is not None:
        BM, BN, BK = tile
    blocks = max(triton.cdiv(shard_m, BM), 1)
    if pieces is None:
        pieces = max(1, min(_MAX_PIECES, num_sms // blocks, triton.cdiv(K, BK)))
    if senders is None:
        is_large = shard_m * K * dtype.itemsize >= _SENDERS_BYTES and num_sms >= 4 * _SENDERS
        senders = _SENDERS if is_large and not INTERPRETED else 0

    def needs(rows: int) -> tuple[int, int]:
        """(bytes of staging, flags): all shards, and a flag for each source, block of rows and piece."""
        staged = world_size * rows * _row_elements(K, dtype) * dtype.itemsize
        return staged, world_size * triton.cdiv(rows, BM) * pieces

    rows = fitting_rows(shard_m, BM, needs) if rows is None else min(rows, max(shard_m, 1))
    staging_bytes, flags = needs(min(rows, shard_m))
    # The interpreter runs a rank's programs one after the other: a resident grid is one program there.
    programs = 1 if INTERPRETED else num_sms
    return Plan(
        BM, BN, BK, num_warps or table_warps, num_stages or table_stages, programs, senders, pieces, rows,
        staging_bytes, flags, use_tma,
    )  # fmt: skip


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
) -> None:
    """outs[i] [W m, N_i] = all_gather(a [m, K]) @ bs[i] [K, N_i] + biases[i] [N_i], on the current stream.

    gathered: [W m, K] or None. a, bs, outs, gathered: any strides, not overlapping; biases contiguous or None; all of
    one dtype (bf16, fp16, fp32) and device. The rest is as in `matmul_all_reduce.launch`.
    """
    biases = [None] * len(bs) if biases is None else biases
    if not bs or not len(bs) == len(outs) == len(biases):
        raise ValueError(f"{len(bs)} matrices, {len(outs)} outputs and {len(biases)} biases do not belong together")
    shard_m, K = a.shape
    for b, bias, out in zip(bs, biases, outs):
        check_matmul(a, b, bias, out)
        if out.shape != (world_size * shard_m, b.shape[1]):
            raise ValueError(f"an output is {list(out.shape)}, the product {[world_size * shard_m, b.shape[1]]}")
    if gathered is not None and (gathered.shape != (world_size * shard_m, K) or gathered.dtype != a.dtype):
        raise ValueError(
            f"gathered is {list(gathered.shape)} {gathered.dtype}, "
            f"the gathered matrix {[world_size * shard_m, K]} {a.dtype}"
        )
    if INTERPRETED and plan.programs > 1:
        raise ValueError(f"in the interpreter a plan runs one program, not {plan.programs}: it would deadlock")
    if not 0 <= plan.senders < plan.programs:
        raise ValueError(f"{plan.senders} of {plan.programs} programs only send: none is left to multiply")
    # A call must hear from every rank: one that multiplies nothing and copies nothing would not.
    products = [product for product in zip(bs, biases, outs) if product[0].shape[1] > 0]
    if not products and gathered is not None:
        products = [(bs[0], biases[0], outs[0])]
    operands = [describe(b, (plan.BK, plan.BN), allowed=plan.use_tma) for b, _, _ in products]
    for start in range(0, shard_m, plan.rows):
        a_rows = a[start : start + plan.rows]
        rows = a_rows.shape[0]
        blocks = triton.cdiv(rows, plan.BM)
        a_arg, a_desc = describe(a_rows, (plan.BM, plan.BK), allowed=plan.use_tma)
        for i, ((b, bias, out), (b_arg, b_desc)) in enumerate(zip(products, operands)):
            exchange = i == 0  # the others find the shards in the staging memory
            copy = gathered[start:] if gathered is not None and exchange else None
            senders = plan.senders if exchange else 0
            work = blocks * max(plan.pieces, world_size * triton.cdiv(b.shape[1], plan.BN))
            all_gather_matmul_kernel[(min(plan.programs, work + senders),)](
                a_arg, a_rows, b_arg, bias, out[start:], copy, staging_ptrs, flag_ptrs, state, rows, shard_m,
                b.shape[1], K, _row_elements(K, a.dtype), *a.stride(), *b.stride(), *out.stride(),
                *((0, 0) if copy is None else copy.stride()), rank, site, int(timeout_s * 1e9),
                WORLD_SIZE=world_size, BM=plan.BM, BN=plan.BN, BK=plan.BK, GROUP_M=GROUP_M,
                A_DESC=a_desc, B_DESC=b_desc, PIECES=plan.pieces, SENDERS=senders, EXCHANGE=exchange,
                num_warps=plan.num_warps, num_stages=plan.num_stages,
            )  # fmt: skip
            raise_if_interpreted_call_failed(state, rank)


_cached_plan = functools.lru_cache(maxsize=4096)(plan)


def run(
    a: torch.Tensor,
    bs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None,
    outs: Sequence[torch.Tensor],
    gathered: torch.Tensor | None,
    workspace: WorkspaceLike,
) -> None:
    """`launch` with the table's plan on a workspace, which grows if it must (collective then).

    Raises SymmetricMemoryTimeout when a peer does not come (interpreter; a compiled kernel traps), and what `plan`,
    `launch` and `reserve` raise.
    """
    widest = max(b.shape[1] for b in bs)
    chosen = _cached_plan(a.shape[0], widest, a.shape[1], a.dtype, workspace.world_size, num_sms(a))
    workspace.reserve(chosen.staging_bytes, chosen.flags)
    with timeouts_named(workspace, "all_gather_matmul"):
        launch(a, bs, biases, outs, gathered, plan=chosen, **launch_arguments(workspace))
