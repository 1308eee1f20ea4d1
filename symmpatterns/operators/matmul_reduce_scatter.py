"""torch.ops.symmpatterns.matmul_reduce_scatter: ``reduce_scatter(a @ b + bias)`` along any dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symmpatterns import config
from symmpatterns.groups import get_group
from symmpatterns.operators import _autograd
from symmpatterns.operators._common import (
    as_rows,
    check_dim,
    check_inner,
    check_matrix,
    check_operands,
    check_reduce_op,
    check_scales,
    define,
    dtypes_of,
    flat,
    implement,
    leads,
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
    "matmul_reduce_scatter(Tensor a, Tensor b, str reduce_op, int scatter_dim, str group_name, *, Tensor? bias=None,"
    " Tensor? scale_a=None, Tensor? scale_b=None, ScalarType? partial_dtype=None, ScalarType? out_dtype=None) -> Tensor"
)


def _check(
    a: Tensor,
    b: Tensor,
    reduce_op: str,
    scatter_dim: int,
    world_size: int,
    bias: Tensor | None,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    partial_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[int, list[int], torch.dtype, torch.dtype]:
    """(scatter_dim from the front, shape of the result, dtype of the partial products, dtype of the result)"""
    op = "matmul_reduce_scatter"
    if a.ndim < 2:
        raise ValueError(f"{op}: a must have at least 2 dimensions, not shape {list(a.shape)}")
    check_matrix(op, b)
    check_operands(op, a, b, bias, partial_dtype)
    partial, out = dtypes_of(op, a, partial_dtype, out_dtype)
    check_reduce_op(op, reduce_op)
    check_inner(op, a, b)
    check_scales(op, a, b, math.prod(a.shape[:-1]), scale_a, scale_b)
    dim = check_dim(op, "scatter_dim", scatter_dim, a.ndim)
    shape = [*a.shape[:-1], b.shape[1]]
    if shape[dim] % world_size != 0:  # AssertionError is what the functional collective raises
        raise AssertionError(
            f"{op}: dimension {dim} of the product has size {shape[dim]}, which must be a multiple of the group's size "
            f"{world_size}"
        )
    shape[dim] = shape[dim] // world_size
    return dim, shape, partial, out


def matmul_reduce_scatter_reference(
    a: Tensor,
    b: Tensor,
    reduce_op: str,
    scatter_dim: int,
    group_name: str,
    *,
    bias: Tensor | None = None,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    partial_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """reduce_scatter(a @ b + bias) along `scatter_dim` with torch's matmul and functional collective."""
    world_size = get_group(group_name).world_size
    partial_dtype, out_dtype = dtypes_of("matmul_reduce_scatter", a, partial_dtype, out_dtype)
    product = product_reference(a, b, bias, partial_dtype, scale_a, scale_b).to(out_dtype)
    if scatter_dim % product.ndim != 0:
        product = torch.cat(product.chunk(world_size, scatter_dim))
    collective = torch.ops._c10d_functional
    return collective.wait_tensor(collective.reduce_scatter_tensor(product, reduce_op, world_size, group_name))


@torch.library.register_fake("symmpatterns::matmul_reduce_scatter", lib=library)
def _(
    a: Tensor,
    b: Tensor,
    reduce_op: str,
    scatter_dim: int,
    group_name: str,
    *,
    bias: Tensor | None = None,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    partial_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    world_size = get_group(group_name).world_size
    options = (bias, scale_a, scale_b, partial_dtype, out_dtype)
    _, shape, _, out = _check(a, b, reduce_op, scatter_dim, world_size, *options)
    return a.new_empty(shape, dtype=out)


_SITE = ("operator", "rows", "N", "dtypes", "reduce_op", "scatter_dim", "kernels")


def _matmul_reduce_scatter(
    a: Tensor,
    b: Tensor,
    reduce_op: str,
    scatter_dim: int,
    group_name: str,
    *,
    bias: Tensor | None = None,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    partial_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """This rank's share of the reduced ``a @ b`` (+ bias); a [..., K], b [K, N].

    Dimension `scatter_dim` of the product [..., N] is cut into one chunk a rank. Dtypes, scales (one for each row of the
    flattened a), rounding and the order of the sum are as in matmul_all_reduce. Raises like it, and AssertionError, as
    torch's functional reduce-scatter does, when the dimension does not divide.
    """
    op = "matmul_reduce_scatter"
    if a is None or b is None:
        raise no_tensor(op, a)
    if bias is not None:
        bias = bias.contiguous()  # as the kernels read it
    tensors = [signature(tensor) for tensor in (a, b, bias, scale_a, scale_b)]
    key = (op, reduce_op, scatter_dim, config.host_kernels, partial_dtype, out_dtype, *tensors)
    workspace = workspace or find_workspace(group_name, a.device)
    known = None if workspace is None else workspace.ready.get(key)
    if workspace is None or known is None:
        world_size = get_group(group_name).world_size
        options = (bias, scale_a, scale_b, partial_dtype, out_dtype)
        dim, shape, partial, result = _check(a, b, reduce_op, scatter_dim, world_size, *options)
        workspace = workspace or workspace_for(op, a, group_name)
        if workspace is None:
            return matmul_reduce_scatter_reference(
                a, b, reduce_op, dim, group_name, bias=bias, scale_a=scale_a, scale_b=scale_b, partial_dtype=partial,
                out_dtype=result,
            )  # fmt: skip
        kernels = "triton" if a.is_cuda else config.host_kernels
        with workspace.call(op):
            dtypes = (a.dtype, partial, result)
            site = (op, tuple(a.shape[:-1]), b.shape[1], dtypes, reduce_op, dim, kernels)
            number = workspace.agree(_SITE, site)
            implementation = nothing
            if math.prod(shape) > 0:
                size, sent = (math.prod(a.shape[:-1]), b.shape[1], a.shape[-1]), math.prod(shape) * partial.itemsize
                implementation = matmul_implementation(op, kernels, a, workspace, size, sent, can_copy=a.shape[-1] > 0)
        known = number, dim, shape, partial, result, implementation
        remember(workspace, key, known)
    number, dim, shape, partial, result, implementation = known
    columns = dim == a.ndim - 1
    if not columns and not leads(dim, a.shape):
        # The kernel scatters whole rows, so each rank's rows come together.
        if scale_a is not None and scale_a.numel() > 1:
            scale_a = scale_a.reshape(a.shape[:-1]).unflatten(dim, (workspace.world_size, -1)).movedim(dim, 0)
        a = a.unflatten(dim, (workspace.world_size, -1)).movedim(dim, 0)
    out = a.new_empty(math.prod(shape[:-1]), shape[-1], dtype=result)
    with workspace.call(op, number):
        scales = flat(scale_a), flat(scale_b)
        implementation(as_rows(a), b, bias, out, workspace, reduce_op, 1 if columns else 0, scales, partial)
    return out.view(shape)


implement("matmul_reduce_scatter", _matmul_reduce_scatter)
_autograd.differentiate("matmul_reduce_scatter", _matmul_reduce_scatter, _autograd.matmul_reduce_scatter)
