"""Symmetric memory that the ranks of a workspace allocate together, and replace by more of it together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from symmpatterns.groups import SymmetricMemoryError
from symmpatterns.symmetric_memory import Handle, empty
from symmpatterns.workspace import Workspace

_GRAIN = 1 << 16  # sizes are multiples of this many bytes
_LARGE = 1 << 28


def grown(wanted: int, present: int) -> int:
    """The next size, in bytes, for `wanted` bytes where there are `present`: doubled while it is small."""
    return -(-max(wanted, min(2 * present, _LARGE)) // _GRAIN) * _GRAIN


def allocate(
    workspace: Workspace, what: str, size: int, fill: Callable[[torch.Tensor], object] | None = None
) -> Handle:
    """`size` bytes on every rank, filled by `fill`; collective. No rank is inside an older call when it returns.

    So what the new memory replaces may be freed. Raises SymmetricMemoryError during CUDA-graph capture, DivergenceError
    when the ranks want different sizes.
    """
    device = workspace.device
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise SymmetricMemoryError(
                f"group {workspace.group.name!r} needs {size} bytes of {what}, and memory cannot be shared while a CUDA "
                "graph is being captured: run the function once before capture"
            )
        torch.cuda.synchronize(device)
    workspace.group.agree(f"growth of the {what}", {"bytes": size, "device": device.type}, workspace.watch)
    memory = empty((size,), dtype=torch.uint8, device=device)
    if fill is not None:
        fill(memory)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Handle(memory, workspace.group)  # ends after every rank has filled its own
