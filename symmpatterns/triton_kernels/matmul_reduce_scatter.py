"""out = reduce_scatter(a @ b + bias): every rank gets the sum of its own block of rows or of columns.

Each rank computes the peers' blocks first and stores them in the owners' staging memory, its own block last, and adds
the peers' partials to it in the epilogue: no separate kernel, no barrier.

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
    reduce_tile,
    round_to,
    send_tile,
    store_tile,
    tile_position,
    tile_product,
    tiles_for,
)
from symmpatterns.triton_kernels._workspace import WorkspaceLike, errors_named, launch_arguments, num_sms


@triton.jit(do_not_specialize=["M", "block_m", "step_m", "rank", "site", "timeout_ns"])
def reduce_scatter_kernel(
    a, b, bias, out, staging_ptrs, flag_ptrs, state_ptr, M, N, K, block_m, block_n, step_m, step_n,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """Persistent programs, all resident at once. Rank r's block of a @ b: block_m x block_n from (r step_m, r step_n).

    Staging slots and flags at the owner: partials by source and tile. Every program has sent what the peers wait for
    before it waits.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles_m = tl.cdiv(block_m, BM)
    tiles_n = tl.cdiv(block_n, BN)
    chunk = tiles_m * tiles_n
    ticket, half = begin_call(state_ptr, site)
    for step in tl.range(program, chunk * WORLD_SIZE, programs):
        owner = (rank + 1 + step // chunk) % WORLD_SIZE
        index = step % chunk
        position_m, position_n = tile_position(index, tiles_m, tiles_n, GROUP_M)
        local_m = position_m * BM
        local_n = position_n * BN
        first_m = owner * step_m + local_m
        first_n = owner * step_n + local_n
        acc = tile_product(
            tl.zeros([BM, BN], tl.float32), a, b, first_m, first_n, 0, M, N, K,
            stride_am, stride_ak, stride_bk, stride_bn, BM, BN, BK, A_DESC, B_DESC,
        )  # fmt: skip
        partial = round_to(add_bias(acc, bias, first_n, N, BN), out.dtype.element_ty)
        if owner != rank:
            slot = rank * chunk + index
            send_tile(staging_ptrs, half, owner, slot, partial, block_m - local_m, WORLD_SIZE, BM, BN)
            publish(flag_ptrs, half, owner, slot, ticket, WORLD_SIZE)
        else:
            total = reduce_tile(
                staging_ptrs, flag_ptrs, state_ptr, half, rank, index, chunk, partial, block_m - local_m, ticket,
                timeout_ns, WORLD_SIZE, BM, BN, AVERAGE,
            )  # fmt: skip
            result = round_to(total, out.dtype.element_ty)
            store_tile(out, result, local_m, local_n, block_m, block_n, stride_om, stride_on, BM, BN)
    end_call(state_ptr, ticket, programs)


# --- host side ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How one shape is computed; must be equal on all ranks of the group.

    scatter_dim    0: rank r gets rows r M/W ... of the sum; 1: columns r N/W ...
    BM, BN, BK     tile of the output and step along K, in elements
    programs       size of the grid, at most what is resident at once
    rows           a launch computes so many rows of every block at a time, each time as one call of the protocol
    staging_bytes  of one half of the workspace; flags: of one half. Reserve both before the launch.
    use_tma        read operands by TMA where their strides allow it
    """

    scatter_dim: int
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
    scatter_dim: int = 0,
    tile: tuple[int, int, int] | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    rows: int | None = None,
    use_tma: bool = True,
) -> Plan:
    """The plan for reduce_scatter(a[M, K] @ b[K, N]); a function of its arguments alone.

    `num_sms` must be that of the smallest GPU of the group. What is given by keyword overrides the table. Raises
    ValueError for shapes that cannot be scattered, TypeError for a dtype the kernels do not take.
    """
    if scatter_dim not in (0, 1):
        raise ValueError(f"scatter_dim must be 0 or 1, not {scatter_dim}")
    if (M, N)[scatter_dim] % world_size:
        raise ValueError(f"dimension {scatter_dim} of [{M}, {N}] cannot be scattered evenly over {world_size} ranks")
    block_m, block_n = (M // world_size, N) if scatter_dim == 0 else (M, N // world_size)
    BM, BN, BK, table_warps, table_stages = tiles_for(block_m, dtype, large=block_m > 128)
    if tile is not None:
        BM, BN, BK = tile

    def needs(rows: int) -> tuple[int, int]:
        """(bytes of staging, flags): a slot and a flag for each source and tile of the own block."""
        slots = world_size * triton.cdiv(rows, BM) * triton.cdiv(block_n, BN)
        return slots * BM * BN * dtype.itemsize, slots

    rows = fitting_rows(block_m, BM, needs) if rows is None else min(rows, max(block_m, 1))
    staging_bytes, flags = needs(min(rows, block_m))
    # The interpreter runs a rank's programs one after the other: a resident grid is one program there.
    programs = 1 if INTERPRETED else num_sms
    return Plan(
        scatter_dim, BM, BN, BK, num_warps or table_warps, num_stages or table_stages, programs, rows, staging_bytes,
        flags, use_tma,
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
    """out = this rank's block of sum (op "avg": mean) over ranks of a[M, K] @ b[K, N] + bias[N], on the current stream.

    out: [M/W, N] for scatter_dim 0, [M, N/W] for 1. a, b, out: any strides, not overlapping; bias contiguous or None;
    all of one dtype (bf16, fp16, fp32) and device. The rest is as in `matmul_all_reduce.launch`.
    """
    M, K = a.shape
    N = b.shape[1]
    by_rows = plan.scatter_dim == 0
    if (M, N)[plan.scatter_dim] % world_size:
        raise ValueError(f"dimension {plan.scatter_dim} of {[M, N]} cannot be scattered evenly over {world_size} ranks")
    block_m, block_n = (M // world_size, N) if by_rows else (M, N // world_size)
    check_matmul(a, b, bias, out, out_shape=(block_m, block_n))
    if op not in ("sum", "avg"):
        raise ValueError(f"op must be 'sum' or 'avg', not {op!r}")
    if INTERPRETED and plan.programs > 1:
        raise ValueError(f"in the interpreter a plan runs one program, not {plan.programs}: it would deadlock")
    if block_n == 0:
        return
    # Triton's interpreter insists that a TMA block starts at a multiple of 16 bytes along the contiguous dimension.
    item = a.element_size()
    a_allowed = plan.use_tma and (not by_rows or a.stride(1) == 1 or block_m * item % 16 == 0)
    b_allowed = plan.use_tma and (by_rows or b.stride(0) == 1 or block_n * item % 16 == 0)
    b_arg, b_desc = describe(b, (plan.BK, plan.BN), allowed=b_allowed)
    for start in range(0, block_m, plan.rows):
        rows = min(plan.rows, block_m - start)
        # The same rows of every block: they start `start` rows into each.
        a_rows = a[start:] if by_rows else a[start : start + rows]
        a_arg, a_desc = describe(a_rows, (plan.BM, plan.BK), allowed=a_allowed)
        tiles = world_size * triton.cdiv(rows, plan.BM) * triton.cdiv(block_n, plan.BN)
        args = (
            a_arg, b_arg, bias, out[start : start + rows], staging_ptrs, flag_ptrs, state, a_rows.shape[0], N, K,
            rows, block_n, block_m if by_rows else 0, 0 if by_rows else block_n,
            *a.stride(), *b.stride(), *out.stride(), rank, site, int(timeout_s * 1e9),
        )  # fmt: skip
        constants = {
            "WORLD_SIZE": world_size, "BM": plan.BM, "BN": plan.BN, "BK": plan.BK, "GROUP_M": GROUP_M,
            "A_DESC": a_desc, "B_DESC": b_desc, "AVERAGE": op == "avg",
            "num_warps": plan.num_warps, "num_stages": plan.num_stages,
        }  # fmt: skip
        launcher(reduce_scatter_kernel, min(plan.programs, tiles), _SOURCES, args, constants)
        raise_if_interpreted_call_failed(state, rank)


# The parameters that hold operands, as `run` counts them.
_SOURCES = {"a": 0, "b": 1, "bias": 2, "out": 3}
_cached_plan = functools.lru_cache(maxsize=4096)(plan)


def run(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: WorkspaceLike,
    op: str,
    scatter_dim: int = 0,
) -> None:
    """`launch` with the table's plan on a workspace, which grows if it must (collective then).

    Raises SymmetricMemoryTimeout when a peer does not come (interpreter; a compiled kernel traps), and what `plan`,
    `launch` and `reserve` raise.
    """

    def first(launcher: Launcher) -> None:
        chosen = _cached_plan(
            a.shape[0], b.shape[1], a.shape[1], a.dtype, workspace.world_size, num_sms(a), scatter_dim=scatter_dim
        )
        workspace.reserve(chosen.staging_bytes, chosen.flags)
        with errors_named(workspace, "matmul_reduce_scatter"):
            launch(a, b, bias, out, plan=chosen, op=op, launcher=launcher, **launch_arguments(workspace))

    repeat(workspace, ("matmul_reduce_scatter", op, scatter_dim), (a, b, bias, out), first)
