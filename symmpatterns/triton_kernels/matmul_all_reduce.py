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

import torch
import triton
import triton.language as tl

from symmpatterns.triton_kernels._choices import choice_for, variant_for
from symmpatterns.triton_kernels._launch import Launcher, launch_kernel, repeat
from symmpatterns.triton_kernels._sync import (
    INTERPRETED,
    await_flag,
    begin_call,
    end_call,
    publish,
    raise_if_interpreted_call_failed,
)
from symmpatterns.triton_kernels._tiles import (
    GROUP_M,
    add_bias,
    check_matmul,
    describe,
    finish_sends_by_tma,
    fitting_rows,
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
    with_scratch_memory,
)
from symmpatterns.triton_kernels._workspace import WorkspaceLike, errors_named, launch_arguments, num_sms

# Arguments that differ between ranks or calls and must not give a kernel of their own when they are 1 or 16.
_ANY_VALUE = ["M", "rank", "site", "timeout_ns"]


@triton.jit(do_not_specialize=_ANY_VALUE)
def one_shot_kernel(
    a, b, bias, out, staging_ptrs, flag_ptrs, state_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """One program a tile. It waits only for the programs of the same index on the peers, and sends before it waits."""
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    tiles = tiles_m * tiles_n
    ticket, half = begin_call(state_ptr, site)
    position_m, position_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
    first_m = position_m * BM
    first_n = position_n * BN
    acc = tile_product(
            tl.zeros([BM, BN], tl.float32), a, b, first_m, first_n, 0, M, N, K,
            stride_am, stride_ak, stride_bk, stride_bn, BM, BN, BK, A_DESC, B_DESC,
        )  # fmt: skip
    partial = round_to(add_bias(acc, bias, first_n, N, BN), out.dtype.element_ty)
    slot = rank * tiles + tile
    send_tile_to_peers(
        staging_ptrs, flag_ptrs, half, rank, slot, slot, partial, M - first_m, ticket, WORLD_SIZE, BM, BN
    )
    total = reduce_tile(
        staging_ptrs, flag_ptrs, state_ptr, half, rank, tile, tiles, partial, M - first_m, ticket, timeout_ns,
        WORLD_SIZE, BM, BN, AVERAGE,
    )  # fmt: skip
    store_tile(out, round_to(total, out.dtype.element_ty), first_m, first_n, M, N, stride_om, stride_on, BM, BN)
    end_call(state_ptr, ticket, tl.num_programs(0))


@triton.jit(do_not_specialize=_ANY_VALUE)
def two_shot_kernel(
    a, b, bias, out, staging_ptrs, flag_ptrs, state_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, AVERAGE: tl.constexpr, STAGGER: tl.constexpr,
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
    tiles = tiles_m * tiles_n
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
            position_m, position_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
            first_m = position_m * BM
            first_n = position_n * BN
            acc = tile_product(
            tl.zeros([BM, BN], tl.float32), a, b, first_m, first_n, 0, M, N, K,
            stride_am, stride_ak, stride_bk, stride_bn, BM, BN, BK, A_DESC, B_DESC,
        )  # fmt: skip
            partial = round_to(add_bias(acc, bias, first_n, N, BN), out.dtype.element_ty)
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
                store_tile(out, result, first_m, first_n, M, N, stride_om, stride_on, BM, BN)

    for step in tl.range(program, chunk * WORLD_SIZE, programs, num_stages=1):
        # The owners finish their first tiles first: start with all chunks' first tiles, not with one owner's chunk.
        owner = (rank + 1 + step % WORLD_SIZE) % WORLD_SIZE
        tile = owner * chunk + step // WORLD_SIZE
        if (tile < tiles) & (owner != rank):
            position_m, position_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
            first_m = position_m * BM
            slot = sums + tile
            await_flag(flag_ptrs, half, rank, owner, slot, ticket, state_ptr, timeout_ns, WORLD_SIZE)
            result = receive_tile(staging_ptrs, half, rank, slot, M - first_m, WORLD_SIZE, out.dtype.element_ty, BM, BN)
            store_tile(out, result, first_m, position_n * BN, M, N, stride_om, stride_on, BM, BN)
    end_call(state_ptr, ticket, programs)


@triton.jit(do_not_specialize=_ANY_VALUE)
def two_shot_tma_kernel(
    a, b, bias, out, staging_ptrs, flag_ptrs, state_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, AVERAGE: tl.constexpr, STAGGER: tl.constexpr,
):  # fmt: skip
    """two_shot_kernel between two ranks, with tiles sent by TMA while the next one is multiplied.

    The same slots, flags and order. A tile's flag is written one tile later, when its copy has had the time to arrive,
    but before this program waits for anything: what the peers wait for still depends on no wait.
    """
    tl.static_assert(WORLD_SIZE == 2)
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
            acc = tile_product(
                tl.zeros([BM, BN], tl.float32), a, b, first_m, first_n, 0, M, N, K,
                stride_am, stride_ak, stride_bk, stride_bn, BM, BN, BK, A_DESC, B_DESC,
            )  # fmt: skip
            result = round_to(add_bias(acc, bias, first_n, N, BN), out.dtype.element_ty)
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

    for index in tl.range(program, chunk, programs, num_stages=1):
        tile = peer * chunk + index
        if tile < tiles:
            position_m, position_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
            first_m = position_m * BM
            slot = sums + tile
            await_flag(flag_ptrs, half, rank, peer, slot, ticket, state_ptr, timeout_ns, WORLD_SIZE)
            result = receive_tile(staging_ptrs, half, rank, slot, M - first_m, WORLD_SIZE, out.dtype.element_ty, BM, BN)
            store_tile(out, result, first_m, position_n * BN, M, N, stride_om, stride_on, BM, BN)
    end_call(state_ptr, ticket, programs)


# --- host side ----------------------------------------------------------------------------------------------------

# name: kernel
VARIANTS = {"one_shot": one_shot_kernel, "two_shot": two_shot_kernel, "two_shot_tma": two_shot_tma_kernel}


@dataclass(frozen=True)
class Plan:
    """How one shape is computed; must be equal on all ranks of the group.

    variant        one of VARIANTS
    BM, BN, BK     tile of the output and step along K, in elements
    programs       one_shot: 0, a program a tile; others: size of the grid, at most what is resident at once
    staging_bytes  of one half of the workspace; flags: of one half. Reserve both before the launch.
    rows           a launch computes so many rows at a time, each time as one call of the protocol
    use_tma        read operands by TMA where their strides allow it
    stagger        not one_shot: clock cycles between the beginnings of one program and the next
    """

    variant: str
    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    programs: int
    rows: int
    staging_bytes: int
    flags: int
    use_tma: bool
    stagger: int


def plan(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    world_size: int,
    num_sms: int,
    *,
    variant: str | None = None,
    tile: tuple[int, int, int] | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    rows: int | None = None,
    programs: int | None = None,
    stagger: int | None = None,
    use_tma: bool = True,
    capability: int = 9,
) -> Plan:
    """The plan for out[M, N] = all_reduce(a[M, K] @ b[K, N]); a function of its arguments alone.

    `num_sms` must be that of the smallest GPU of the group, `capability` (major) that of all. What else is given by
    keyword overrides the table; more `programs` than are resident at once would wait for each other. Raises
    ValueError for a plan that cannot run, TypeError for a dtype the kernels do not take.
    """
    if variant is None:
        variant = variant_for(M, N, K, dtype, world_size, capability)
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {list(VARIANTS)}, not {variant!r}")
    if variant == "two_shot_tma" and world_size != 2:
        raise ValueError(f"two_shot_tma is for two ranks, not {world_size}: it sends to one peer")
    (BM, BN, BK, table_warps, table_stages), per_sm, table_stagger = choice_for(variant, M, dtype, capability)
    if tile is not None:
        BM, BN, BK = tile
        per_sm, table_stagger = 1, 0  # measured for the table's tile only

    def needs(rows: int) -> tuple[int, int]:
        """(tile slots of staging, flags); all variants use one flag a slot."""
        tiles = triton.cdiv(rows, BM) * triton.cdiv(N, BN)
        chunk = triton.cdiv(tiles, world_size)
        slots = world_size * tiles if variant == "one_shot" else 2 * world_size * chunk
        return slots * BM * BN * dtype.itemsize, slots

    rows = fitting_rows(M, BM, needs) if rows is None else min(rows, max(M, 1))
    staging_bytes, flags = needs(min(rows, M))
    # The interpreter runs a rank's programs one after the other: a resident grid is one program there.
    programs = 0 if variant == "one_shot" else 1 if INTERPRETED else programs or per_sm * num_sms
    return Plan(
        variant, BM, BN, BK, num_warps or table_warps, num_stages or table_stages, programs, rows, staging_bytes, flags,
        use_tma, table_stagger if stagger is None else stagger,
    )  # fmt: skip


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
    launcher: Launcher = launch_kernel,
) -> None:
    """out[M, N] = all_reduce(a[M, K] @ b[K, N] + bias[N], op) on the current stream; no host synchronisation.

    a, b, out: any strides, not overlapping; bias contiguous or None; all of one dtype (bf16, fp16, fp32) and device.
    op: "sum" or "avg". `staging_ptrs`, `flag_ptrs`: int64 [2, W] and `state`: int32 [16], a workspace in which
    `plan.staging_bytes` and `plan.flags` are reserved. `site` (int32, the same on
    every rank) tells the calls of a program apart: a peer at another site is an error.

    Raises ValueError, TypeError or RuntimeError for operands the kernels cannot take. A peer that does not come within
    `timeout_s` raises FlagTimeoutError in the interpreter; a compiled kernel leaves the record in state[2:9] and traps.
    """
    check_matmul(a, b, bias, out)
    M, K = a.shape
    N = b.shape[1]
    if op not in ("sum", "avg"):
        raise ValueError(f"op must be 'sum' or 'avg', not {op!r}")
    if INTERPRETED and plan.programs > 1:
        raise ValueError(f"in the interpreter a resident plan runs one program, not {plan.programs}: it would deadlock")
    if N == 0:
        return
    b_arg, b_desc = describe(b, (plan.BK, plan.BN), allowed=plan.use_tma)
    for first in range(0, M, plan.rows):
        a_rows, out_rows = a[first : first + plan.rows], out[first : first + plan.rows]
        rows = a_rows.shape[0]
        a_arg, a_desc = describe(a_rows, (plan.BM, plan.BK), allowed=plan.use_tma)
        tiles = triton.cdiv(rows, plan.BM) * triton.cdiv(N, plan.BN)
        programs = min(plan.programs or tiles, tiles)
        args = (
            a_arg, b_arg, bias, out_rows, staging_ptrs, flag_ptrs, state, rows, N, K,
            *a.stride(), *b.stride(), *out.stride(), rank, site, int(timeout_s * 1e9),
        )  # fmt: skip
        constants = {
            "WORLD_SIZE": world_size, "BM": plan.BM, "BN": plan.BN, "BK": plan.BK, "GROUP_M": GROUP_M,
            "A_DESC": a_desc, "B_DESC": b_desc, "AVERAGE": op == "avg",
            "num_warps": plan.num_warps, "num_stages": plan.num_stages,
        }  # fmt: skip
        start = launcher
        if plan.variant == "two_shot_tma":
            start = with_scratch_memory(launcher, a.device)
        if plan.variant != "one_shot":
            constants["STAGGER"] = plan.stagger
        start(VARIANTS[plan.variant], programs, _SOURCES, args, constants)
        raise_if_interpreted_call_failed(state, rank)


# The parameters that hold operands, as `run` counts them.
_SOURCES = {"a": 0, "b": 1, "bias": 2, "out": 3}
_cached_plan = functools.lru_cache(maxsize=4096)(plan)


def run(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, workspace: WorkspaceLike, op: str
) -> None:
    """`launch` with the table's plan on a workspace, which grows if it must (collective then).

    Raises SymmetricMemoryTimeout when a peer does not come (interpreter; a compiled kernel traps), and what `launch`
    and `reserve` raise.
    """

    def first(launcher: Launcher) -> None:
        capability = torch.cuda.get_device_capability(a.device)[0] if a.is_cuda else 9
        chosen = _cached_plan(
            a.shape[0], b.shape[1], a.shape[1], a.dtype, workspace.world_size, num_sms(a), capability=capability
        )
        workspace.reserve(chosen.staging_bytes, chosen.flags)
        with errors_named(workspace, "matmul_all_reduce"):
            launch(a, b, bias, out, plan=chosen, op=op, launcher=launcher, **launch_arguments(workspace))

    repeat(workspace, ("matmul_all_reduce", op), (a, b, bias, out), first)
