"""The operators of peer views as generated code calls them: without the dispatcher, unless a profiler records.

The dispatcher gives a call its name in a profiler's trace, and takes longer than the call itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from symmpatterns import compat
from symmpatterns.peer_views import operators


def _direct(function: Callable[..., Any], overload: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return overload(*args) if compat.is_profiled() else function(*args)

    return call


peer_buffers = _direct(operators.peer_buffers, torch.ops.symmpatterns.peer_buffers.default)
peer_sources = _direct(operators.peer_sources, torch.ops.symmpatterns.peer_sources.default)
barrier_ = _direct(operators.barrier_, torch.ops.symmpatterns.barrier_.default)
