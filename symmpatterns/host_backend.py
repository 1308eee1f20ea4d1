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
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from symmpatterns import config, host_build
from symmpatterns.groups import DivergenceError, SymmetricMemoryError, SymmetricMemoryTimeout

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from symmpatterns.workspace import Workspace

__all__ = [
    "HostBackend",
    "all_gather",
    "all_gather_matmul",
    "all_reduce",
    "all_reduce_rms_norm",
    "allocation_scope",
    "build",
    "gather_needs",
    "is_available",
    "is_loaded",
    "load",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "reduce_scatter",
    "reduction_needs",
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
        """Bytes of symmetric memory, own, spare and peers', that are mapped into this process."""
        return self.native.mapped_bytes()

    def trim(self) -> None:
        """Gives back the memory of freed tensors that is kept for the next ones (at most 256 MiB)."""
        self.native.trim()

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

    def barrier(self, workspace: Workspace, what: str = "barrier") -> None:
        """Returns when every rank of the workspace's group has called it; takes one epoch of the workspace."""
        workspace.reserve(1, workspace.world_size)  # a workspace has no flags before its first reservation
        self.native.barrier(what, _arguments(workspace))


def _arguments(workspace: Workspace) -> tuple[object, ...]:
    """What the native operators take of a workspace."""
    tables = (workspace.staging_ptrs, workspace.flag_ptrs, workspace.state)
    return (*tables, workspace.rank, workspace.group.name, float(config.timeout_s), workspace.site)


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


# --- operators ----------------------------------------------------------------------------------------------------
#
# Each is collective, reserves what it needs of the workspace, and takes one epoch of it. CPU tensors of float32,
# float64, bfloat16 or float16 (all_gather: of any dtype); matrices a, b and biases of any strides; outputs contiguous.
# Sums over ranks are taken in rank order in float32 (float64 for float64) of values that were rounded to the dtype, and
# rounded once: the ranks get the same bits. Matrices in float8_e4m3fn have scales (float32 [1], or one for each row of a
# and column of b); `partial` is the dtype to which products are rounded before they are summed (default: that of out),
# and the sum may be float32 instead. Raise ValueError for operands that do not fit, SymmetricMemoryTimeout when
# a rank does not come (the workspace cannot be used any more then).


def reduction_needs(elements: int, item_bytes: int, world_size: int) -> tuple[int, int]:
    """(staging bytes, flags) of an all-reduce or reduce-scatter of `elements` elements on each rank."""
    return load().native.reduction_needs(elements, item_bytes, world_size)


def gather_needs(elements: int, item_bytes: int, world_size: int) -> tuple[int, int]:
    """(staging bytes, flags) of an all-gather of `elements` elements of each rank."""
    return load().native.gather_needs(elements, item_bytes, world_size)


def _reserve_reduction(workspace: Workspace, elements: int, like: torch.Tensor) -> ModuleType:
    native = load().native
    workspace.reserve(*native.reduction_needs(elements, like.element_size(), workspace.world_size))
    return native


def _reserve_gather(workspace: Workspace, shard: torch.Tensor) -> ModuleType:
    native = load().native
    workspace.reserve(*native.gather_needs(shard.numel(), shard.element_size(), workspace.world_size))
    return native


Scales = tuple["torch.Tensor | None", "torch.Tensor | None"]


def matmul_all_reduce(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: Workspace,
    op: str,
    scales: Scales = (None, None),
    partial: torch.dtype | None = None,
) -> None:
    """out [M, N] = sum ("sum") or mean ("avg") over ranks of ``a @ b + bias``; a [M, K], b [K, N], bias [N] or None.

    Or a batch: [B, M, N], [B, M, K], [B, K, N], [B, N]. K may differ between ranks.
    """
    native = _reserve_reduction(workspace, out.numel(), out)
    native.matmul_all_reduce(a, b, bias, out, op, scales, partial or out.dtype, _arguments(workspace))


def matmul_reduce_scatter(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: Workspace,
    op: str,
    scatter_dim: int,
    scales: Scales = (None, None),
    partial: torch.dtype | None = None,
) -> None:
    """out = this rank's part, along `scatter_dim`, of the sum or mean over ranks of ``a @ b + bias``.

    out [M / W, N] for scatter_dim 0, [M, N / W] for scatter_dim 1; the dimension must be a multiple of W.
    """
    native = _reserve_reduction(workspace, out.numel() * workspace.world_size, out)
    native.matmul_reduce_scatter(a, b, bias, out, scatter_dim, op, scales, partial or out.dtype, _arguments(workspace))


def all_gather_matmul(
    a_shard: torch.Tensor,
    bs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor],
    gathered: torch.Tensor | None,
    workspace: Workspace,
    gather_dim: int,
    scale_a: torch.Tensor | None = None,
    scale_bs: Sequence[torch.Tensor | None] | None = None,
) -> None:
    """outs[i] = ``a @ bs[i] + biases[i]``, where a is the ranks' shards side by side along `gather_dim` (0 rows, 1 K).

    a_shard [S, K] gives a [W * S, K] for gather_dim 0 and [S, W * K] for gather_dim 1; every rank's shard has the same
    shape. `gathered`, if given, receives a. `scale_a` is that of the gathered a.
    """
    native = _reserve_gather(workspace, a_shard)
    native.all_gather_matmul(
        a_shard, list(bs), list(biases), list(outs), gathered, gather_dim, scale_a, scale_bs or [None] * len(bs),
        _arguments(workspace),
    )  # fmt: skip


def all_reduce(x: torch.Tensor, out: torch.Tensor, workspace: Workspace, op: str) -> None:
    """out = sum or mean over ranks of x, element by element; out may be x."""
    native = _reserve_reduction(workspace, x.numel(), x)
    native.all_reduce(x, out, op, _arguments(workspace))


def reduce_scatter(x: torch.Tensor, out: torch.Tensor, workspace: Workspace, op: str) -> None:
    """out = this rank's part, along dimension 0, of the sum or mean over ranks of x."""
    native = _reserve_reduction(workspace, x.numel(), x)
    native.reduce_scatter(x, out, op, _arguments(workspace))


def all_gather(x: torch.Tensor, out: torch.Tensor, workspace: Workspace) -> None:
    """out = all ranks' x, one behind the other."""
    native = _reserve_gather(workspace, x)
    native.all_gather(x, out, _arguments(workspace))


def all_reduce_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    norm: torch.Tensor,
    total: torch.Tensor,
    workspace: Workspace,
    op: str,
    eps: float,
) -> None:
    """total = sum or mean over ranks of x (+ residual); norm = its RMSNorm (* weight); [M, N], all contiguous."""
    native = _reserve_reduction(workspace, x.numel(), x)
    native.all_reduce_rms_norm(x, residual, weight, norm, total, eps, op, _arguments(workspace))


def _import(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(host_build.MODULE_NAME, str(path))
    spec = importlib.util.spec_from_file_location(host_build.MODULE_NAME, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
