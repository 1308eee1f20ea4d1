"""torch.ops.symmpatterns.*: the operators that rewrites put into graphs; all are callable in eager mode too.

Each operator has one reference, the same work with torch's own collectives: the fallback for groups of one rank and for
torch's fake groups, and what the tests compare with.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from symmpatterns import compat, config, host_backend
from symmpatterns.groups import SymmetricMemoryError, get_group
from symmpatterns.symmetric_memory import Workspace, find_workspace, get_workspace

MATMUL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_REDUCE_OPS = ("sum", "avg")

_library = torch.library.Library("symmpatterns", "FRAGMENT")
# The operators read any strides, so Inductor need not copy a transposed weight in front of them.
for _schema in (
    "matmul_all_reduce(Tensor a, Tensor b, str reduce_op, str group_name, *, Tensor? bias=None) -> Tensor",
    "matmul_reduce_scatter(Tensor a, Tensor b, str reduce_op, int scatter_dim, str group_name, *, Tensor? bias=None)"
    " -> Tensor",
    "all_gather_matmul(Tensor a_shard, Tensor[] bs, int gather_dim, str group_name, bool return_gathered=True, *,"
    " Tensor?[]? biases=None) -> (Tensor?, Tensor[])",
):
    _library.define(_schema, tags=(torch.Tag.flexible_layout,))


def _check_operands(op: str, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """What every GEMM operator asks of ``a [..., K] @ b [K, N] + bias [N]``."""
    if a.dtype != b.dtype or (bias is not None and bias.dtype != a.dtype):
        extra = "" if bias is None else f" and bias {bias.dtype}"
        raise TypeError(f"{op}: all operands must have one dtype, not a {a.dtype}, b {b.dtype}{extra}")
    if a.dtype not in MATMUL_DTYPES:
        raise TypeError(f"{op}: takes {', '.join(map(str, MATMUL_DTYPES))}, not {a.dtype}")
    if a.device != b.device or (bias is not None and bias.device != a.device):
        extra = "" if bias is None else f", bias on {bias.device}"
        raise ValueError(f"{op}: all operands must be on one device, not a on {a.device}, b on {b.device}{extra}")
    if b.ndim != 2:
        raise ValueError(f"{op}: b must have 2 dimensions, not shape {list(b.shape)}")
    if bias is not None:
        torch._check_value(
            bias.ndim == 1 and bias.shape[0] == b.shape[1],
            lambda: f"{op}: bias must have shape [{b.shape[1]}], not {list(bias.shape)}",
        )


def _check_inner(op: str, a: Tensor, b: Tensor, times: int = 1) -> None:
    torch._check_value(
        a.shape[-1] * times == b.shape[0],
        lambda: (
            f"{op}: a {list(a.shape)} and b {list(b.shape)} do not multiply: K is {a.shape[-1]}"
            f"{f' on each of {times} ranks' if times > 1 else ''} and {b.shape[0]}"
        ),
    )


def _check_reduce_op(op: str, reduce_op: str) -> None:
    if reduce_op not in _REDUCE_OPS:
        raise ValueError(f"{op}: reduce_op is one of {', '.join(_REDUCE_OPS)}, not {reduce_op!r}")


def _check_dim(op: str, name: str, dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise IndexError(f"{op}: {name} is {dim}; the tensor has {ndim} dimensions")
    return dim % ndim


def _workspace_for(op: str, tensor: Tensor, group_name: str) -> Workspace | None:
    """The group's workspace, or None when the reference is the answer: one rank, or torch's fake backend."""
    group = get_group(group_name)
    if group.world_size == 1 or group.is_fake:
        return None
    kinds = {device.type for device in group.pg._device_types}
    if tensor.device.type not in kinds:
        raise SymmetricMemoryError(
            f"{op}: group {group_name!r} communicates {', '.join(sorted(kinds)) or 'no'} tensors and the operands are on "
            f"{tensor.device}; use a group whose backend supports {tensor.device.type}"
        )
    return get_workspace(group_name, tensor.device)


_SIGNATURES = 4096  # of a workspace that are remembered at a time


def _signature(tensor: Tensor | None) -> tuple[object, ...] | None:
    """All of an operand that the checks look at."""
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _remember(workspace: Workspace, key: tuple[object, ...], answer: object) -> None:
    """Later calls with this key are checked, and agreed on between the ranks, already."""
    if len(workspace.ready) >= _SIGNATURES:
        workspace.ready.clear()
    workspace.ready[key] = answer


def _no_tensor(op: str, a: Tensor | None) -> TypeError:
    """None comes through an operator's schema as a tensor that is not defined."""
    return TypeError(f"{op}: operand {'a' if a is None else 'b'} is None, not a tensor")


