"""out = all_reduce(a @ b + bias), one kernel per rank, the peers' memory written by the kernel itself.

one_shot  every rank sends every tile to every rank; each sums for itself. One exchange: for small outputs.
two_shot  a tile has an owner: partial products go to it, it sums them and sends the sum to every rank. Less data
          (2 (W-1)/W of the matrix a rank, not W-1), one more exchange: for everything else. Persistent programs
          compute the peers' tiles first and their own last, when the partials have arrived.
two_shot_tma  the same between two ranks, but a tile is sent by TMA while the next one is multiplied: for the largest.

Why the buffers are never overwritten too early, and why every wait ends, is in docs/memory-ordering.md.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from symmpatterns.triton_kernels import _plan
from symmpatterns.triton_kernels._choices import choice_for, variant_for
from symmpatterns.triton_kernels._launch import Launcher, early, launch_kernel
from symmpatterns.triton_kernels._plan import (
    TRITON_DTYPES,
    Scales,
    check_call,
    check_matmul,
    describe,
    run_planned,
    sent_dtypes,
    sizes,
    spread,
    strides_of,
    with_scratch_memory,
)
from symmpatterns.triton_kernels._sync import (
    await_flag,
    begin_call,
    count_call,
    publish,
    raise_if_interpreted_call_failed,
)
from symmpatterns.triton_kernels._tiles import (
    finish_sends_by_tma,
    finish_tile,
    idle,
    receive_tile,
    reduce_tile,
    round_to,
    send_tile,
    send_tile_by_tma,
    send_tile_to_peers,
    sending_descriptor,
    store_tile,
    tile_position,
    tile_product,
)
from symmpatterns.triton_kernels._workspace import WorkspaceLike, num_sms

# Arguments that differ between ranks or calls and must not give a kernel of their own when they are 1 or 16.
_ANY_VALUE = ["M", "rank", "site", "timeout_ns"]


@triton.jit
def partial_tile(
    a, b, bias, scale_a, scale_b, matrix, first_m, first_n, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    stride_az, stride_bz, stride_sa, stride_sb,
    DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    """This rank's partial product of one tile, rounded to DTYPE; BATCHED: of a matrix of a batch, read by pointers."""
    zero = tl.zeros([BM, BN], tl.float32)
    if BATCHED:
        left = a + matrix.to(tl.int64) * stride_az
        right = b + matrix.to(tl.int64) * stride_bz
        acc = tile_product(
            zero, left, right, first_m, first_n, 0, M, N, K,
            stride_am, stride_ak, stride_bk, stride_bn, BM, BN, BK, "", "",
        )  # fmt: skip
        if bias is not None:
            row = bias + matrix * N
            partial = finish_tile(acc, row, None, None, 0, 0, 0, first_n, 0, N, DTYPE, BM, BN)
        else:
            partial = finish_tile(acc, None, None, None, 0, 0, 0, first_n, 0, N, DTYPE, BM, BN)
    else:
        acc = tile_product(
            zero, a, b, first_m, first_n, 0, M, N, K,
            stride_am, stride_ak, stride_bk, stride_bn, BM, BN, BK, A_DESC, B_DESC,
        )  # fmt: skip
        partial = finish_tile(
            acc, bias, scale_a, scale_b, stride_sa, stride_sb, first_m, first_n, M - first_m, N, DTYPE, BM, BN
        )
    return partial


