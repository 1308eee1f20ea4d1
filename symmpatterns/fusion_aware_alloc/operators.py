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

from symmpatterns.fusion_aware_alloc import pool
from symmpatterns.symmetric_memory import empty, is_symmetric, symmetric_memory

_library = torch.library.Library("symmpatterns", "FRAGMENT")
_library.define(
    "to_symmetric(Tensor x, str group_name, bool contiguous=False) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    "symmetric_empty(SymInt[] size, SymInt[] stride, ScalarType dtype, Device device, str group_name) -> Tensor"
)


def to_symmetric(x: Tensor, group_name: str, contiguous: bool = False) -> Tensor:
    """A copy of `x` in symmetric memory, with its strides if it is dense and no `contiguous` one is asked for."""
    strides = strides_of(x, contiguous)
    memory = empty((_span(x.shape, strides),), dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, strides).copy_(x)


def strides_of(x: Tensor, contiguous: bool) -> tuple[Any, ...]:
    """The strides of the copy that `to_symmetric` makes."""
    like = torch.empty_like(
        x, device="meta", memory_format=torch.contiguous_format if contiguous else torch.preserve_format
    )
    return tuple(like.stride())


def _span(size: Sequence[int], stride: Sequence[int]) -> int:
    return 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride))


@torch.library.register_fake("symmpatterns::to_symmetric", lib=_library)
def _(x: Tensor, group_name: str, contiguous: bool = False) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format if contiguous else torch.preserve_format)


torch.library.register_autograd(
    "symmpatterns::to_symmetric", lambda ctx, gradient: (gradient, None, None), lib=_library
)


def symmetric_empty(
    size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device, group_name: str
) -> Tensor:
    """An uninitialised tensor in pool memory; collective over the group at the first calls of a compiled function.

    Raises DivergenceError when ranks ask for different sizes, SymmetricMemoryError when there is no memory to share.
    """
    return pool.take(size, stride, dtype, device, group_name)


@torch.library.register_fake("symmpatterns::symmetric_empty", lib=_library)
def _(size: Any, stride: Any, dtype: torch.dtype, device: torch.device, group_name: str) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


_library.impl("to_symmetric", to_symmetric, "CompositeExplicitAutograd")
_library.impl("symmetric_empty", symmetric_empty, "CompositeExplicitAutograd")


@functools.cache
def under_symmetric_memory(operator: Callable[..., Any], outputs: tuple[tuple[int, ...], ...]) -> Callable[..., Any]:
    """`operator`, run under ``symmetric_memory()``: how compiled code calls producers that allocate their own outputs.

    `outputs` are the places, in what it returns, of the tensors that a collective wants. One that is not symmetric all
    the same (memory that the operator did not allocate through torch) is copied.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with symmetric_memory():
            result = operator(*args, **kwargs)
        for place in outputs:
            if not is_symmetric(_at(result, place)):
                result = _replaced(result, place)
        return result

    return run


def _at(result: Any, place: tuple[int, ...]) -> Tensor:
    for index in place:
        result = result[index]
    return result


def _replaced(result: Any, place: tuple[int, ...]) -> Any:
    if not place:
        return to_symmetric(result, "")
    items = list(result)
    items[place[0]] = _replaced(items[place[0]], place[1:])
    return items


__all__ = ["strides_of", "symmetric_empty", "to_symmetric", "under_symmetric_memory"]
