"""torch.ops.symmpatterns.all_gather_matmul: ``all_gather(a_shard) @ b + bias`` for one or several b."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from symmpatterns import config
from symmpatterns.groups import get_group
from symmpatterns.operators import _autograd
from symmpatterns.operators._common import (
    FLOAT8,
    MATMUL_DTYPES,
    as_rows,
    check_dim,
    check_inner,
    check_matrix,
    check_operands,
    check_scales,
    define,
    flat,
    implement,
    leads,
    library,
    no_tensor,
    product_reference,
    remember,
    signature,
    workspace_for,
)
from symmpatterns.operators._kernels import matmul_implementation
from symmpatterns.workspace import Workspace, find_workspace

define(
    "all_gather_matmul(Tensor a_shard, Tensor[] bs, int gather_dim, str group_name, bool return_gathered=True, *,"
    " Tensor?[]? biases=None, Tensor? scale_a=None, Tensor?[]? scale_bs=None, ScalarType? out_dtype=None)"
    " -> (Tensor?, Tensor[])"
)
_Each = Sequence[Tensor | None]  # one, or None, for each b


def _check(
    a_shard: Tensor,
    bs: Sequence[Tensor],
    gather_dim: int,
    world_size: int,
    biases: _Each | None,
    scale_a: Tensor | None,
    scale_bs: _Each | None,
    out_dtype: torch.dtype | None,
) -> tuple[int, _Each, _Each, torch.dtype]:
    """(gather_dim counted from the front, a bias or None and a scale or None for each b, dtype of the products)."""
    op = "all_gather_matmul"
    for what, each in (("biases", biases), ("scale_bs", scale_bs)):
        if each and len(each) != len(bs):
            raise ValueError(
                f"{op}: {len(each)} {what} for {len(bs)} matrices; give one or None for each, or none at all"
            )
    biases, scale_bs = biases or [None] * len(bs), scale_bs or [None] * len(bs)
    if a_shard.ndim < 2:
        raise ValueError(f"{op}: a_shard must have at least 2 dimensions, not shape {list(a_shard.shape)}")
    if len(bs) == 0:
        raise ValueError(f"{op}: bs is empty; with nothing to multiply use an all-gather")
    dim = check_dim(op, "gather_dim", gather_dim, a_shard.ndim)
    columns = dim == a_shard.ndim - 1
    rows = math.prod(a_shard.shape[:-1]) * (1 if columns else world_size)
    for b, bias, scale_b in zip(bs, biases, scale_bs):
        check_matrix(op, b)
        check_operands(op, a_shard, b, bias)
        check_inner(op, a_shard, b, world_size if columns else 1)
        check_scales(op, a_shard, b, rows, scale_a, scale_b)
    dtype = out_dtype or (torch.bfloat16 if a_shard.dtype == FLOAT8 else a_shard.dtype)
    if dtype not in (MATMUL_DTYPES if a_shard.dtype == FLOAT8 else (a_shard.dtype,)):
        raise TypeError(f"{op}: products of {a_shard.dtype} operands are not rounded to {dtype}")
    return dim, biases, scale_bs, dtype


def _gathered_shape(a_shard: Tensor, dim: int, world_size: int) -> list[int]:
    shape = list(a_shard.shape)
    shape[dim] = shape[dim] * world_size
    return shape


def all_gather_matmul_reference(
    a_shard: Tensor,
    bs: Sequence[Tensor],
    gather_dim: int,
    group_name: str,
    return_gathered: bool = True,
    *,
    biases: _Each | None = None,
    scale_a: Tensor | None = None,
    scale_bs: _Each | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """all_gather(a_shard) along `gather_dim`, then ``@ b`` for each b, with torch's matmul and functional collective."""
    world_size = get_group(group_name).world_size
    _, biases, scale_bs, dtype = _check(a_shard, bs, gather_dim, world_size, biases, scale_a, scale_bs, out_dtype)
    collective = torch.ops._c10d_functional
    sent = a_shard.contiguous()
    if sent.dtype == FLOAT8:  # which not every backend sends
        sent = sent.view(torch.uint8)
    gathered = collective.wait_tensor(collective.all_gather_into_tensor(sent, world_size, group_name))
    gathered = gathered.view(a_shard.dtype)
    if gather_dim % a_shard.ndim != 0:
        gathered = torch.cat(gathered.chunk(world_size, 0), gather_dim)
    outs = [
        product_reference(gathered, b, bias, dtype, scale_a, scale_b) for b, bias, scale_b in zip(bs, biases, scale_bs)
    ]
    return (gathered if return_gathered else None), outs


