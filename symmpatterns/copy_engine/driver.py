"""Copies and events on CUDA streams, by the CUDA driver's own functions.

torch has the same and takes the host several times as long for them, most of it for making another stream the current
one and back. A call of copy_engine/ makes a dozen, and a program that is launched from Python may be bounded by the host.
Streams and events are handles; all functions raise RuntimeError for an error of the driver.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from symmpatterns import compat

_handle = ctypes.c_void_p


def copy(target: torch.Tensor, source: torch.Tensor, stream: int) -> None:
    """target = source, of one size and dtype and both contiguous, when the stream comes to it."""
    if target.numel() > 0:
        _function("cuMemcpyAsync", ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, _handle)(
            target.data_ptr(), source.data_ptr(), source.nbytes, stream
        )


def record(event: int, stream: int) -> None:
    """The event comes behind everything that the stream has been given."""
    _function("cuEventRecord", _handle, _handle)(event, stream)


def wait(stream: int, event: int) -> None:
    """What the stream is given from here on comes behind what the event was last recorded behind."""
    _function("cuStreamWaitEvent", _handle, _handle, ctypes.c_uint)(stream, event, 0)


@functools.cache
def _function(name: str, *types: Any) -> Callable[..., int]:
    function = getattr(compat.cuda_driver(), name)
    function.argtypes, function.restype = types, _check(name)
    return function


def _check(name: str) -> Callable[[int], int]:
    def check(code: int) -> int:
        if code != 0:
            text = ctypes.c_char_p()
            compat.cuda_driver().cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"CUDA error: {(text.value or b'').decode()} ({code}) in {name}")
        return code

    return check
