"""torch.ops.symmpatterns.all_reduce_rms_norm: ``rms_norm(all_reduce(x) + residual)``, and the sum itself."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from symmpatterns import config
from symmpatterns.operators import _autograd
from symmpatterns.operators._common import (
    as_rows,
    check_reduce_op,
    define,
    implement,
    library,
    no_tensor,
    remember,
    signature,
    workspace_for,
)
from symmpatterns.operators._kernels import implementation_of
from symmpatterns.sentinel_memory import reserve
from symmpatterns.workspace import Workspace, find_workspace

NAME = "all_reduce_rms_norm"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_COLUMNS = 16384  # a row is one program's
# Rows of so many bytes, over all other ranks, go into one call. Triton: what a rank receives lies in memory of this size,
# twice, and fewer rows would not fill the GPU. Host: measured on two ranks.
_BLOCK_BYTES = {"triton": 32 << 20, "aten": 4 << 20}

define(
    "all_reduce_rms_norm(Tensor x, Tensor? residual, Tensor? weight, float eps, str reduce_op, str group_name)"
    " -> (Tensor, Tensor)"
)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, reduce_op: str) -> None:
    check_reduce_op(NAME, reduce_op)
    if not eps >= 0:
        raise ValueError(f"{NAME}: eps is a number that is not negative, not {eps}")
    if x.ndim == 0:
        raise ValueError(f"{NAME}: x must have a dimension to normalise over")
    if x.dtype not in DTYPES:
        raise TypeError(f"{NAME}: takes {', '.join(map(str, DTYPES))}, not {x.dtype}")
    for name, other in (("residual", residual), ("weight", weight)):
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise TypeError(
                f"{NAME}: {name} must be {x.dtype} on {x.device}, as x is, not {other.dtype} on {other.device}"
            )
    if residual is not None:
        torch._check_value(
            residual.shape == x.shape,
            lambda: f"{NAME}: residual must have the shape of x, {list(x.shape)}, not {list(residual.shape)}",
        )
    if weight is not None:
        torch._check_value(
            weight.ndim == 1 and weight.shape[0] == x.shape[-1],
            lambda: f"{NAME}: weight must have shape [{x.shape[-1]}], not {list(weight.shape)}",
        )
    torch._check_value(
        x.shape[-1] <= MAX_COLUMNS, lambda: f"{NAME}: rows have at most {MAX_COLUMNS} elements, not {x.shape[-1]}"
    )


def all_reduce_rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, reduce_op: str, group_name: str
) -> tuple[Tensor, Tensor]:
    """The same with torch's functional collective, in fp32 behind it."""
    collective = torch.ops._c10d_functional
    total = collective.wait_tensor(collective.all_reduce(x.contiguous(), reduce_op, group_name)).float()
    if residual is not None:
        total = total + residual
    norm = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        norm = norm * weight
    return norm.to(x.dtype), total.to(x.dtype)


@torch.library.register_fake(f"symmpatterns::{NAME}", lib=library)
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, reduce_op: str, group_name: str
) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight, eps, reduce_op)
    return x.new_empty(x.shape), x.new_empty(x.shape)


_SITE = ("operator", "rows", "columns", "dtype", "reduce_op", "residual", "weight", "kernels")


def _all_reduce_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    reduce_op: str,
    group_name: str,
    *,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm, total): total = all ranks' x, summed or averaged, + residual; norm = its RMSNorm over rows, * weight.

    x and residual [..., N], weight [N], of bf16, fp16 or fp32, N at most 16384; both results like x. The sum runs over
    the ranks in order, in fp32, and is rounded once for `total`; the norm is taken of the sum before that, with
    ``total / sqrt(mean(total ** 2) + eps)``. All ranks that have the same residual and weight get the same bits. Raises
    like matmul_all_reduce.
    """
    if x is None:
        raise no_tensor(NAME, x)
    key = (NAME, reduce_op, eps, config.host_kernels, signature(x), signature(residual), signature(weight))
    workspace = workspace or find_workspace(group_name, x.device)
    known = None if workspace is None else workspace.ready.get(key)
    if workspace is None or known is None:
        _check(x, residual, weight, eps, reduce_op)
        workspace = workspace or workspace_for(NAME, x, group_name)
        if workspace is None:
            return all_reduce_rms_norm_reference(x, residual, weight, eps, reduce_op, group_name)
        kernels = "triton" if x.is_cuda else config.host_kernels
        rows = as_rows(x)
        with workspace.call(NAME):
            options = (reduce_op, residual is not None, weight is not None, kernels)
            number = workspace.agree(_SITE, (NAME, *rows.shape, x.dtype, *options))
            row_bytes = rows.shape[1] * x.element_size()
            block = max(1, min(rows.shape[0], _BLOCK_BYTES[kernels] // max(row_bytes * (workspace.world_size - 1), 1)))
            implementation = implementation_of(NAME, kernels, x) if x.numel() > 0 else None
            if kernels == "triton" and implementation is not None:
                from symmpatterns.triton_kernels._sentinel import MAX_ROWS, needed_bytes

                block = min(block, MAX_ROWS)
                workspace.reserve(1, workspace.world_size)  # flags
                table = reserve(workspace, needed_bytes(block, row_bytes, workspace.world_size))
                implementation = functools.partial(implementation, sentinel_ptrs=table)
        known = number, block, implementation
        remember(workspace, key, known)
    number, block, implementation = known
    # Contiguous, as the kernels read and write them.
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    weight = None if weight is None else weight.contiguous()
    norm, total = torch.empty_like(x), torch.empty_like(x)
    if implementation is None:
        return norm, total
    matrices: tuple[Tensor | None, ...] = (x, residual, norm, total)
    if x.ndim != 2:
        matrices = tuple(None if each is None else as_rows(each) for each in matrices)
    count = x.numel() // x.shape[-1]
    with workspace.call(NAME, number):
        for first in range(0, count, block):
            part = matrices
            if count > block:
                part = tuple(None if each is None else each[first : first + block] for each in matrices)
            implementation(part[0], part[1], weight, *part[2:], workspace, reduce_op, eps)
    return norm, total


implement(NAME, _all_reduce_rms_norm)
_autograd.differentiate(NAME, _all_reduce_rms_norm, _autograd.without_gradient(NAME, ""))
