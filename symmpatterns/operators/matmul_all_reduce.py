"""torch.ops.symmpatterns.matmul_all_reduce: ``all_reduce(a @ b + bias)``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symmpatterns import config
from symmpatterns.operators import _autograd
from symmpatterns.operators._common import (
    FLOAT8,
    check_inner,
    check_operands,
    check_reduce_op,
    check_scales,
    define,
    dtypes_of,
    flat,
    implement,
    library,
    no_tensor,
    nothing,
    product_reference,
    remember,
    signature,
    workspace_for,
)
from symmpatterns.operators._kernels import matmul_implementation
from symmpatterns.workspace import Workspace, find_workspace

define(
    "matmul_all_reduce(Tensor a, Tensor b, str reduce_op, str group_name, *, Tensor? bias=None, Tensor? scale_a=None,"
    " Tensor? scale_b=None, ScalarType? partial_dtype=None, ScalarType? out_dtype=None) -> Tensor"
)


def _check(
    a: Tensor,
    b: Tensor,
    reduce_op: str,
    bias: Tensor | None,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    partial_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[list[int], torch.dtype, torch.dtype]:
    """(shape of the result, dtype of the partial products, dtype of the result)"""
    op = "matmul_all_reduce"
    if a.ndim != 2 and not a.ndim == b.ndim == 3:
        raise ValueError(f"{op}: a must have 2 dimensions, not shape {list(a.shape)}; or both 3, for a batch")
    if b.ndim != a.ndim:
        raise ValueError(f"{op}: b must have 2 dimensions, not shape {list(b.shape)}; or both 3, for a batch")
    check_operands(op, a, b, bias, partial_dtype)
    partial, out = dtypes_of(op, a, partial_dtype, out_dtype)
    check_reduce_op(op, reduce_op)
    check_inner(op, a, b)
    if a.ndim == 3:
        torch._check_value(
            a.shape[0] == b.shape[0], lambda: f"{op}: a has a batch of {a.shape[0]} matrices, b of {b.shape[0]}"
        )
        if a.dtype == FLOAT8:
            raise ValueError(f"{op}: a batch of {FLOAT8} products is not supported: multiply matrix by matrix")
    check_scales(op, a, b, a.shape[-2], scale_a, scale_b)
    return [*a.shape[:-1], b.shape[-1]], partial, out


def matmul_all_reduce_reference(
    a: Tensor,
    b: Tensor,
    reduce_op: str,
    group_name: str,
    *,
    bias: Tensor | None = None,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    partial_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """all_reduce(a @ b + bias) with torch's matmul and functional collective."""
    partial_dtype, out_dtype = dtypes_of("matmul_all_reduce", a, partial_dtype, out_dtype)
    partial = product_reference(a, b, bias, partial_dtype, scale_a, scale_b).to(out_dtype)
    collective = torch.ops._c10d_functional
    return collective.wait_tensor(collective.all_reduce(partial, reduce_op, group_name))


@torch.library.register_fake("symmpatterns::matmul_all_reduce", lib=library)
def _(
    a: Tensor,
    b: Tensor,
    reduce_op: str,
    group_name: str,
    *,
    bias: Tensor | None = None,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    partial_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    shape, _, out = _check(a, b, reduce_op, bias, scale_a, scale_b, partial_dtype, out_dtype)
    return a.new_empty(shape, dtype=out)


_SITE = ("operator", "batch", "M", "N", "dtypes", "reduce_op", "kernels")


def _matmul_all_reduce(
    a: Tensor,
    b: Tensor,
    reduce_op: str,
    group_name: str,
    *,
    bias: Tensor | None = None,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    partial_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """All ranks' ``a @ b`` (+ bias), reduced: [M, K] @ [K, N] + [N], or a batch [B, M, K] @ [B, K, N] + [B, N] or [N].

    a and b of any strides, bf16, fp16 or fp32; or (not in a batch) float8_e4m3fn with float32 scales, of one element or
    of M and N. Each partial product is rounded once, to `partial_dtype` (default: the operands'; bf16 for float8), and
    sent so. The sum runs over the ranks in order, in fp32, and is rounded to `out_dtype` (default: `partial_dtype`; or
    fp32): all ranks get the same bits. Raises ValueError, TypeError or SymmetricMemoryError for operands or groups that
    do not fit, DivergenceError when ranks call with different shapes, SymmetricMemoryTimeout when a rank does not come.
    """
    op = "matmul_all_reduce"
    if a is None or b is None:
        raise no_tensor(op, a)
    if bias is not None:
        # As the kernels read it; one row for a whole batch is repeated.
        bias = (bias.expand(b.shape[0], -1) if bias.ndim == 1 and b.ndim == 3 else bias).contiguous()
    # Spelled out, because a decode step makes this call for every layer.
    operands = (a.shape, b.shape, a.dtype, b.dtype, a.device, b.device, partial_dtype, out_dtype)
    options = None if bias is None and scale_a is None else (signature(bias), signature(scale_a), signature(scale_b))
    key = (op, reduce_op, config.host_kernels, operands, options)
    workspace = workspace or find_workspace(group_name, a.device)
    known = None if workspace is None else workspace.ready.get(key)
    if workspace is None or known is None:
        shape, partial, result = _check(a, b, reduce_op, bias, scale_a, scale_b, partial_dtype, out_dtype)
        workspace = workspace or workspace_for(op, a, group_name)
        if workspace is None:
            return matmul_all_reduce_reference(
                a, b, reduce_op, group_name, bias=bias, scale_a=scale_a, scale_b=scale_b, partial_dtype=partial,
                out_dtype=result,
            )  # fmt: skip
        kernels = "triton" if a.is_cuda else config.host_kernels
        with workspace.call(op):  # K may differ between ranks, and one of them may add a bias
            *batch, m, n = shape
            dtypes = (a.dtype, partial, result)
            number = workspace.agree(_SITE, (op, tuple(batch), m, n, dtypes, reduce_op, kernels))
            implementation = nothing
            if 0 not in shape:
                size, sent = (math.prod([*batch, m]), n, a.shape[-1]), m * n * partial.itemsize // workspace.world_size
                implementation = matmul_implementation(
                    op, kernels, a, workspace, size, sent, can_copy=not batch and a.shape[-1] > 0
                )
        known = number, shape, partial, result, implementation
        remember(workspace, key, known)
    number, shape, partial, result, implementation = known
    out = a.new_empty(shape, dtype=result)
    with workspace.call(op, number):
        implementation(a, b, bias, out, workspace, reduce_op, (flat(scale_a), flat(scale_b)), partial)
    return out


implement("matmul_all_reduce", _matmul_all_reduce)
_autograd.differentiate("matmul_all_reduce", _matmul_all_reduce, _autograd.matmul_all_reduce)