def _nothing(*operands: object) -> None:
    """The implementation for an empty result."""


def _as_rows(a: Tensor) -> Tensor:
    return a.reshape(math.prod(a.shape[:-1]), a.shape[-1])  # not -1: K may be 0


def _implementation(op: str, kernels: str, tensor: Tensor) -> Callable[..., None]:
    """The function that computes `op`, with the same arguments for each kind of kernels."""
    if kernels == "aten":
        return getattr(host_backend, op)
    try:
        module = importlib.import_module(f"symmpatterns.triton_kernels.{op}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise SymmetricMemoryError(f"{op}: Triton is not installed: pip install 'triton>=3.6'") from error
    if not tensor.is_cuda and not compat.triton_interprets():
        raise SymmetricMemoryError(
            f"{op}: config.host_kernels is 'triton' and Triton does not interpret: set TRITON_INTERPRET=1 in the "
            "environment before Triton is imported, or use 'aten'"
        )
    return module.run


# --- matmul -> all-reduce -----------------------------------------------------------------------------------------


def _check_matmul_all_reduce(a: Tensor, b: Tensor, reduce_op: str, bias: Tensor | None) -> None:
    op = "matmul_all_reduce"
    if a.ndim != 2:
        raise ValueError(f"{op}: a must have 2 dimensions, not shape {list(a.shape)}")
    _check_operands(op, a, b, bias)
    _check_reduce_op(op, reduce_op)
    _check_inner(op, a, b)


def matmul_all_reduce_reference(
    a: Tensor, b: Tensor, reduce_op: str, group_name: str, *, bias: Tensor | None = None
) -> Tensor:
    """all_reduce(a @ b + bias) with torch's matmul and functional collective."""
    partial = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    collective = torch.ops._c10d_functional
    return collective.wait_tensor(collective.all_reduce(partial, reduce_op, group_name))


@torch.library.register_fake("symmpatterns::matmul_all_reduce", lib=_library)
def _(a: Tensor, b: Tensor, reduce_op: str, group_name: str, *, bias: Tensor | None = None) -> Tensor:
    _check_matmul_all_reduce(a, b, reduce_op, bias)
    return a.new_empty(a.shape[0], b.shape[1])


_MATMUL_ALL_REDUCE_SITE = ("operator", "M", "N", "dtype", "reduce_op", "bias", "kernels")


def _matmul_all_reduce(a: Tensor, b: Tensor, reduce_op: str, group_name: str, *, bias: Tensor | None = None) -> Tensor:
    """All ranks' ``a @ b`` (+ bias), reduced; a [M, K] and b [K, N] of any strides, bf16, fp16 or fp32; gives [M, N].

    The sum runs over the ranks in order, in fp32, each partial rounded to the operands' dtype first, so all ranks get
    the same bits. Raises ValueError, TypeError or SymmetricMemoryError for operands or groups that do not fit,
    DivergenceError when ranks call with different shapes, SymmetricMemoryTimeout when a rank does not come.
    """
    op = "matmul_all_reduce"
    if a is None or b is None:
        raise _no_tensor(op, a)
    # Spelled out, because a decode step makes this call for every layer.
    operands = (a.shape, b.shape, a.dtype, b.dtype, a.device, b.device)
    key = (op, reduce_op, config.host_kernels, operands, None if bias is None else _signature(bias))
    workspace = find_workspace(group_name, a.device)
    known = None if workspace is None else workspace.ready.get(key)
    if workspace is None or known is None:
        _check_matmul_all_reduce(a, b, reduce_op, bias)
        workspace = _workspace_for(op, a, group_name)
        if workspace is None:
            return matmul_all_reduce_reference(a, b, reduce_op, group_name, bias=bias)
        kernels = "triton" if a.is_cuda else config.host_kernels
        with workspace.call(op):  # K may differ between ranks
            site = (op, a.shape[0], b.shape[1], a.dtype, reduce_op, bias is not None, kernels)
            number = workspace.agree(_MATMUL_ALL_REDUCE_SITE, site)
        known = number, _implementation(op, kernels, a) if a.shape[0] * b.shape[1] > 0 else _nothing
        _remember(workspace, key, known)
    number, implementation = known
    out = a.new_empty(a.shape[0], b.shape[1])
    with workspace.call(op, number):
        implementation(a, b, bias, out, workspace, reduce_op)
    return out


# --- matmul -> reduce-scatter -------------------------------------------------------------------------------------


def _check_matmul_reduce_scatter(
    a: Tensor, b: Tensor, reduce_op: str, scatter_dim: int, world_size: int, bias: Tensor | None
) -> int:
    op = "matmul_reduce_scatter"
    if a.ndim < 2:
        raise ValueError(f"{op}: a must have at least 2 dimensions, not shape {list(a.shape)}")
    _check_operands(op, a, b, bias)
    _check_reduce_op(op, reduce_op)
    _check_inner(op, a, b)
    dim = _check_dim(op, "scatter_dim", scatter_dim, a.ndim)
    size = b.shape[1] if dim == a.ndim - 1 else a.shape[dim]
    if size % world_size != 0:  # AssertionError is what the functional collective raises
        raise AssertionError(
            f"{op}: dimension {dim} of the product has size {size}, which must be a multiple of the group's size "
            f"{world_size}"
        )
    return dim


def _scattered_shape(a: Tensor, b: Tensor, dim: int, world_size: int) -> list[int]:
    shape = [*a.shape[:-1], b.shape[1]]
    shape[dim] = shape[dim] // world_size
    return shape


def matmul_reduce_scatter_reference(
    a: Tensor, b: Tensor, reduce_op: str, scatter_dim: int, group_name: str, *, bias: Tensor | None = None
) -> Tensor:
    """reduce_scatter(a @ b + bias) along `scatter_dim` with torch's matmul and functional collective."""
    world_size = get_group(group_name).world_size
    flat = _as_rows(a)
    product = torch.mm(flat, b) if bias is None else torch.addmm(bias, flat, b)
    product = product.view(*a.shape[:-1], b.shape[1])
    if scatter_dim % product.ndim != 0:
        product = torch.cat(product.chunk(world_size, scatter_dim))
    collective = torch.ops._c10d_functional
    return collective.wait_tensor(collective.reduce_scatter_tensor(product, reduce_op, world_size, group_name))


@torch.library.register_fake("symmpatterns::matmul_reduce_scatter", lib=_library)
def _(a: Tensor, b: Tensor, reduce_op: str, scatter_dim: int, group_name: str, *, bias: Tensor | None = None) -> Tensor:
    world_size = get_group(group_name).world_size
    dim = _check_matmul_reduce_scatter(a, b, reduce_op, scatter_dim, world_size, bias)
    return a.new_empty(_scattered_shape(a, b, dim, world_size))


_MATMUL_REDUCE_SCATTER_SITE = ("operator", "rows", "N", "dtype", "reduce_op", "scatter_dim", "bias", "kernels")


def _matmul_reduce_scatter(
    a: Tensor, b: Tensor, reduce_op: str, scatter_dim: int, group_name: str, *, bias: Tensor | None = None
) -> Tensor:
    """This rank's share of the reduced ``a @ b`` (+ bias); a [..., K], b [K, N], bf16, fp16 or fp32.

    Dimension `scatter_dim` of the product [..., N] is cut into one chunk a rank. The sum runs over the ranks in order,
    in fp32, each partial rounded to the operands' dtype first. Raises like matmul_all_reduce, and AssertionError, as
    torch's functional reduce-scatter does, when the dimension does not divide.
    """
    op = "matmul_reduce_scatter"
    if a is None or b is None:
        raise _no_tensor(op, a)
    key = (op, reduce_op, scatter_dim, config.host_kernels, _signature(a), _signature(b), _signature(bias))
    workspace = find_workspace(group_name, a.device)
    known = None if workspace is None else workspace.ready.get(key)
    if workspace is None or known is None:
        world_size = get_group(group_name).world_size
        dim = _check_matmul_reduce_scatter(a, b, reduce_op, scatter_dim, world_size, bias)
        workspace = _workspace_for(op, a, group_name)
        if workspace is None:
            return matmul_reduce_scatter_reference(a, b, reduce_op, dim, group_name, bias=bias)
        shape = _scattered_shape(a, b, dim, world_size)
        kernels = "triton" if a.is_cuda else config.host_kernels
        with workspace.call(op):
            site = (op, tuple(a.shape[:-1]), b.shape[1], a.dtype, reduce_op, dim, bias is not None, kernels)
            number = workspace.agree(_MATMUL_REDUCE_SCATTER_SITE, site)
        known = number, dim, shape, _implementation(op, kernels, a) if math.prod(shape) > 0 else _nothing
        _remember(workspace, key, known)
    number, dim, shape, implementation = known
    columns = dim == a.ndim - 1
    if not columns and dim > 0:
        # The kernel scatters whole rows, so each rank's rows come together: a copy unless the dimensions before are 1.
        a = a.unflatten(dim, (workspace.world_size, -1)).movedim(dim, 0)
    rows = _as_rows(a)
    out = a.new_empty(math.prod(shape[:-1]), shape[-1])
    with workspace.call(op, number):
        implementation(rows, b, bias, out, workspace, reduce_op, 1 if columns else 0)
    return out.view(shape)


# --- all-gather -> matmul -----------------------------------------------------------------------------------------


def _check_all_gather_matmul(
    a_shard: Tensor, bs: Sequence[Tensor], gather_dim: int, world_size: int, biases: Sequence[Tensor | None] | None
) -> tuple[int, Sequence[Tensor | None]]:
    """(gather_dim counted from the front, one bias or None for each b)."""
    op = "all_gather_matmul"
    if biases and len(biases) != len(bs):
        raise ValueError(
            f"{op}: {len(biases)} biases for {len(bs)} matrices; give one or None for each, or none at all"
        )
    biases = biases or [None] * len(bs)
    if a_shard.ndim < 2:
        raise ValueError(f"{op}: a_shard must have at least 2 dimensions, not shape {list(a_shard.shape)}")
    if len(bs) == 0:
        raise ValueError(f"{op}: bs is empty; with nothing to multiply use an all-gather")
    dim = _check_dim(op, "gather_dim", gather_dim, a_shard.ndim)
    for b, bias in zip(bs, biases):
        _check_operands(op, a_shard, b, bias)
        _check_inner(op, a_shard, b, world_size if dim == a_shard.ndim - 1 else 1)
    return dim, biases


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
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """all_gather(a_shard) along `gather_dim`, then ``@ b`` for each b, with torch's matmul and functional collective."""
    world_size = get_group(group_name).world_size
    collective = torch.ops._c10d_functional
    gathered = collective.wait_tensor(collective.all_gather_into_tensor(a_shard.contiguous(), world_size, group_name))
    if gather_dim % a_shard.ndim != 0:
        gathered = torch.cat(gathered.chunk(world_size, 0), gather_dim)
    outs = [torch.nn.functional.linear(gathered, b.t(), bias) for b, bias in zip(bs, biases or [None] * len(bs))]
    return (gathered if return_gathered else None), outs


@torch.library.register_fake("symmpatterns::all_gather_matmul", lib=_library)
def _(
    a_shard: Tensor,
    bs: Sequence[Tensor],
    gather_dim: int,
    group_name: str,
    return_gathered: bool = True,
    *,
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    world_size = get_group(group_name).world_size
    dim, _ = _check_all_gather_matmul(a_shard, bs, gather_dim, world_size, biases)
    shape = _gathered_shape(a_shard, dim, world_size)
    gathered = a_shard.new_empty(shape) if return_gathered else None
    return gathered, [a_shard.new_empty([*shape[:-1], b.shape[1]]) for b in bs]


_ALL_GATHER_MATMUL_SITE = ("operator", "a_shard", "N", "dtype", "gather_dim", "return_gathered", "kernels")


def _all_gather_matmul(
    a_shard: Tensor,
    bs: Sequence[Tensor],
    gather_dim: int,
    group_name: str,
    return_gathered: bool = True,
    *,
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """(gathered, [gathered @ b for b in bs]); a_shard [..., K], each b [K, N], bf16, fp16 or fp32.

    The ranks' shards are joined along `gather_dim`; along the last dimension, b has shape [K * W, N]. `gathered` is
    None unless `return_gathered`. `biases`, one [N] or None for each b, are added. Raises like matmul_all_reduce.
    """
    op = "all_gather_matmul"
    if a_shard is None:
        raise _no_tensor(op, a_shard)
    biases = biases or [None] * len(bs)
    signatures = [_signature(tensor) for tensor in (a_shard, *bs, *biases)]
    key = (op, gather_dim, return_gathered, config.host_kernels, len(bs), *signatures)
    workspace = find_workspace(group_name, a_shard.device)
    known = None if workspace is None else workspace.ready.get(key)
    if workspace is None or known is None:
        dim, biases = _check_all_gather_matmul(a_shard, bs, gather_dim, get_group(group_name).world_size, biases)
        workspace = _workspace_for(op, a_shard, group_name)
        if workspace is None:
            return all_gather_matmul_reference(a_shard, bs, dim, group_name, return_gathered, biases=biases)
        kernels = "triton" if a_shard.is_cuda else config.host_kernels
        with workspace.call(op):
            widths = tuple(b.shape[1] for b in bs)
            site = (op, tuple(a_shard.shape), widths, a_shard.dtype, dim, return_gathered, kernels)
            number = workspace.agree(_ALL_GATHER_MATMUL_SITE, site)
        known = number, dim, _implementation(op, kernels, a_shard) if a_shard.numel() > 0 else None
        _remember(workspace, key, known)
    number, dim, implementation = known
    lead, world_size = list(a_shard.shape[:-1]), workspace.world_size
    columns = dim == a_shard.ndim - 1
    rows = _as_rows(a_shard)
    total = rows.shape[0] if columns else rows.shape[0] * world_size
    outs = [a_shard.new_empty(total, b.shape[1]) for b in bs]
    gathered = None
    if return_gathered:
        gathered = a_shard.new_empty(total, rows.shape[1] * (world_size if columns else 1))
    with workspace.call(op, number):
        if implementation is not None:
            implementation(
                rows, bs, outs=outs, gathered=gathered, biases=biases, workspace=workspace, gather_dim=int(columns)
            )
        else:  # no rows, or K = 0: nothing to send
            for out, bias in zip(outs, biases):
                out.copy_(bias) if bias is not None else out.zero_()

    def joined(result: Tensor) -> Tensor:
        """The kernel leaves the ranks' rows one after the other; `dim` is where they belong."""
        if columns:
            return result.view(*lead, result.shape[1])
        return result.view(world_size, *lead, result.shape[1]).movedim(0, dim).flatten(dim, dim + 1)

    return (None if gathered is None else joined(gathered)), [joined(out) for out in outs]


for _name, _function in (
    ("matmul_all_reduce", _matmul_all_reduce),
    ("matmul_reduce_scatter", _matmul_reduce_scatter),
    ("all_gather_matmul", _all_gather_matmul),
):
    _library.impl(_name, _function, "CPU")
    _library.impl(_name, _function, "CUDA")
