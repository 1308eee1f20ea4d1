"""``with symmetric_memory():`` what is allocated inside is in symmetric memory, in eager mode and in compiled functions."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from symmpatterns import compat
from symmpatterns.functions import NEW, SHARED, UNKNOWN, WRITTEN, kind_of, report_left
from symmpatterns.groups import SymmetricMemoryError, get_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class symmetric_memory(TorchFunctionMode):
    """``with symmetric_memory():`` tensors that any operator of this thread allocates inside are in symmetric memory.

    CUDA allocations of the block come from torch's symmetric memory pool, CPU allocations from shared memory. `group`
    is checked to exist and may be left out; the memory itself belongs to no group until `rendezvous`. Blocks nest.

    In a compiled function the block is a TorchFunctionMode, which Dynamo traces: it marks the results of the operators
    and functions that are called in it, where they are new memory. A view of what was made outside stays there, as in
    eager mode; of what may be either, the report says that it was left alone.
    """

    def __init__(self, group: str | ProcessGroup | None = None) -> None:
        super().__init__()
        self._group = group
        self._scopes: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> symmetric_memory:
        if torch.compiler.is_compiling():
            _check_group(self._group)
            super().__enter__()
            return self
        scope = allocation_scope(self._group)
        scope.__enter__()
        self._scopes.append(scope)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if torch.compiler.is_compiling():
            super().__exit__(kind, error, trace)
            return
        self._scopes.pop().__exit__(kind, error, trace)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        result = func(*args, **kwargs)
        kind = _kind_of(func)
        if kind >= 0:
            in_place = kwargs.get("inplace", args[kind] if kind < len(args) else False)
            kind = WRITTEN if in_place else NEW
        elif func is torch.Tensor.__getitem__:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            kind = NEW if any(isinstance(each, (torch.Tensor, list)) for each in indices) else SHARED
        if "out" in kwargs:
            kind = WRITTEN
        if kind == WRITTEN or (kind == UNKNOWN and _holds_tensors(result)):
            _report_left(func, kind)
        return _marked(result) if kind == NEW else result


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(isinstance(each, torch.Tensor) for each in value)
    return isinstance(value, torch.Tensor)


def _marked(value: Any) -> Any:
    """A value, with the mark that its tensors are to be in symmetric memory; no group has asked yet."""
    if isinstance(value, torch.Tensor):
        return torch.ops.symmpatterns.to_symmetric(value, "")
    if isinstance(value, (list, tuple)):
        marked = [_marked(each) for each in value]
        return marked if isinstance(value, list) else type(value)(marked)
    return value


# Dynamo calls these while it traces, with the real function, and takes what they return for a constant.


@torch.compiler.assume_constant_result
def _check_group(group: Any) -> int:
    if group is not None:
        get_group(group)
    return 0


@torch.compiler.assume_constant_result
def _kind_of(func: Any) -> int:
    return kind_of(func)


@torch.compiler.assume_constant_result
def _report_left(func: Any, kind: int) -> int:
    report_left(func, kind)
    return 0


_cuda_scopes = threading.local()  # .devices: those for which this thread is inside a scope


@contextlib.contextmanager
def _cuda_scope(index: int) -> Iterator[None]:
    """CUDA allocations of this thread come from torch's symmetric memory pool; torch refuses to enter that twice."""
    devices: set[int] = _cuda_scopes.__dict__.setdefault("devices", set())
    if index in devices:
        yield
        return
    with compat.use_symmetric_mem_pool(torch.device("cuda", index)):
        devices.add(index)
        try:
            yield
        finally:
            devices.discard(index)


@contextlib.contextmanager
def allocation_scope(group: str | ProcessGroup | None = None) -> Iterator[None]:
    """``symmetric_memory`` of eager code."""
    if group is not None:
        get_group(group)
    with contextlib.ExitStack() as stack:
        if torch.cuda.is_available():
            stack.enter_context(_cuda_scope(torch.cuda.current_device()))
        from symmpatterns import host_backend

        if host_backend.is_available():
            stack.enter_context(host_backend.allocation_scope())
        elif not torch.cuda.is_available():
            raise SymmetricMemoryError(f"no symmetric memory here: {host_backend.unavailable_reason()}")
        yield
