"""out = all_reduce(a @ b + bias), one kernel per rank, the peers' memory written by the kernel itself.

one_shot  every rank sends every tile to every rank; each sums for itself. One exchange: for small outputs.
two_shot  a tile has an owner: partial products go to it, it sums them and sends the sum to every rank. Less data
          (2 (W-1)/W of the matrix a rank, not W-1), one more exchange: for everything else. Persistent programs
          compute the peers' tiles first and their own last, when the partials have arrived.

Why the buffers are never overwritten too early, and why every wait ends, is in docs/memory-ordering.md.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

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
    fitting_rows,
    receive_tile,
    reduce_tile,
    round_to,
    send_tile,
    send_tile_to_peers,
    store_tile,
    tile_position,
    tile_product,
    tiles_for,
)
from symmpatterns.triton_kernels._workspace import WorkspaceLike, launch_arguments, num_sms, timeouts_named

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
    epoch, half = begin_call(state_ptr)
    position_m, position_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
    first_m = position_m * BM
    first_n = position_n * BN
    acc = tile_product(
            tl.zeros([BM, BN], tl.float32), a, b, first_m, first_n, 0, M, N, K,
            stride_am, stride_ak, stride_bk, stride_bn, BM, BN, BK, A_DESC, B_DESC,
        )  # fmt: skip
    partial = round_to(add_bias(acc, bias, first_n, N, BN), out.dtype.element_ty)
    slot = rank * tiles + tile
    send_tile_to_peers(staging_ptrs, flag_ptrs, half, rank, slot, slot, partial, M - first_m, epoch, WORLD_SIZE, BM, BN)
    total = reduce_tile(
        staging_ptrs, flag_ptrs, state_ptr, half, rank, tile, tiles, partial, M - first_m, epoch, site, timeout_ns,
        WORLD_SIZE, BM, BN, AVERAGE,
    )  # fmt: skip
    store_tile(out, round_to(total, out.dtype.element_ty), first_m, first_n, M, N, stride_om, stride_on, BM, BN)
    end_call(state_ptr, epoch, tl.num_programs(0))


@triton.jit(do_not_specialize=_ANY_VALUE)
def two_shot_kernel(
    a, b, bias, out, staging_ptrs, flag_ptrs, state_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """Persistent programs, all resident at once. Staging slots and flags: partials by source, then sums by tile.

    The tiles are owned in contiguous chunks of their order, chunk r by rank r. Every program goes through its tiles
    in the order of owners rank + 1, ..., rank + W = rank, so that it has sent all the peers wait for before it waits.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    tiles = tiles_m * tiles_n
    chunk = tl.cdiv(tiles, WORLD_SIZE)
    sums = WORLD_SIZE * chunk  # the first slot and flag of the sums
    epoch, half = begin_call(state_ptr)

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
                publish(flag_ptrs, half, owner, slot, epoch, WORLD_SIZE)
            else:
                total = reduce_tile(
                    staging_ptrs, flag_ptrs, state_ptr, half, rank, index, chunk, partial, M - first_m, epoch, site,
                    timeout_ns, WORLD_SIZE, BM, BN, AVERAGE,
                )  # fmt: skip
                result = round_to(total, out.dtype.element_ty)
                slot = sums + tile
                send_tile_to_peers(
                    staging_ptrs, flag_ptrs, half, rank, slot, slot, result, M - first_m, epoch, WORLD_SIZE, BM, BN
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
            await_flag(flag_ptrs, half, rank, owner, slot, epoch, state_ptr, site, timeout_ns, WORLD_SIZE)
            result = receive_tile(staging_ptrs, half, rank, slot, M - first_m, WORLD_SIZE, out.dtype.element_ty, BM, BN)
            store_tile(out, result, first_m, position_n * BN, M, N, stride_om, stride_on, BM, BN)
    end_call(state_ptr, epoch, programs)


# --- host side ----------------------------------------------------------------------------------------------------

# Below so many bytes sent by a rank, one exchange that sends more is quicker than two that send less.
_ONE_SHOT_BYTES = 4 << 20


@dataclass(frozen=True)
class Plan:
    """How one shape is computed; must be equal on all ranks of the group.

    variant        "one_shot" or "two_shot"
    BM, BN, BK     tile of the output and step along K, in elements
    programs       two_shot: size of the grid, at most what is resident at once; one_shot: 0, a program a tile
    staging_bytes  of one half of the workspace; flags: of one half. Reserve both before the launch.
    rows           a launch computes so many rows at a time, each time as one call of the protocol
    use_tma        read operands by TMA where their strides allow it
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
    use_tma: bool = True,
) -> Plan:
    """The plan for out[M, N] = all_reduce(a[M, K] @ b[K, N]); a function of its arguments alone.

    `num_sms` must be that of the smallest GPU of the group. What is given by keyword overrides the table. Raises
    ValueError for a plan that cannot run, TypeError for a dtype the kernels do not take.
    """
    if variant is None:
        pushed = (world_size - 1) * M * N * dtype.itemsize
        variant = "one_shot" if pushed < _ONE_SHOT_BYTES else "two_shot"
    if variant not in ("one_shot", "two_shot"):
        raise ValueError(f"variant must be 'one_shot' or 'two_shot', not {variant!r}")
    BM, BN, BK, table_warps, table_stages = tiles_for(M, dtype, large=variant == "two_shot")
    if tile is not None:
        BM, BN, BK = tile

    def needs(rows: int) -> tuple[int, int]:
        """(tile slots of staging, flags); both variants use one flag a slot."""
        tiles = triton.cdiv(rows, BM) * triton.cdiv(N, BN)
        chunk = triton.cdiv(tiles, world_size)
        slots = world_size * tiles if variant == "one_shot" else 2 * world_size * chunk
        return slots * BM * BN * dtype.itemsize, slots

    rows = fitting_rows(M, BM, needs) if rows is None else min(rows, max(M, 1))
    staging_bytes, flags = needs(min(rows, M))
    # The interpreter runs a rank's programs one after the other: a resident grid is one program there.
    programs = 0 if variant == "one_shot" else 1 if INTERPRETED else num_sms
    return Plan(
        variant, BM, BN, BK, num_warps or table_warps, num_stages or table_stages, programs, rows, staging_bytes, flags,
        use_tma,
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
    op: "sum" or "avg". `staging_ptrs`, `flag_ptrs`: int64 [2, W] and `state`: int32 [8], a workspace in which
    `plan.staging_bytes` and `plan.flags` are reserved. `site` (int32) only names the call in an error.

    Raises ValueError, TypeError or RuntimeError for operands the kernels cannot take. A peer that does not come within
    `timeout_s` raises FlagTimeoutError in the interpreter; a compiled kernel leaves the record in state[2:8] and traps.
    """
    check_matmul(a, b, bias, out)
    M, K = a.shape
    N = b.shape[1]
    if op not in ("sum", "avg"):
        raise ValueError(f"op must be 'sum' or 'avg', not {op!r}")
    if INTERPRETED and plan.programs > 1:
        raise ValueError(f"in the interpreter a two_shot plan runs one program, not {plan.programs}: it would deadlock")
    if N == 0:
        return
    b_arg, b_desc = describe(b, (plan.BK, plan.BN), allowed=plan.use_tma)
    for start in range(0, M, plan.rows):
        a_rows, out_rows = a[start : start + plan.rows], out[start : start + plan.rows]
        rows = a_rows.shape[0]
        a_arg, a_desc = describe(a_rows, (plan.BM, plan.BK), allowed=plan.use_tma)
        tiles = triton.cdiv(rows, plan.BM) * triton.cdiv(N, plan.BN)
        if plan.variant == "one_shot":
            kernel, programs = one_shot_kernel, tiles
        else:
            kernel, programs = two_shot_kernel, min(plan.programs, tiles)
        args = (
            a_arg, b_arg, bias, out_rows, staging_ptrs, flag_ptrs, state, rows, N, K,
            *a.stride(), *b.stride(), *out.stride(), rank, site, int(timeout_s * 1e9),
        )  # fmt: skip
        constants = {
            "WORLD_SIZE": world_size, "BM": plan.BM, "BN": plan.BN, "BK": plan.BK, "GROUP_M": GROUP_M,
            "A_DESC": a_desc, "B_DESC": b_desc, "AVERAGE": op == "avg",
            "num_warps": plan.num_warps, "num_stages": plan.num_stages,
        }  # fmt: skip
        launcher(kernel, programs, _SOURCES, args, constants)
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
        chosen = _cached_plan(a.shape[0], b.shape[1], a.shape[1], a.dtype, workspace.world_size, num_sms(a))
        workspace.reserve(chosen.staging_bytes, chosen.flags)
        with timeouts_named(workspace, "matmul_all_reduce"):
            launch(a, b, bias, out, plan=chosen, op=op, launcher=launcher, **launch_arguments(workspace))

    repeat(workspace, ("matmul_all_reduce", op), (a, b, bias, out), first)
