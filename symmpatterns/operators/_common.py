"""What the operators share: their declaration, the checks of their operands, and what they remember of a workspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from symmpatterns.groups import SymmetricMemoryError, get_group
from symmpatterns.workspace import Workspace, get_workspace

MATMUL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOAT8 = torch.float8_e4m3fn  # with scales
_REDUCE_OPS = ("sum", "avg")

library = torch.library.Library("symmpatterns", "FRAGMENT")


def define(schema: str) -> None:
    """Declares an operator; it reads any strides, so Inductor need not copy a transposed weight in front of it."""
    library.define(schema, tags=(torch.Tag.flexible_layout,))


def implement(name: str, function: Callable[..., object]) -> None:
    """One implementation for both kinds of devices."""
    for device in ("CPU", "CUDA"):
        library.impl(name, function, device)


def check_operands(
    op: str, a: Tensor, b: Tensor, bias: Tensor | None = None, partial_dtype: torch.dtype | None = None
) -> None:
    """What every GEMM operator asks of ``a [..., K] @ b [K, N] + bias [N]``, or of a batch of such products."""
    bias_dtypes = MATMUL_DTYPES if a.dtype == FLOAT8 else (a.dtype, partial_dtype)
    if a.dtype != b.dtype or (bias is not None and bias.dtype not in bias_dtypes):
        extra = "" if bias is None else f" and bias {bias.dtype}"
        raise TypeError(f"{op}: all operands must have one dtype, not a {a.dtype}, b {b.dtype}{extra}")
    if a.dtype not in (*MATMUL_DTYPES, FLOAT8):
        raise TypeError(f"{op}: takes {', '.join(map(str, (*MATMUL_DTYPES, FLOAT8)))}, not {a.dtype}")
    if a.device != b.device or (bias is not None and bias.device != a.device):
        extra = "" if bias is None else f", bias on {bias.device}"
        raise ValueError(f"{op}: all operands must be on one device, not a on {a.device}, b on {b.device}{extra}")
    if bias is not None:
        wanted = [*b.shape[:-2], b.shape[-1]] if bias.ndim == b.ndim - 1 else [b.shape[-1]]  # one row for all
        torch._check_value(
            list(bias.shape) == wanted, lambda: f"{op}: bias must have shape {wanted}, not {list(bias.shape)}"
        )


def check_matrix(op: str, b: Tensor) -> None:
    if b.ndim != 2:
        raise ValueError(f"{op}: b must have 2 dimensions, not shape {list(b.shape)}")


def check_inner(op: str, a: Tensor, b: Tensor, times: int = 1) -> None:
    torch._check_value(
        a.shape[-1] * times == b.shape[-2],
        lambda: (
            f"{op}: a {list(a.shape)} and b {list(b.shape)} do not multiply: K is {a.shape[-1]}"
            f"{f' on each of {times} ranks' if times > 1 else ''} and {b.shape[-2]}"
        ),
    )


def check_scales(op: str, a: Tensor, b: Tensor, rows: int, scale_a: Tensor | None, scale_b: Tensor | None) -> None:
    """float8 operands have a scale each, for the whole matrix or for each of a's `rows` rows and b's columns."""
    if a.dtype != FLOAT8:
        if scale_a is not None or scale_b is not None:
            raise TypeError(f"{op}: scales belong to {FLOAT8} operands; these are {a.dtype}")
        return
    for name, scale, count, what in (
        ("scale_a", scale_a, rows, "rows of a"),
        ("scale_b", scale_b, b.shape[-1], "columns of b"),
    ):
        if scale is None:
            raise ValueError(f"{op}: {FLOAT8} operands need scale_a and scale_b; {name} is missing")
        if scale.dtype != torch.float32 or scale.device != a.device:
            raise TypeError(f"{op}: {name} must be float32 on {a.device}, not {scale.dtype} on {scale.device}")
        torch._check_value(
            scale.numel() == 1 or scale.numel() == count,
            lambda: (
                f"{op}: {name} must have one element, or {count}, one for each of the {what}; its shape is "  # noqa: B023
                f"{list(scale.shape)}"  # noqa: B023
            ),
        )


def dtypes_of(
    op: str, a: Tensor, partial_dtype: torch.dtype | None, out_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the partial products, which is what is sent; dtype of the result)."""
    partial = partial_dtype or (torch.bfloat16 if a.dtype == FLOAT8 else a.dtype)
    out = out_dtype or partial
    if partial not in MATMUL_DTYPES:
        raise TypeError(f"{op}: partial_dtype is one of {', '.join(map(str, MATMUL_DTYPES))}, not {partial}")
    if out not in (partial, torch.float32):
        raise TypeError(f"{op}: partial products of {partial} are summed to {partial} or torch.float32, not to {out}")
    return partial, out


def check_reduce_op(op: str, reduce_op: str) -> None:
    if reduce_op not in _REDUCE_OPS:
        raise ValueError(f"{op}: reduce_op is one of {', '.join(_REDUCE_OPS)}, not {reduce_op!r}")


def check_dim(op: str, name: str, dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise IndexError(f"{op}: {name} is {dim}; the tensor has {ndim} dimensions")
    return dim % ndim


def workspace_for(op: str, tensor: Tensor, group_name: str) -> Workspace | None:
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


def signature(tensor: Tensor | None) -> tuple[object, ...] | None:
    """All of an operand that the checks look at."""
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def remember(workspace: Workspace, key: tuple[object, ...], answer: object) -> None:
    """Later calls with this key are checked, and agreed on between the ranks, already."""
    if len(workspace.ready) >= _SIGNATURES:
        workspace.ready.clear()
    workspace.ready[key] = answer


def no_tensor(op: str, a: Tensor | None) -> TypeError:
    """None comes through an operator's schema as a tensor that is not defined."""
    return TypeError(f"{op}: operand {'a' if a is None else 'b'} is None, not a tensor")


def nothing(*operands: object) -> None:
    """The implementation for an empty result."""


def as_rows(a: Tensor) -> Tensor:
    if a.ndim == 2:
        return a
    return a.reshape(math.prod(a.shape[:-1]), a.shape[-1])  # not -1: K may be 0


def leads(dim: int, shape: Sequence[int]) -> bool:
    """Whether chunks along `dim` follow each other in memory: every dimension before it has one element."""
    return math.prod(shape[:dim]) == 1


def flat(scale: Tensor | None) -> Tensor | None:
    """A scale as the kernels take it: [1], or one for each row or column."""
    return None if scale is None else scale.reshape(-1)


def product_reference(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
) -> Tensor:
    """``a @ b + bias`` rounded once to `dtype`: [..., K] @ [K, N] + [N], or batches [B, M, K] @ [B, K, N] + [B, N]."""
    row = None if bias is None else bias.unsqueeze(-2)
    if dtype not in (None, a.dtype):
        product = torch.matmul(a.float(), b.float())
        if scale_a is not None and scale_b is not None:
            product = (as_rows(product) * scale_a.reshape(-1, 1) * scale_b.reshape(1, -1)).view(product.shape)
        return (product if row is None else product + row).to(dtype)
    if b.ndim == 3:
        return torch.bmm(a, b) if row is None else torch.baddbmm(row, a, b)
    product = torch.mm(as_rows(a), b) if bias is None else torch.addmm(bias, as_rows(a), b)
    return product.view(*a.shape[:-1], b.shape[1])