@triton.jit(do_not_specialize=_ANY_VALUE)
def one_shot_kernel(
    a, b, bias, scale_a, scale_b, out, staging_ptrs, flag_ptrs, state_ptr, M, N, K, batch,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, stride_az, stride_bz, stride_oz,
    stride_sa, stride_sb, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, AVERAGE: tl.constexpr,
    PARTIAL: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    """One program a tile. It waits only for the programs of the same index on the peers, and sends before it waits."""
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    tiles = batch * tiles_m * tiles_n
    ticket, half = begin_call(state_ptr, site)
    position_m, position_n = tile_position(tile, batch * tiles_m, tiles_n, GROUP_M)
    first_m = (position_m % tiles_m) * BM if BATCHED else position_m * BM
    first_n = position_n * BN
    matrix = position_m // tiles_m if BATCHED else 0
    partial = partial_tile(
        a, b, bias, scale_a, scale_b, matrix, first_m, first_n, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
        stride_az, stride_bz, stride_sa, stride_sb, PARTIAL, BM, BN, BK, A_DESC, B_DESC, BATCHED,
    )  # fmt: skip
    slot = rank * tiles + tile
    send_tile_to_peers(
        staging_ptrs, flag_ptrs, half, rank, slot, slot, partial, M - first_m, ticket, WORLD_SIZE, BM, BN
    )
    count_call(state_ptr, ticket, tl.num_programs(0))
    total = reduce_tile(
        staging_ptrs, flag_ptrs, state_ptr, half, rank, tile, tiles, partial, M - first_m, ticket, timeout_ns,
        WORLD_SIZE, BM, BN, AVERAGE,
    )  # fmt: skip
    target = out + tl.cast(matrix, tl.int64) * stride_oz if BATCHED else out
    store_tile(target, round_to(total, out.dtype.element_ty), first_m, first_n, M, N, stride_om, stride_on, BM, BN)


@triton.jit(do_not_specialize=_ANY_VALUE)
def two_shot_kernel(
    a, b, bias, scale_a, scale_b, out, staging_ptrs, flag_ptrs, state_ptr, M, N, K, batch,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, stride_az, stride_bz, stride_oz,
    stride_sa, stride_sb, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, AVERAGE: tl.constexpr,
    PARTIAL: tl.constexpr, BATCHED: tl.constexpr, STAGGER: tl.constexpr,
):  # fmt: skip
    """Persistent programs, all resident at once. Staging slots and flags: partials by source, then sums by tile.

    The tiles are owned in contiguous chunks of their order, chunk r by rank r. Every program goes through its tiles
    in the order of owners rank + 1, ..., rank + W = rank, so that it has sent all the peers wait for before it waits.

    Program i begins i * STAGGER clock cycles late. If all multiprocessors sent their tiles at once, each would get a
    share of the link so small that its next tile were stuck behind the send.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    tiles = batch * tiles_m * tiles_n
    chunk = tl.cdiv(tiles, WORLD_SIZE)
    sums = WORLD_SIZE * chunk  # the first slot and flag of the sums
    ticket, half = begin_call(state_ptr, site)
    if STAGGER:
        idle(program * STAGGER)

    for step in tl.range(program, chunk * WORLD_SIZE, programs):
        owner = (rank + 1 + step // chunk) % WORLD_SIZE
        index = step % chunk
        tile = owner * chunk + index
        if tile < tiles:  # the last chunks may be short or empty
            position_m, position_n = tile_position(tile, batch * tiles_m, tiles_n, GROUP_M)
            first_m = (position_m % tiles_m) * BM if BATCHED else position_m * BM
            first_n = position_n * BN
            matrix = position_m // tiles_m if BATCHED else 0
            partial = partial_tile(
                a, b, bias, scale_a, scale_b, matrix, first_m, first_n, M, N, K,
                stride_am, stride_ak, stride_bk, stride_bn, stride_az, stride_bz, stride_sa, stride_sb,
                PARTIAL, BM, BN, BK, A_DESC, B_DESC, BATCHED,
            )  # fmt: skip
            if owner != rank:
                slot = rank * chunk + index
                send_tile(staging_ptrs, half, owner, slot, partial, M - first_m, WORLD_SIZE, BM, BN)
                publish(flag_ptrs, half, owner, slot, ticket, WORLD_SIZE)
            else:
                total = reduce_tile(
                    staging_ptrs, flag_ptrs, state_ptr, half, rank, index, chunk, partial, M - first_m, ticket,
                    timeout_ns, WORLD_SIZE, BM, BN, AVERAGE,
                )  # fmt: skip
                result = round_to(total, out.dtype.element_ty)
                slot = sums + tile
                send_tile_to_peers(
                    staging_ptrs, flag_ptrs, half, rank, slot, slot, result, M - first_m, ticket, WORLD_SIZE, BM, BN
                )
                target = out + tl.cast(matrix, tl.int64) * stride_oz if BATCHED else out
                store_tile(target, result, first_m, first_n, M, N, stride_om, stride_on, BM, BN)

    count_call(state_ptr, ticket, programs)
    for step in tl.range(program, chunk * WORLD_SIZE, programs, num_stages=1):
        # The owners finish their first tiles first: start with all chunks' first tiles, not with one owner's chunk.
        owner = (rank + 1 + step % WORLD_SIZE) % WORLD_SIZE
        tile = owner * chunk + step // WORLD_SIZE
        if (tile < tiles) & (owner != rank):
            position_m, position_n = tile_position(tile, batch * tiles_m, tiles_n, GROUP_M)
            first_m = (position_m % tiles_m) * BM if BATCHED else position_m * BM
            slot = sums + tile
            await_flag(flag_ptrs, half, rank, owner, slot, ticket, state_ptr, timeout_ns, WORLD_SIZE)
            result = receive_tile(staging_ptrs, half, rank, slot, M - first_m, WORLD_SIZE, out.dtype.element_ty, BM, BN)
            matrix = position_m // tiles_m if BATCHED else 0
            target = out + tl.cast(matrix, tl.int64) * stride_oz if BATCHED else out
            store_tile(target, result, first_m, position_n * BN, M, N, stride_om, stride_on, BM, BN)


@triton.jit(do_not_specialize=_ANY_VALUE)
def two_shot_tma_kernel(
    a, b, bias, scale_a, scale_b, out, staging_ptrs, flag_ptrs, state_ptr, M, N, K, batch,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, stride_az, stride_bz, stride_oz,
    stride_sa, stride_sb, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, AVERAGE: tl.constexpr,
    PARTIAL: tl.constexpr, BATCHED: tl.constexpr, STAGGER: tl.constexpr,
):  # fmt: skip
    """two_shot_kernel between two ranks, with tiles sent by TMA while the next one is multiplied.

    The same slots, flags and order. A tile's flag is written one tile later, when its copy has had the time to arrive,
    but before this program waits for anything: what the peers wait for still depends on no wait.
    """
    tl.static_assert(WORLD_SIZE == 2)
    tl.static_assert(not BATCHED)
    tl.static_assert(PARTIAL == out.dtype.element_ty)  # one descriptor for what is sent
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    peer = 1 - rank
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    tiles = tiles_m * tiles_n
    chunk = tl.cdiv(tiles, WORLD_SIZE)
    sums = WORLD_SIZE * chunk  # the first slot and flag of the sums
    ticket, half = begin_call(state_ptr, site)
    slots = sending_descriptor(staging_ptrs, half, peer, 2 * sums, WORLD_SIZE, out.dtype.element_ty, BM, BN)

    if STAGGER:
        idle(program * STAGGER)
    sent = -1  # the slot whose flag is still to be written
    for step in tl.range(program, chunk * WORLD_SIZE, programs):
        owner = (rank + 1 + step // chunk) % WORLD_SIZE
        index = step % chunk
        tile = owner * chunk + index
        if tile < tiles:  # the last chunk may be short
            position_m, position_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
            first_m = position_m * BM
            first_n = position_n * BN
            result = partial_tile(
                a, b, bias, scale_a, scale_b, 0, first_m, first_n, M, N, K,
                stride_am, stride_ak, stride_bk, stride_bn, 0, 0, stride_sa, stride_sb,
                PARTIAL, BM, BN, BK, A_DESC, B_DESC, False,
            )  # fmt: skip
            if sent >= 0:
                finish_sends_by_tma()
                publish(flag_ptrs, half, peer, sent, ticket, WORLD_SIZE)
            sent = rank * chunk + index
            if owner == rank:
                total = reduce_tile(
                    staging_ptrs, flag_ptrs, state_ptr, half, rank, index, chunk, result, M - first_m, ticket,
                    timeout_ns, WORLD_SIZE, BM, BN, AVERAGE,
                )  # fmt: skip
                result = round_to(total, out.dtype.element_ty)
                sent = sums + tile
                store_tile(out, result, first_m, first_n, M, N, stride_om, stride_on, BM, BN)
            send_tile_by_tma(slots, sent, result, BM)
    if sent >= 0:
        finish_sends_by_tma()
        publish(flag_ptrs, half, peer, sent, ticket, WORLD_SIZE)

    count_call(state_ptr, ticket, programs)
    for index in tl.range(program, chunk, programs, num_stages=1):
        tile = peer * chunk + index
        if tile < tiles:
            position_m, position_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
            first_m = position_m * BM
            slot = sums + tile
            await_flag(flag_ptrs, half, rank, peer, slot, ticket, state_ptr, timeout_ns, WORLD_SIZE)
            result = receive_tile(staging_ptrs, half, rank, slot, M - first_m, WORLD_SIZE, out.dtype.element_ty, BM, BN)
            store_tile(out, result, first_m, position_n * BN, M, N, stride_om, stride_on, BM, BN)


# --- host side ----------------------------------------------------------------------------------------------------

# name: kernel
VARIANTS = {"one_shot": one_shot_kernel, "two_shot": two_shot_kernel, "two_shot_tma": two_shot_tma_kernel}


@dataclass(frozen=True, kw_only=True)
class Plan(_plan.Plan):
    """As every plan, and

    variant  one of VARIANTS
    stagger  not one_shot: clock cycles between the beginnings of one program and the next
    """

    variant: str
    stagger: int


def plan(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    world_size: int,
    num_sms: int,
    *,
    partial: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    batch: int | None = None,
    variant: str | None = None,
    programs: int | None = None,
    per_sm: int | None = None,
    stagger: int | None = None,
    capability: int = 9,
    **overrides: Any,
) -> Plan:
    """The plan for out[M, N] = all_reduce(a[M, K] @ b[K, N]), or a batch of such; a function of its arguments alone.

    `dtype` is that of a and b, `partial` that of the products as they are sent, `out_dtype` that of the result (default:
    the one before; bf16 after float8).

    `num_sms` must be that of the smallest GPU of the group, `capability` (major) that of all. What else is given by
    keyword, here or for `_plan.sizes`, overrides the table; more `programs` (or `per_sm`, of them a multiprocessor) than
    are resident at once would wait for each other. Raises ValueError for a plan that cannot run, TypeError for a dtype
    the kernels do not take.
    """
    partial, out_dtype = sent_dtypes(dtype, partial, out_dtype)
    is_plain = batch is None and partial == out_dtype
    if variant is None:
        variant = variant_for((batch or 1) * M, N, K, dtype, partial, world_size, capability)
        variant = variant if is_plain or variant != "two_shot_tma" else "two_shot"
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {list(VARIANTS)}, not {variant!r}")
    if variant == "two_shot_tma" and world_size != 2:
        raise ValueError(f"two_shot_tma is for two ranks, not {world_size}: it sends to one peer")
    if variant == "two_shot_tma" and not is_plain:
        raise ValueError("two_shot_tma takes no batch and sends sums as it sends partial products, in one dtype")
    table, table_per_sm, table_stagger = choice_for(variant, M, dtype, capability)
    if overrides.get("tile") is not None:
        table_per_sm, table_stagger = 1, 0  # measured for the table's tile only

    def needs(rows: int, BM: int, BN: int) -> tuple[int, int]:
        """(bytes of staging, flags); all variants use one flag a slot."""
        tiles = (batch or 1) * triton.cdiv(rows, BM) * triton.cdiv(N, BN)
        slots = world_size * tiles if variant == "one_shot" else 2 * world_size * triton.cdiv(tiles, world_size)
        return slots * BM * BN * max(partial.itemsize, out_dtype.itemsize), slots

    grid = 0 if variant == "one_shot" else programs or (per_sm or table_per_sm) * num_sms
    return Plan(
        variant=variant,
        stagger=table_stagger if stagger is None else stagger,
        **sizes(M, table, needs, programs=grid, **overrides),
    )


def launch(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    staging_ptrs: torch.Tensor,
    flag_ptrs: torch.Tensor,
    state: torch.Tensor,
    rank: int,
    world_size: int,
    plan: Plan,
    timeout_s: float,
    site: int = 0,
    op: str = "sum",
    scales: Scales = (None, None),
    partial: torch.dtype | None = None,
    launcher: Launcher = launch_kernel,
) -> None:
    """out[M, N] = all_reduce(a[M, K] @ b[K, N] + bias[N], op) on the current stream; no host synchronisation.

    Or a batch: a [B, M, K], b [B, K, N], bias [B, N], out [B, M, N]. a, b, out: any strides, not overlapping; bias
    contiguous or None. a and b: bf16, fp16 or fp32, or (no batch) float8_e4m3fn with `scales` of a and of b, fp32 [1] or
    [M], [N]. Products are rounded to `partial` (default: out's dtype) and sent so; out is of that dtype or fp32.
    op: "sum" or "avg". `staging_ptrs`, `flag_ptrs`: int64 [2, W] and `state`: int32 [16], a workspace in which
    `plan.staging_bytes` and `plan.flags` are reserved. `site` (int32, the same on every
    rank) tells the calls of a program apart: a peer at another site is an error.

    Raises ValueError, TypeError or RuntimeError for operands the kernels cannot take. A peer that does not come within
    `timeout_s` raises FlagTimeoutError in the interpreter; a compiled kernel leaves the record in state[2:9] and traps.
    """
    check_call(plan, op)
    check_matmul(a, b, bias, out, scales=scales, partial=partial)
    M, K = a.shape[-2:]
    N = b.shape[-1]
    batch = a.shape[0] if a.dim() == 3 else None
    if N == 0 or batch == 0:
        return
    use_tma = plan.use_tma and batch is None
    scale_a, scale_b = spread(scales, M, N)
    b_arg, b_desc = describe(b, (plan.BK, plan.BN), allowed=use_tma)
    for first in range(0, M, plan.rows):
        a_rows, out_rows = a[..., first : first + plan.rows, :], out[..., first : first + plan.rows, :]
        rows = a_rows.shape[-2]
        a_arg, a_desc = describe(a_rows, (plan.BM, plan.BK), allowed=use_tma)
        tiles = (batch or 1) * triton.cdiv(rows, plan.BM) * triton.cdiv(N, plan.BN)
        programs = min(plan.programs or tiles, tiles)
        steps = (0, 0, 0) if batch is None else (a.stride(0), b.stride(0), out.stride(0))
        args = (
            a_arg, b_arg, bias, None if scale_a is None else scale_a[first:], scale_b, out_rows,
            staging_ptrs, flag_ptrs, state, rows, N, K, batch or 1,
            *a.stride()[-2:], *b.stride()[-2:], *out.stride()[-2:], *steps, *strides_of(scale_a, scale_b),
            rank, site, int(timeout_s * 1e9),
        )  # fmt: skip
        constants = plan.constants(world_size, a_desc, b_desc) | {
            "AVERAGE": op == "avg",
            "PARTIAL": TRITON_DTYPES[partial or out.dtype],
            "BATCHED": batch is not None,
            **early(state, out.nbytes),
        }
        start = launcher
        if plan.variant == "two_shot_tma":
            start = with_scratch_memory(launcher, a.device)
        if plan.variant != "one_shot":
            constants["STAGGER"] = plan.stagger
        start(VARIANTS[plan.variant], programs, _SOURCES, args, constants)
        raise_if_interpreted_call_failed(state, rank)


# The parameters that hold operands, as `run` counts them.
_SOURCES = {"a": 0, "b": 1, "bias": 2, "out": 3, "scale_a": 4, "scale_b": 5}
_cached_plan = functools.lru_cache(maxsize=4096)(plan)


def run(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: WorkspaceLike,
    op: str,
    scales: Scales = (None, None),
    partial: torch.dtype | None = None,
    **overrides: Any,
) -> None:
    """`launch` with the table's plan, or what `overrides` make of it, on a workspace; see `run_planned`."""

    def choose() -> Plan:
        capability = torch.cuda.get_device_capability(a.device)[0] if a.is_cuda else 9
        return _cached_plan(
            a.shape[-2], b.shape[-1], a.shape[-1], a.dtype, workspace.world_size, num_sms(a), capability=capability,
            partial=partial or out.dtype, out_dtype=out.dtype, batch=a.shape[0] if a.dim() == 3 else None, **overrides,
        )  # fmt: skip

    start = functools.partial(launch, a, b, bias, out, op=op, scales=scales, partial=partial)
    options = op, partial, *overrides.items()
    run_planned(workspace, "matmul_all_reduce", options, (a, b, bias, out, *scales), choose, start)
