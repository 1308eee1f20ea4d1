"""norm = rms_norm(all_reduce(x) + residual) * weight, without any barrier: the data is its own flag (_sentinel.py).

A program has one row. It stores its x into every peer, loads what each of them has stored here, sums in rank order in
fp32, and normalises. It waits only for the peers' programs of the same row, so any number of rows may run at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from symmpatterns.triton_kernels._launch import Launcher, early, launch_kernel, repeat
from symmpatterns.triton_kernels._sentinel import as_message, await_head, receive, send
from symmpatterns.triton_kernels._sync import begin_call, count_call, raise_if_interpreted_call_failed
from symmpatterns.triton_kernels._workspace import WorkspaceLike, errors_named, launch_arguments

_MANY_ROWS = 256
_ALIGNMENT = 16  # bytes between rows in the peers' memory are a multiple of this


@triton.jit(do_not_specialize=["rank", "site", "timeout_ns"])
def all_reduce_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    norm_ptr,
    total_ptr,
    sentinel_ptrs,
    flag_ptrs,
    state_ptr,
    rank,
    site,
    timeout_ns,
    eps,
    columns,
    place,
    WORLD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    AVERAGE: tl.constexpr,
):
    """x, residual, norm, total [rows, columns], one program a row; `place`: elements of a row in the peers' memory."""
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    ticket, half = begin_call(state_ptr, site)
    offs = tl.arange(0, BLOCK)
    mask = offs < columns
    start = row.to(tl.int64) * columns
    x = tl.load(x_ptr + start + offs, mask=mask, other=0.0)
    # All that is loaded at all is loaded before the waiting, which hides it.
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + start + offs, mask=mask, other=0.0)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    own = as_message(x)
    for distance in tl.static_range(1, WORLD_SIZE):
        peer = (rank + distance) % WORLD_SIZE
        send(sentinel_ptrs, half, rank, peer, row, rows, place, offs, own, mask, ticket, WORLD_SIZE)
    count_call(state_ptr, ticket, rows)
    total = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(WORLD_SIZE):
        part = own
        if source != rank:
            await_head(
                sentinel_ptrs, flag_ptrs, half, rank, source, row, ticket, state_ptr, timeout_ns, WORLD_SIZE
            )  # fmt: skip
            part = receive(
                sentinel_ptrs, half, rank, source, row, rows, place, offs, mask, ticket, state_ptr, timeout_ns,
                WORLD_SIZE, own.dtype,
            )  # fmt: skip
        total += part.to(x.dtype, bitcast=True).to(tl.float32)
    if AVERAGE:
        total = total / WORLD_SIZE
    if HAS_RESIDUAL:
        total += residual.to(tl.float32)
    tl.store(total_ptr + start + offs, total.to(x.dtype), mask=mask)
    norm = total * (1.0 / tl.sqrt(tl.sum(total * total, axis=0) / columns + eps))
    if HAS_WEIGHT:
        norm = norm * weight.to(tl.float32)
    tl.store(norm_ptr + start + offs, norm.to(x.dtype), mask=mask)


def _num_warps(rows: int, block: int) -> int:
    """Few rows leave multiprocessors idle, so a program gets many warps for its row; with many rows programs share them.

    Measured on two H100 (docs/performance.md).
    """
    return min(32, max(1, block // (1024 if rows >= _MANY_ROWS else 512)))


def launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    norm: torch.Tensor,
    total: torch.Tensor,
    *,
    sentinel_ptrs: torch.Tensor,
    staging_ptrs: torch.Tensor,
    flag_ptrs: torch.Tensor,
    state: torch.Tensor,
    rank: int,
    world_size: int,
    timeout_s: float,
    site: int = 0,
    op: str = "sum",
    eps: float = 1e-6,
    launcher: Launcher = launch_kernel,
) -> None:
    """One call on the current stream; all [M, N] and contiguous, M at most MAX_ROWS. Halves of the sentinel memory have
    `needed_bytes`; `staging_ptrs` is not used. A peer that does not come is an error as in `matmul_all_reduce.launch`.
    """
    rows, columns = x.shape
    block = triton.next_power_of_2(columns)
    place = -(-columns * x.element_size() // _ALIGNMENT) * _ALIGNMENT // x.element_size()
    operands = (x, x if residual is None else residual, x if weight is None else weight, norm, total)
    args = (*operands, sentinel_ptrs, flag_ptrs, state, rank, site, int(timeout_s * 1e9), float(eps), columns, place)
    constants = {
        "WORLD_SIZE": world_size,
        "BLOCK": block,
        "HAS_RESIDUAL": residual is not None,
        "HAS_WEIGHT": weight is not None,
        "AVERAGE": op == "avg",
        "num_warps": _num_warps(rows, block),
        "num_stages": 1,
        **early(state, x.nbytes),
    }
    sources = {"x_ptr": 0, "norm_ptr": 3, "total_ptr": 4}
    sources["residual_ptr"] = 0 if residual is None else 1
    sources["weight_ptr"] = 0 if weight is None else 2
    launcher(all_reduce_rms_norm_kernel, rows, sources, args, constants)
    raise_if_interpreted_call_failed(state, rank)


def run(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    norm: torch.Tensor,
    total: torch.Tensor,
    workspace: WorkspaceLike,
    op: str,
    eps: float,
    *,
    sentinel_ptrs: torch.Tensor,
) -> None:
    """`launch` on a workspace and its sentinel memory, whose table stays where it is.

    Raises SymmetricMemoryTimeout when a peer does not come.
    """

    def first(launcher: Launcher) -> None:
        with errors_named(workspace, "all_reduce_rms_norm"):
            launch(
                x, residual, weight, norm, total, sentinel_ptrs=sentinel_ptrs, op=op, eps=eps,
                launcher=launcher, **launch_arguments(workspace),
            )  # fmt: skip

    repeat(workspace, ("all_reduce_rms_norm", op, eps), (x, residual, weight, norm, total), first)