@torch.library.register_fake("symmpatterns::all_gather_matmul", lib=library)
def _(
    a_shard: Tensor,
    bs: Sequence[Tensor],
    gather_dim: int,
    group_name: str,
    return_gathered: bool = True,
    *,
    biases: _Each | None = None,
    scale_a: Tensor | None = None,
    scale_bs: _Each | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    world_size = get_group(group_name).world_size
    dim, *_, dtype = _check(a_shard, bs, gather_dim, world_size, biases, scale_a, scale_bs, out_dtype)
    shape = _gathered_shape(a_shard, dim, world_size)
    gathered = a_shard.new_empty(shape) if return_gathered else None
    return gathered, [a_shard.new_empty([*shape[:-1], b.shape[1]], dtype=dtype) for b in bs]


_SITE = ("operator", "a_shard", "N", "dtypes", "gather_dim", "return_gathered", "kernels")


def _all_gather_matmul(
    a_shard: Tensor,
    bs: Sequence[Tensor],
    gather_dim: int,
    group_name: str,
    return_gathered: bool = True,
    *,
    biases: _Each | None = None,
    scale_a: Tensor | None = None,
    scale_bs: _Each | None = None,
    out_dtype: torch.dtype | None = None,
    workspace: Workspace | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """(gathered, [gathered @ b for b in bs]); a_shard [..., K], each b [K, N], bf16, fp16 or fp32.

    The ranks' shards are joined along `gather_dim`; along the last dimension, b has shape [K * W, N]. N may differ
    between ranks where ATen multiplies (CPU), not with Triton kernels, which are chosen by it. `gathered` is None unless
    `return_gathered`. `biases`, one [N] or None for each b, are added. float8_e4m3fn operands need scales, float32:
    `scale_a` of one element or of one for each row of the (flattened) *gathered* matrix, and for each b one of one or N
    elements; their products are rounded to `out_dtype` (default bf16). Raises like matmul_all_reduce.
    """
    op = "all_gather_matmul"
    if a_shard is None:
        raise no_tensor(op, a_shard)
    biases = [None if each is None else each.contiguous() for each in biases or [None] * len(bs)]
    scale_bs = scale_bs or [None] * len(bs)
    signatures = [signature(tensor) for tensor in (a_shard, *bs, *biases, scale_a, *scale_bs)]
    key = (op, gather_dim, return_gathered, config.host_kernels, len(bs), out_dtype, *signatures)
    workspace = workspace or find_workspace(group_name, a_shard.device)
    known = None if workspace is None else workspace.ready.get(key)
    if workspace is None or known is None:
        size = get_group(group_name).world_size
        dim, biases, scale_bs, dtype = _check(a_shard, bs, gather_dim, size, biases, scale_a, scale_bs, out_dtype)
        workspace = workspace or workspace_for(op, a_shard, group_name)
        if workspace is None:
            return all_gather_matmul_reference(
                a_shard, bs, dim, group_name, return_gathered, biases=biases, scale_a=scale_a, scale_bs=scale_bs,
                out_dtype=dtype,
            )  # fmt: skip
        kernels = "triton" if a_shard.is_cuda else config.host_kernels
        with workspace.call(op):
            widths = tuple(b.shape[1] for b in bs)
            # ATen's products are each rank's own affair: of columns that do not divide, ranks have different numbers.
            given = len(bs) if kernels == "aten" else widths
            site = (op, tuple(a_shard.shape), given, (a_shard.dtype, dtype), dim, return_gathered, kernels)
            number = workspace.agree(_SITE, site)
            implementation = None
            if a_shard.numel() > 0:
                columns = dim == a_shard.ndim - 1
                total = math.prod(a_shard.shape[:-1]) * (1 if columns else workspace.world_size)
                sent = a_shard.numel() * a_shard.element_size()
                implementation = matmul_implementation(
                    op, kernels, a_shard, workspace, (total, sum(widths), a_shard.shape[-1]), sent,
                    can_copy=not columns,
                )  # fmt: skip
        known = number, dim, dtype, implementation
        remember(workspace, key, known)
    number, dim, dtype, implementation = known
    lead, world_size = list(a_shard.shape[:-1]), workspace.world_size
    columns = dim == a_shard.ndim - 1
    rows = as_rows(a_shard)
    total = rows.shape[0] if columns else rows.shape[0] * world_size
    outs = [a_shard.new_empty(total, b.shape[1], dtype=dtype) for b in bs]
    gathered = None
    if return_gathered:
        gathered = a_shard.new_empty(total, rows.shape[1] * (world_size if columns else 1))
    whole = _gathered_shape(a_shard, dim, world_size)[:-1]
    if scale_a is not None and scale_a.numel() > 1 and not columns and not leads(dim, lead):
        # to the order of the ranks' rows
        scale_a = scale_a.reshape(whole).unflatten(dim, (world_size, -1)).movedim(dim, 0)
    with workspace.call(op, number):
        if implementation is not None:
            implementation(
                rows, bs, outs=outs, gathered=gathered, biases=biases, workspace=workspace, gather_dim=int(columns),
                scale_a=flat(scale_a), scale_bs=[flat(scale_b) for scale_b in scale_bs],
            )  # fmt: skip
        else:  # no rows, or K = 0: nothing to send
            for out, bias in zip(outs, biases):
                out.copy_(bias) if bias is not None else out.zero_()

    def joined(result: Tensor) -> Tensor:
        """The kernel leaves the ranks' rows one after the other; `dim` is where they belong. Contiguous always."""
        if columns:
            return result.view(*lead, result.shape[1])
        if leads(dim, lead):
            return result if len(whole) == 1 else result.view(*whole, result.shape[1])
        return result.view(world_size, *lead, result.shape[1]).movedim(0, dim).flatten(dim, dim + 1).contiguous()

    return (None if gathered is None else joined(gathered)), [joined(out) for out in outs]


implement("all_gather_matmul", _all_gather_matmul)
_autograd.differentiate("all_gather_matmul", _all_gather_matmul, _autograd.all_gather_matmul)
