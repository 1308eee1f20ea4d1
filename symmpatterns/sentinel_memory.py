"""Symmetric memory in which data is its own flag: whoever reads a place that is not filled yet finds a sentinel there.

Between calls every 16 bits of it are 0x8000, -0.0 in bf16 and fp16 and within a denormal in fp32, but for the heads at the
beginning of each half (triton_kernels/_sentinel.py), which keep what was last written there. Writers never store 0x8000,
and a call's readers put it back. So a call may use any part behind the heads, whatever was there before.
"""

from __future__ import annotations

import weakref

import torch

from symmpatterns.group_memory import allocate, grown
from symmpatterns.symmetric_memory import Handle, to_outlive
from symmpatterns.workspace import Workspace

SENTINEL = -0x8000  # as int16


class SentinelMemory:
    """Two halves for the calls of one workspace, as its staging memory has.

    ptrs        int64 [2, W] on the device: address of half h of rank r, as mapped here; the table stays where it is
    half_bytes  bytes of one half
    """

    def __init__(self, workspace: Workspace) -> None:
        device, world_size = workspace.device, workspace.world_size
        self.ptrs = to_outlive(device, lambda: torch.zeros(2, world_size, dtype=torch.int64, device=device))
        self.half_bytes = 0
        self._handle: Handle | None = None

    def _grow(self, workspace: Workspace, wanted: int) -> None:
        half = grown(wanted, self.half_bytes)
        handle = allocate(
            workspace, "sentinel memory", 2 * half, lambda memory: memory.view(torch.int16).fill_(SENTINEL)
        )
        bases = torch.tensor(handle.buffer_ptrs, dtype=torch.int64)
        self.ptrs.copy_(torch.stack([bases, bases + half]))
        if workspace.device.type == "cuda":
            torch.cuda.synchronize(workspace.device)
        self._handle, self.half_bytes = handle, half


_of_workspace: weakref.WeakKeyDictionary[Workspace, SentinelMemory] = weakref.WeakKeyDictionary()


def reserve(workspace: Workspace, wanted: int) -> torch.Tensor:
    """The addresses of halves of at least `wanted` bytes; collective when they have to grow, free when they have not.

    Raises SymmetricMemoryError when that would have to happen during CUDA-graph capture.
    """
    if workspace.launches is None:  # kernels are only compiled: any table will do
        return workspace.staging_ptrs
    memory = _of_workspace.get(workspace)
    if memory is None:
        memory = _of_workspace[workspace] = SentinelMemory(workspace)
    if memory.half_bytes < wanted:
        memory._grow(workspace, wanted)
    return memory.ptrs
