"""torch.ops.symmpatterns.to_symmetric and symmetric_empty.

to_symmetric     the marker: "this value, in symmetric memory". A graph with it is valid and means the same; the rewrite
                 lets the producer absorb it. What is not absorbed is a copy.
symmetric_empty  an uninitialised tensor from the pool, in compiled code only
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from symmpatterns.allocation import pool
from symmpatterns.scope import allocation_scope
from symmpatterns.symmetric_memory import backend_of, empty, is_symmetric, rendezvous

_library = torch.library.Library("symmpatterns", "FRAGMENT")
_library.define(
    "to_symmetric(Tensor x, str group_name, bool contiguous=False, SymInt[]? stride=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "symmetric_empty(SymInt[] size, SymInt[] stride, ScalarType dtype, Device device, str group_name) -> Tensor"
)


def to_symmetric(x: Tensor, group_name: str, contiguous: bool = False, stride: Sequence[int] | None = None) -> Tensor:
    """A copy of `x` in symmetric memory, in fresh memory outside of the pool.

    With the strides of `x`, or contiguous, or with the given ones, which must be those of a tensor without overlaps but
    for dimensions of stride 0 that repeat what `x` repeats.
    """
    if x is None:
        raise TypeError("to_symmetric takes a tensor, not None")
    strides = strides_of(x, contiguous) if stride is None else stride
    return _filled(new(x.shape, strides, x.dtype, x.device), x)


def new(
    size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device, group_name: str = ""
) -> Tensor:
    """An uninitialised tensor in symmetric memory outside of the pool, which may be kept; of no group yet."""
    span = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride))
    return empty((span,), dtype=dtype, device=device).as_strided(size, stride)


def _filled(memory: Tensor, x: Tensor) -> Tensor:
    """`memory`, after `x` was copied into it; both of one shape."""
    target = memory
    for dim, stride in enumerate(memory.stride()):
        if stride == 0 and x.shape[dim] > 1:  # expanded: one copy of what is repeated
            x, target = x.narrow(dim, 0, 1), target.narrow(dim, 0, 1)
    target.copy_(x)
    return memory


def strides_of(x: Tensor, contiguous: bool) -> tuple[Any, ...]:
    """The strides of what `to_symmetric` returns."""
    if not contiguous:
        return x.stride()
    return tuple(torch.empty_like(x, device="meta", memory_format=torch.contiguous_format).stride())


@torch.library.register_fake("symmpatterns::to_symmetric", lib=_library)
def _(x: Tensor, group_name: str, contiguous: bool = False, stride: Sequence[int] | None = None) -> Tensor:
    strides = strides_of(x, contiguous) if stride is None else stride
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


torch.library.register_autograd(
    "symmpatterns::to_symmetric", lambda ctx, gradient: (gradient, None, None, None), lib=_library
)


def symmetric_empty(
    size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device, group_name: str
) -> Tensor:
    """`pool.take_anywhere`, or `new` where `group_name` is "", for code that can call operators only."""
    backend_of(device)  # raises where there is no symmetric memory
    return (pool.take_anywhere if group_name else new)(size, stride, dtype, device, group_name)


@torch.library.register_fake("symmpatterns::symmetric_empty", lib=_library)
def _(size: Any, stride: Any, dtype: torch.dtype, device: torch.device, group_name: str) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


_library.impl("to_symmetric", to_symmetric, "CompositeExplicitAutograd")
_library.impl("symmetric_empty", symmetric_empty, "CompositeExplicitAutograd")


@functools.cache
def under_symmetric_memory(
    operator: Callable[..., Any], outputs: tuple[tuple[tuple[int, ...], str], ...]
) -> Callable[..., Any]:
    """`operator`, run under ``symmetric_memory()``: how compiled code calls producers that allocate their own outputs.

    `outputs` are the places, in what it returns, of the tensors that collectives want, each with the collective's group
    ("": the user wants it symmetric, no collective has asked). One that is not symmetric all the same (memory that the
    operator did not allocate through torch) is copied.

    While a CUDA graph is captured no memory can be shared, and what the graph writes to must be there for every replay.
    There the outputs are copied into pool memory, of which every call before has taken, and mapped, as much as it would
    need.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            result = operator(*args, **kwargs)
            for place, group_name in outputs:
                output = _at(result, place)
                inside = _filled(_in_pool(output, group_name), output) if group_name else to_symmetric(output, "")
                result = _replaced(result, place, inside)
            return result
        with allocation_scope():
            result = operator(*args, **kwargs)
        for place, group_name in outputs:
            output = _at(result, place)
            if output.numel() == 0 or not is_symmetric(output):  # the scope gives no memory for no bytes
                output = to_symmetric(output, "")
                result = _replaced(result, place, output)
            if output.is_cuda and group_name:
                reserved = _in_pool(output, group_name)
                rendezvous(reserved, group_name)
                output._symmpatterns_reserved = reserved  # type: ignore[attr-defined]
        return result

    return run


def _in_pool(like: Tensor, group_name: str) -> Tensor:
    return pool.take_anywhere(like.shape, like.stride(), like.dtype, like.device, group_name)


def _at(result: Any, place: tuple[int, ...]) -> Tensor:
    for index in place:
        result = result[index]
    return result


def _replaced(result: Any, place: tuple[int, ...], output: Tensor) -> Any:
    """`result` with `output` in that place."""
    if not place:
        return output
    items = list(result)
    items[place[0]] = _replaced(items[place[0]], place[1:], output)
    return items


__all__ = ["new", "strides_of", "symmetric_empty", "to_symmetric", "under_symmetric_memory"]
