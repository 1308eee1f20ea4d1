"""out = reduce_scatter(a @ b + bias): every rank gets the sum of its own block of rows or of columns.

Each rank computes the peers' blocks first and stores them in the owners' staging memory, its own block last, and adds
the peers' partials to it in the epilogue: no separate kernel, no barrier.

stores  a tile is sent by plain stores, for which its program stops multiplying
tma     between two ranks a tile can be sent by TMA while the next one is multiplied

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
    tiles_for,
    with_scratch_memory,
)
from symmpatterns.triton_kernels._sync import begin_call, count_call, publish, raise_if_interpreted_call_failed
from symmpatterns.triton_kernels._tiles import (
    finish_sends_by_tma,
    finish_tile,
    idle,
    reduce_tile,
    round_to,
    send_tile,
    send_tile_by_tma,
    sending_descriptor,
    store_tile,
    tile_position,
    tile_product,
)
from symmpatterns.triton_kernels._workspace import WorkspaceLike, num_sms


@triton.jit(do_not_specialize=["M", "block_m", "step_m", "rank", "site", "timeout_ns"])
def reduce_scatter_kernel(
    a, b, bias, scale_a, scale_b, out, staging_ptrs, flag_ptrs, state_ptr, M, N, K, block_m, block_n, step_m, step_n,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, stride_sa, stride_sb, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, AVERAGE: tl.constexpr, PARTIAL: tl.constexpr, STAGGER: tl.constexpr,
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
    if STAGGER:
        idle(program * STAGGER)
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
        partial = finish_tile(
            acc, bias, scale_a, scale_b, stride_sa, stride_sb, first_m, first_n, M - first_m, N, PARTIAL, BM, BN
        )
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
    count_call(state_ptr, ticket, programs)


@triton.jit(do_not_specialize=["M", "block_m", "step_m", "rank", "site", "timeout_ns"])
def reduce_scatter_tma_kernel(
    a, b, bias, scale_a, scale_b, out, staging_ptrs, flag_ptrs, state_ptr, M, N, K, block_m, block_n, step_m, step_n,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, stride_sa, stride_sb, rank, site, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    A_DESC: tl.constexpr, B_DESC: tl.constexpr, AVERAGE: tl.constexpr, PARTIAL: tl.constexpr, STAGGER: tl.constexpr,
):  # fmt: skip
    """reduce_scatter_kernel between two ranks, with tiles sent by TMA while the next one is multiplied.

    The same slots, flags and order. A tile's flag is written one tile later, when its copy has had the time to arrive,
    but before this program waits for anything: what the peer waits for still depends on no wait.
    """
    tl.static_assert(WORLD_SIZE == 2)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    peer = 1 - rank
    tiles_m = tl.cdiv(block_m, BM)
    tiles_n = tl.cdiv(block_n, BN)
    chunk = tiles_m * tiles_n
    ticket, half = begin_call(state_ptr, site)
    slots = sending_descriptor(staging_ptrs, half, peer, WORLD_SIZE * chunk, WORLD_SIZE, PARTIAL, BM, BN)
    if STAGGER:
        idle(program * STAGGER)
    sent = -1  # the slot whose flag is still to be written
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
        partial = finish_tile(
            acc, bias, scale_a, scale_b, stride_sa, stride_sb, first_m, first_n, M - first_m, N, PARTIAL, BM, BN
        )
        if sent >= 0:
            finish_sends_by_tma()
            publish(flag_ptrs, half, peer, sent, ticket, WORLD_SIZE)
            sent = -1
        if owner != rank:
            sent = rank * chunk + index
            send_tile_by_tma(slots, sent, partial, BM)
        else:
            total = reduce_tile(
                staging_ptrs, flag_ptrs, state_ptr, half, rank, index, chunk, partial, block_m - local_m, ticket,
                timeout_ns, WORLD_SIZE, BM, BN, AVERAGE,
            )  # fmt: skip
            result = round_to(total, out.dtype.element_ty)
            store_tile(out, result, local_m, local_n, block_m, block_n, stride_om, stride_on, BM, BN)
    if sent >= 0:
        finish_sends_by_tma()
        publish(flag_ptrs, half, peer, sent, ticket, WORLD_SIZE)
    count_call(state_ptr, ticket, programs)


# --- host side ----------------------------------------------------------------------------------------------------

VARIANTS = {"stores": reduce_scatter_kernel, "tma": reduce_scatter_tma_kernel}


@dataclass(frozen=True, kw_only=True)
class Plan(_plan.Plan):
    """As every plan (`rows` are rows of every block), and

    scatter_dim  0: rank r gets rows r M/W ... of the sum; 1: columns r N/W ...
    stagger      clock cycles between the beginnings of one program and the next
    variant      one of VARIANTS
    """

    scatter_dim: int
    stagger: int
    variant: str


def _block(M: int, N: int, scatter_dim: int, world_size: int) -> tuple[int, int]:
    """Rows and columns of one rank's block of [M, N]."""
    if (M, N)[scatter_dim] % world_size:
        raise ValueError(f"dimension {scatter_dim} of [{M}, {N}] cannot be scattered evenly over {world_size} ranks")
    return (M // world_size, N) if scatter_dim == 0 else (M, N // world_size)


def plan(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    world_size: int,
    num_sms: int,
    *,
    scatter_dim: int = 0,
    partial: torch.dtype | None = None,
    per_sm: int = 1,
    stagger: int = 0,
    variant: str = "stores",
    **overrides: Any,
) -> Plan:
    """The plan for reduce_scatter(a[M, K] @ b[K, N]); a function of its arguments alone.

    `dtype` is that of a and b, `partial` that of the products as they are sent (default: `dtype`; bf16 for float8).
    `num_sms` must be that of the smallest GPU of the group, and `per_sm` programs have to fit on a multiprocessor. What
    is given by keyword for `_plan.sizes` overrides the table. Raises ValueError for shapes that cannot be scattered,
    TypeError for a dtype the kernels do not take.
    """
    if scatter_dim not in (0, 1):
        raise ValueError(f"scatter_dim must be 0 or 1, not {scatter_dim}")
    block_m, block_n = _block(M, N, scatter_dim, world_size)
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {list(VARIANTS)}, not {variant!r}")
    if variant == "tma" and world_size != 2:
        variant = "stores"
    sent, _ = sent_dtypes(dtype, partial, None)

    def needs(rows: int, BM: int, BN: int) -> tuple[int, int]:
        """(bytes of staging, flags): a slot and a flag for each source and tile of the own block."""
        slots = world_size * triton.cdiv(rows, BM) * triton.cdiv(block_n, BN)
        return slots * BM * BN * sent.itemsize, slots

    table = tiles_for(block_m, dtype, large=block_m > 128)
    common = sizes(block_m, table, needs, programs=per_sm * num_sms, **overrides)
    return Plan(scatter_dim=scatter_dim, stagger=stagger, variant=variant, **common)


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
    """out = this rank's block of sum (op "avg": mean) over ranks of a[M, K] @ b[K, N] + bias[N], on the current stream.

    out: [M/W, N] for scatter_dim 0, [M, N/W] for 1. The rest is as in
    `matmul_all_reduce.launch`, without batches.
    """
    M, K = a.shape
    N = b.shape[1]
    by_rows = plan.scatter_dim == 0
    block_m, block_n = _block(M, N, plan.scatter_dim, world_size)
    check_call(plan, op)
    check_matmul(a, b, bias, out, out_shape=(block_m, block_n), scales=scales, partial=partial)
    if block_n == 0:
        return
    # Triton's interpreter insists that a TMA block starts at a multiple of 16 bytes along the contiguous dimension.
    item = a.element_size()
    a_allowed = plan.use_tma and (not by_rows or a.stride(1) == 1 or block_m * item % 16 == 0)
    b_allowed = plan.use_tma and (by_rows or b.stride(0) == 1 or block_n * item % 16 == 0)
    scale_a, scale_b = spread(scales, M, N)
    b_arg, b_desc = describe(b, (plan.BK, plan.BN), allowed=b_allowed)
    for start in range(0, block_m, plan.rows):
        rows = min(plan.rows, block_m - start)
        # The same rows of every block: they start `start` rows into each.
        a_rows = a[start:] if by_rows else a[start : start + rows]
        a_arg, a_desc = describe(a_rows, (plan.BM, plan.BK), allowed=a_allowed)
        tiles = world_size * triton.cdiv(rows, plan.BM) * triton.cdiv(block_n, plan.BN)
        args = (
            a_arg, b_arg, bias, None if scale_a is None else scale_a[start:], scale_b, out[start : start + rows],
            staging_ptrs, flag_ptrs, state, a_rows.shape[0], N, K,
            rows, block_n, block_m if by_rows else 0, 0 if by_rows else block_n,
            *a.stride(), *b.stride(), *out.stride(), *strides_of(scale_a, scale_b), rank, site, int(timeout_s * 1e9),
        )  # fmt: skip
        constants = plan.constants(world_size, a_desc, b_desc) | {
            "AVERAGE": op == "avg",
            "PARTIAL": TRITON_DTYPES[partial or out.dtype],
            "STAGGER": plan.stagger,
            **early(state, world_size * out.nbytes),
        }
        start_kernel = with_scratch_memory(launcher, a.device) if plan.variant == "tma" else launcher
        start_kernel(VARIANTS[plan.variant], min(plan.programs, tiles), _SOURCES, args, constants)
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
    scatter_dim: int = 0,
    scales: Scales = (None, None),
    partial: torch.dtype | None = None,
    **overrides: Any,
) -> None:
    """`launch` with the table's plan, or what `overrides` make of it, on a workspace; see `run_planned`."""

    def choose() -> Plan:
        return _cached_plan(
            a.shape[0], b.shape[1], a.shape[1], a.dtype, workspace.world_size, num_sms(a), scatter_dim=scatter_dim,
            partial=partial or out.dtype, **overrides,
        )  # fmt: skip

    start = functools.partial(launch, a, b, bias, out, op=op, scales=scales, partial=partial)
    options = op, scatter_dim, partial, *overrides.items()
    run_planned(workspace, "matmul_reduce_scatter", options, (a, b, bias, out, *scales), choose, start)
