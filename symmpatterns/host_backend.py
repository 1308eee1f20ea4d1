"""The host backend: symmetric memory for CPU tensors between the processes of one host, and its fused operators.

The native part (csrc/, built on first use, see host_build.py) registers an allocator with torch's own symmetric memory,
so ``torch.distributed._symmetric_memory`` works on CPU tensors as it does on CUDA tensors. docs/host-backend.md tells
how it works.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from symmpatterns import config, host_build
from symmpatterns.groups import DivergenceError, SymmetricMemoryError, SymmetricMemoryTimeout

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from symmpatterns.symmetric_memory import Workspace

__all__ = [
    "HostBackend",
    "allocation_scope",
    "build",
    "is_available",
    "is_loaded",
    "load",
    "matmul_all_reduce",
    "unavailable_reason",
]

_lock = threading.Lock()
_loaded: HostBackend | None = None
_failure: str | None = None


class HostBackend:
    """The loaded native part. Get it from ``load()``; all methods may be called from any thread."""

    def __init__(self, native: ModuleType) -> None:
        self.native = native
        native.configure(SymmetricMemoryError, SymmetricMemoryTimeout, DivergenceError, lambda: float(config.timeout_s))

    # --- memory -----------------------------------------------------------------------------------------------------

    def register_allocator(self) -> None:
        """Makes torch's symmetric memory API serve CPU tensors; again: nothing happens.

        Raises SymmetricMemoryError when torch already has another allocator for them.
        """
        self.native.register_allocator()

    def is_symmetric(self, address: int) -> bool:
        """Whether the address lies in symmetric memory of this process (its own, not a peer's)."""
        return self.native.segment_of(address) is not None

    def segment_of(self, address: int) -> tuple[int, int] | None:
        """(address, bytes) of the symmetric allocation that contains `address`, or None."""
        return self.native.segment_of(address)

    def live_segments(self) -> int:
        """How many symmetric allocations this process has."""
        return self.native.live_segments()

    def mapped_bytes(self) -> int:
        """Bytes of symmetric memory, own and peers', that are mapped into this process."""
        return self.native.mapped_bytes()

    @contextlib.contextmanager
    def allocation_scope(self) -> Iterator[None]:
        """CPU allocations of this thread, made by whatever operator, are symmetric inside. Scopes nest."""
        self.register_allocator()
        self.native.enter_scope()
        try:
            yield
        finally:
            self.native.exit_scope()

    # --- synchronisation --------------------------------------------------------------------------------------------

    def publish(self, flag: int, epoch: int) -> None:
        """Stores `epoch` at the address `flag`, after everything this thread has written before (release)."""
        self.native.publish(flag, epoch)

    def await_flag(
        self,
        flag: int,
        epoch: int,
        *,
        what: str,
        group: str,
        rank: int,
        peer: int,
        peer_memory: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        """Returns when the int32 at address `flag` has reached `epoch` (acquire).

        `peer_memory` is any mapped address of the peer's memory; with it a dead peer is noticed at once. Raises
        SymmetricMemoryTimeout after `timeout_s` (default: ``config.timeout_s``) or when the peer's process has ended.
        """
        limit = config.timeout_s if timeout_s is None else timeout_s
        self.native.await_flag(flag, epoch, what, group, rank, peer, peer_memory, limit)

    def barrier(self, workspace: Workspace, what: str = "barrier") -> None:
        """Returns when every rank of the workspace's group has called it; takes one epoch of the workspace."""
        self.native.barrier(*_tables(workspace), what, workspace.group.name, config.timeout_s)

    # --- fused operators --------------------------------------------------------------------------------------------

    def matmul_all_reduce_needs(self, rows: int, columns: int, item_bytes: int, world_size: int) -> tuple[int, int]:
        """(staging bytes, flags) that `matmul_all_reduce` of an [rows, columns] result needs of its workspace."""
        return self.native.matmul_all_reduce_needs(rows, columns, item_bytes, world_size)

    def matmul_all_reduce(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        workspace: Workspace,
        op: str,
    ) -> None:
        """out = sum ("sum") or mean ("avg") over ranks of ``a @ b + bias``, the same bits on every rank.

        a [M, K], b [K, N] of any strides, bias [N] or None, out [M, N] contiguous; float32, float64, bfloat16 or
        float16. K may differ between ranks. The workspace must have what `matmul_all_reduce_needs` says. The partial
        products are rounded to the dtype and summed in float32 (float64) in rank order.
        """
        self.native.matmul_all_reduce(a, b, bias, out, *_tables(workspace), op, workspace.group.name, config.timeout_s)


def _tables(workspace: Workspace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    return workspace.staging_ptrs, workspace.flag_ptrs, workspace.state, workspace.rank


def build() -> Path:
    """Builds the native part if the cache has none for this machine, and returns its path. Raises BuildError."""
    return host_build.build()


def load() -> HostBackend:
    """The native part, built if need be (once a machine, about half a minute). Raises SymmetricMemoryError.

    A failure is remembered: the next call raises at once.
    """
    global _loaded, _failure
    if _loaded is not None:
        return _loaded
    with _lock:
        if _loaded is None:
            if _failure is not None:
                raise SymmetricMemoryError(_failure)
            try:
                _loaded = HostBackend(_import(host_build.build()))
            except (SymmetricMemoryError, ImportError) as error:
                _failure = str(error)
                raise SymmetricMemoryError(_failure) from error
        return _loaded


def is_loaded() -> bool:
    """Whether ``load()`` has succeeded in this process."""
    return _loaded is not None


def is_available() -> bool:
    """Whether ``load()`` can be expected to succeed; builds nothing."""
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Why ``load()`` will not succeed, as a sentence with a remedy, or None."""
    return None if _loaded is not None else _failure or _missing()


@functools.lru_cache(maxsize=1)
def _missing() -> str | None:
    return host_build.missing()


def allocation_scope() -> contextlib.AbstractContextManager[None]:
    """``load().allocation_scope()``."""
    return load().allocation_scope()


def matmul_all_reduce(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: Workspace,
    op: str,
) -> None:
    """Reserves what the call needs of the workspace and runs ``load().matmul_all_reduce``; collective."""
    backend = load()
    workspace.reserve(*backend.matmul_all_reduce_needs(a.shape[0], b.shape[1], a.element_size(), workspace.world_size))
    backend.matmul_all_reduce(a, b, bias, out, workspace, op)


def _import(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(host_build.MODULE_NAME, str(path))
    spec = importlib.util.spec_from_file_location(host_build.MODULE_NAME, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
