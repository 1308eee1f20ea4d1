"""Gradients of the GEMM operators, for programs that call them themselves: the passes run behind autograd.

::

    all_reduce(a @ b)        g = all_reduce(g)                    ga = g @ b^T    gb = a^T @ g
    reduce_scatter(a @ b)    g, ga = all_gather_matmul(g, b^T)                    gb = a^T @ g
    all_gather(a) @ b        ga = matmul_reduce_scatter(g, b^T)                   gb = all_gather(a)^T @ g

So say torch's functional collectives: what every rank's loss says about a rank's operands is summed. float8 has no
gradient, and the gradients have none themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from symmpatterns import compat
from symmpatterns.groups import get_group
from symmpatterns.operators._common import FLOAT8, as_rows, library

_ops = torch.ops.symmpatterns
_Maybe = Tensor | None


def differentiate(name: str, function: Callable[..., Any], differentiable: Callable[..., Any]) -> None:
    """Gives the operator a gradient: `differentiable` is called in its place where an operand needs one.

    `function` is what computes it otherwise.
    """
    overload = getattr(_ops, name).default
    plain: set[int] = set()  # dispatch keys of calls that only the kernel is left for
    is_grad_enabled = torch.is_grad_enabled

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if is_grad_enabled() and compat.any_requires_grad(*args, **kwargs):
            return differentiable(*args, **kwargs)
        if keyset.raw_repr() in plain:  # no other dispatch: a decode step makes this call for every layer
            return function(*args, **kwargs)
        if compat.leads_to_kernel(keyset):
            plain.add(keyset.raw_repr())
        return compat.redispatch_below_autograd(overload, keyset, *args, **kwargs)

    library.impl(name, autograd, "Autograd", with_keyset=True)


def without_gradient(name: str, why: str) -> Callable[..., Any]:
    """For `differentiate`: computes the operator, and raises RuntimeError when a gradient is asked for."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result: Any = None

        def compute() -> list[_Maybe]:
            nonlocal result
            result = getattr(_ops, name)(*args, **kwargs)
            return _flat(result)

        tensors = [each for each in _flat([*args, *kwargs.values()]) if each is not None]
        flat = _WithoutGradient.apply(compute, f"{name} has no gradient{why}; detach its operands", *tensors)
        if isinstance(result, Tensor):
            return flat[0]
        return tuple(flat) if all(isinstance(each, Tensor) for each in result) else (flat[0], list(flat[1:]))

    return call


def _flat(values: Any) -> list[_Maybe]:
    """The tensors, and the None, of an operator's arguments or results."""
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _flat(value)]
    return [values] if values is None or isinstance(values, Tensor) else []


class _WithoutGradient(Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[[], list[_Maybe]], text: str, *tensors: Tensor) -> Any:
        ctx.text = text
        with compat.below_autograd():
            return tuple(compute())

    @staticmethod
    def backward(ctx: Any, *gradients: _Maybe) -> Any:
        raise RuntimeError(ctx.text)


_FLOAT8_WHY = " for float8 operands"


def _scaled(gradient: Tensor, reduce_op: str, group_name: str) -> Tensor:
    """The gradient of a rank's share in the sum, or in the average."""
    return gradient / get_group(group_name).world_size if reduce_op == "avg" else gradient


