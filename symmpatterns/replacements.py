"""torch.ops.symmpatterns.*: the operators that rewrites put into graphs; all are callable in eager mode too.

Each operator has one reference, the same work with torch's own collectives: the fallback for groups of one rank and for
torch's fake groups, and what the tests compare with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from symmpatterns import config
from symmpatterns.groups import SymmetricMemoryError, get_group
from symmpatterns.symmetric_memory import Workspace, get_workspace

MATMUL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_REDUCE_OPS = ("sum", "avg")

_library = torch.library.Library("symmpatterns", "FRAGMENT")
# The operators read any strides, so Inductor need not copy a transposed weight in front of them.
_library.define(
    "matmul_all_reduce(Tensor a, Tensor b, str reduce_op, str group_name, *, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)


def _check_matmul(op: str, a: Tensor, b: Tensor, reduce_op: str, bias: Tensor | None) -> None:
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"{op}: a and b must have 2 dimensions, not shapes {list(a.shape)} and {list(b.shape)}")
    if a.dtype != b.dtype or (bias is not None and bias.dtype != a.dtype):
        extra = "" if bias is None else f" and bias {bias.dtype}"
        raise TypeError(f"{op}: all operands must have one dtype, not a {a.dtype}, b {b.dtype}{extra}")
    if a.dtype not in MATMUL_DTYPES:
        raise TypeError(f"{op}: takes {', '.join(map(str, MATMUL_DTYPES))}, not {a.dtype}")
    if a.device != b.device or (bias is not None and bias.device != a.device):
        extra = "" if bias is None else f", bias on {bias.device}"
        raise ValueError(f"{op}: all operands must be on one device, not a on {a.device}, b on {b.device}{extra}")
    if reduce_op not in _REDUCE_OPS:
        raise ValueError(f"{op}: reduce_op is one of {', '.join(_REDUCE_OPS)}, not {reduce_op!r}")
    torch._check_value(
        a.shape[1] == b.shape[0],
        lambda: f"{op}: a {list(a.shape)} and b {list(b.shape)} do not multiply: K is {a.shape[1]} and {b.shape[0]}",
    )
    if bias is not None:
        torch._check_value(
            bias.ndim == 1 and bias.shape[0] == b.shape[1],
            lambda: f"{op}: bias must have shape [{b.shape[1]}], not {list(bias.shape)}",
        )


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


def matmul_all_reduce_reference(
    a: Tensor, b: Tensor, reduce_op: str, group_name: str, *, bias: Tensor | None = None
) -> Tensor:
    """all_reduce(a @ b + bias) with torch's matmul and functional collective."""
    partial = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    collective = torch.ops._c10d_functional
    return collective.wait_tensor(collective.all_reduce(partial, reduce_op, group_name))


@torch.library.register_fake("symmpatterns::matmul_all_reduce", lib=_library)
def _(a: Tensor, b: Tensor, reduce_op: str, group_name: str, *, bias: Tensor | None = None) -> Tensor:
    _check_matmul("matmul_all_reduce", a, b, reduce_op, bias)
    return a.new_empty(a.shape[0], b.shape[1])


_MATMUL_ALL_REDUCE_SITE = ("operator", "M", "N", "K", "dtype", "reduce_op", "bias", "kernels")


def _matmul_all_reduce(
    a: Tensor, b: Tensor, reduce_op: str, group_name: str, *, bias: Tensor | None = None
) -> Tensor:
    """All ranks' ``a @ b`` (+ bias), reduced; a [M, K] and b [K, N] of any strides, bf16, fp16 or fp32; gives [M, N].

    The sum runs over the ranks in order, in fp32, each partial rounded to the operands' dtype first, so all ranks get
    the same bits. Raises ValueError, TypeError or SymmetricMemoryError for operands or groups that do not fit,
    DivergenceError when ranks call with different shapes, SymmetricMemoryTimeout when a rank does not come.
    """
    op = "matmul_all_reduce"
    _check_matmul(op, a, b, reduce_op, bias)
    workspace = _workspace_for(op, a, group_name)
    if workspace is None:
        return matmul_all_reduce_reference(a, b, reduce_op, group_name, bias=bias)
    (m, k), n = a.shape, b.shape[1]
    out = a.new_empty(m, n)
    kernels = "triton" if a.is_cuda else config.host_kernels
    with workspace.call(op):
        workspace.agree(_MATMUL_ALL_REDUCE_SITE, (op, m, n, k, a.dtype, reduce_op, bias is not None, kernels))
        if out.numel() == 0:
            return out
        if kernels == "aten":
            from symmpatterns import host_backend

            host_backend.matmul_all_reduce(a, b, bias, out, workspace, reduce_op)
        else:
            from symmpatterns.triton_kernels import matmul_all_reduce as kernel

            kernel.run(a, b, bias, out, workspace, reduce_op)
    return out


_library.impl("matmul_all_reduce", _matmul_all_reduce, "CPU")
_library.impl("matmul_all_reduce", _matmul_all_reduce, "CUDA")