def _bias_gradient(bias: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` [..., N] summed to the bias [N], or [B, N] for each matrix of a batch."""
    dims = [-2] if bias.ndim == 2 else list(range(gradient.ndim - 1))
    return gradient.sum(dims).to(bias.dtype)


def _gather(shard: Tensor, dim: int, group_name: str) -> Tensor:
    collective, world_size = torch.ops._c10d_functional, get_group(group_name).world_size
    full = collective.wait_tensor(collective.all_gather_into_tensor(shard.contiguous(), world_size, group_name))
    return torch.cat(full.chunk(world_size), dim) if dim % shard.ndim != 0 else full


def _reduce_scatter(full: Tensor, dim: int, group_name: str) -> Tensor:
    collective, world_size = torch.ops._c10d_functional, get_group(group_name).world_size
    full = torch.cat(full.chunk(world_size, dim)) if dim % full.ndim != 0 else full.contiguous()
    return collective.wait_tensor(collective.reduce_scatter_tensor(full, "sum", world_size, group_name))


# --- matmul -> all-reduce -------------------------------------------------------------------------------------------


def matmul_all_reduce(
    a: Tensor, b: Tensor, reduce_op: str, group_name: str, *, bias: _Maybe = None, **options: Any
) -> Tensor:
    if FLOAT8 in (a.dtype, b.dtype):
        return without_gradient("matmul_all_reduce", _FLOAT8_WHY)(a, b, reduce_op, group_name, bias=bias, **options)
    return _MatmulAllReduce.apply(a, b, bias, reduce_op, group_name, options)


class _MatmulAllReduce(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: _Maybe, reduce_op: str, group_name: str, options: Any) -> Tensor:
        ctx.save_for_backward(a, b, bias)
        ctx.reduce_op, ctx.group_name = reduce_op, group_name
        with compat.below_autograd():
            return _ops.matmul_all_reduce(a, b, reduce_op, group_name, bias=bias, **options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, b, bias = ctx.saved_tensors
        collective = torch.ops._c10d_functional
        total = collective.wait_tensor(collective.all_reduce(gradient.contiguous(), "sum", ctx.group_name))
        total = _scaled(total, ctx.reduce_op, ctx.group_name).to(a.dtype)
        needs = ctx.needs_input_grad
        return (
            total @ b.mT if needs[0] else None,
            a.mT @ total if needs[1] else None,
            _bias_gradient(bias, total) if needs[2] else None,
            *(None,) * 3,
        )


# --- matmul -> reduce-scatter ---------------------------------------------------------------------------------------


def matmul_reduce_scatter(
    a: Tensor, b: Tensor, reduce_op: str, scatter_dim: int, group_name: str, *, bias: _Maybe = None, **options: Any
) -> Tensor:
    if FLOAT8 in (a.dtype, b.dtype):
        return without_gradient("matmul_reduce_scatter", _FLOAT8_WHY)(
            a, b, reduce_op, scatter_dim, group_name, bias=bias, **options
        )
    return _MatmulReduceScatter.apply(a, b, bias, reduce_op, scatter_dim, group_name, options)


class _MatmulReduceScatter(Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, bias: _Maybe, reduce_op: str, dim: int, group_name: str, options: Any
    ) -> Tensor:
        ctx.save_for_backward(a, b, bias)
        ctx.reduce_op, ctx.dim, ctx.group_name = reduce_op, dim, group_name
        with compat.below_autograd():
            return _ops.matmul_reduce_scatter(a, b, reduce_op, dim, group_name, bias=bias, **options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, b, bias = ctx.saved_tensors
        gradient = _scaled(gradient, ctx.reduce_op, ctx.group_name).to(a.dtype).contiguous()
        needs = ctx.needs_input_grad
        if needs[0]:
            keep = needs[1] or needs[2]
            total, (of_a,) = _ops.all_gather_matmul(gradient, [b.t()], ctx.dim, ctx.group_name, keep)
        else:
            total, of_a = _gather(gradient, ctx.dim, ctx.group_name), None
        return (
            of_a,
            as_rows(a).t() @ as_rows(total) if needs[1] else None,
            _bias_gradient(bias, total) if needs[2] else None,
            *(None,) * 4,
        )


# --- all-gather -> matmul -------------------------------------------------------------------------------------------


def all_gather_matmul(
    a_shard: Tensor,
    bs: Sequence[Tensor],
    gather_dim: int,
    group_name: str,
    return_gathered: bool = True,
    *,
    biases: Sequence[_Maybe] | None = None,
    **options: Any,
) -> tuple[_Maybe, list[Tensor]]:
    if FLOAT8 in (a_shard.dtype, *(b.dtype for b in bs)):
        arguments = (a_shard, bs, gather_dim, group_name, return_gathered)
        return without_gradient("all_gather_matmul", _FLOAT8_WHY)(*arguments, biases=biases, **options)
    every = [*bs, *(biases or [])]
    gathered, *outs = _AllGatherMatmul.apply(a_shard, gather_dim, group_name, return_gathered, len(bs), options, *every)
    return gathered, outs


class _AllGatherMatmul(Function):
    @staticmethod
    def forward(
        ctx: Any,
        a_shard: Tensor,
        dim: int,
        group_name: str,
        return_gathered: bool,
        count: int,
        options: Any,
        *every: _Maybe,
    ) -> Any:
        bs, biases = list(every[:count]), list(every[count:])
        needs_gathered = any(ctx.needs_input_grad[6 : 6 + count])
        with compat.below_autograd():
            gathered, outs = _ops.all_gather_matmul(
                a_shard, bs, dim, group_name, return_gathered or needs_gathered, biases=biases or None, **options
            )
        ctx.save_for_backward(gathered if needs_gathered else None, *every)
        ctx.set_materialize_grads(False)
        ctx.dim, ctx.group_name, ctx.count = dim, group_name, count
        return (gathered if return_gathered else None, *outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_gathered: _Maybe, *gradients: _Maybe) -> Any:
        gathered, *every = ctx.saved_tensors
        needs, count = ctx.needs_input_grad, ctx.count
        of_every: list[_Maybe] = [None] * len(every)
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if needs[6 + index]:
                of_every[index] = as_rows(gathered).t() @ as_rows(gradient)
            if count + index < len(every) and needs[6 + count + index]:
                of_every[count + index] = _bias_gradient(every[count + index], gradient)
        of_a = _of_shard(ctx, of_gathered, every[:count], gradients) if needs[0] else None
        return (of_a, *(None,) * 5, *of_every)


def _of_shard(ctx: Any, of_gathered: _Maybe, bs: Sequence[Tensor], gradients: Sequence[_Maybe]) -> _Maybe:
    """What reaches a rank's shard: through the products, and through the gathered tensor itself."""
    lefts = [gradient for gradient in gradients if gradient is not None]
    rights = [b.t() for b, gradient in zip(bs, gradients) if gradient is not None]
    if not lefts:
        return None if of_gathered is None else _reduce_scatter(of_gathered, ctx.dim, ctx.group_name)
    # The sum of several products is one product of what stands side by side.
    left, right = (lefts[0], rights[0]) if len(lefts) == 1 else (torch.cat(lefts, -1), torch.cat(rights))
    if of_gathered is None:
        return _ops.matmul_reduce_scatter(left.contiguous(), right, "sum", ctx.dim, ctx.group_name)
    return _reduce_scatter(of_gathered + left @ right, ctx.dim, ctx.group_name)
