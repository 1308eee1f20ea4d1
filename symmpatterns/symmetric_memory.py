"""The runtime: symmetric tensors and rendezvous.

Two backends behind one interface, torch's own ``torch.distributed._symmetric_memory``:

cuda  torch's CUDA symmetric memory: peers' memory mapped over NVLink or PCIe.
host  CPU tensors in memory shared between the processes of one host (host_backend.py registers the allocator).
"""

from __future__ import annotations

import concurrent.futures
import math
import operator
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch

from symmpatterns import compat, config
from symmpatterns.groups import (
    DivergenceError,
    Group,
    SymmetricMemoryError,
    SymmetricMemoryTimeout,
    get_group,
    host_identity,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "DivergenceError",
    "Handle",
    "SymmetricMemoryError",
    "SymmetricMemoryTimeout",
    "empty",
    "is_symmetric",
    "rendezvous",
]


def backend_of(device: torch.device) -> str:
    """ "cuda" or "host"; raises SymmetricMemoryError for a device that has no symmetric memory."""
    if device.type == "cuda":
        return "cuda"
    if device.type == "cpu":
        return "host"
    raise SymmetricMemoryError(f"symmetric memory exists for CUDA and CPU tensors, not for device {device}")


def prepare(device: torch.device) -> None:
    """Makes torch's symmetric memory work for tensors of `device`."""
    if backend_of(device) == "host":
        from symmpatterns import host_backend

        host_backend.load().register_allocator()


def empty(
    size: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A contiguous uninitialised tensor in symmetric memory; local, so follow it with `rendezvous` on every rank.

    Raises TypeError or ValueError for what is no size, dtype or device, SymmetricMemoryError for a device without
    symmetric memory, when there is not enough memory, and while a CUDA graph is being captured.
    """
    try:
        size = [operator.index(n) for n in size]
    except TypeError:
        raise TypeError(f"empty takes a size such as (4, 6), not {size!r}") from None
    if any(n < 0 for n in size):
        raise ValueError(f"empty takes a size of no negative numbers, not {size}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"empty takes a torch.dtype, not {dtype!r}")
    if math.prod(max(n, 1) for n in size) * dtype.itemsize >= 1 << 63:  # torch's own code would end the process
        raise SymmetricMemoryError(f"cannot allocate a tensor of size {size} and {dtype}: no address space is so large")
    device = _device(device)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise SymmetricMemoryError(
                "symmetric memory cannot be allocated while a CUDA graph is being captured: its replays would use memory "
                "that may have been freed. Run the function once before capture, or allocate the tensor outside"
            )
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    prepare(device)
    stride = [math.prod(size[i + 1 :]) for i in range(len(size))]
    return compat.symm_mem_class().empty_strided_p2p(tuple(size), tuple(stride), dtype, device)


def _device(device: torch.device | str) -> torch.device:
    if not isinstance(device, (torch.device, str)):
        raise TypeError(f"empty takes a torch.device or its name, not {device!r}")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"there is no device {device!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SymmetricMemoryError("there is no CUDA device in this process")
    return torch.device("cpu") if device.type == "cpu" else device  # there is but one, and its tensors have no index


def is_symmetric(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is symmetric, that is, whether `rendezvous` may be called on it.

    A CPU or CUDA tensor without elements has no memory to share: the answer is yes, wherever it was made.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"is_symmetric takes a tensor, not {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        return False
    if tensor.numel() == 0:
        return tensor.device.type in ("cpu", "cuda")
    return _lies_in_symmetric_memory(tensor)


def _lies_in_symmetric_memory(tensor: torch.Tensor) -> bool:
    if tensor.device.type == "cpu":
        from symmpatterns import host_backend

        return host_backend.is_loaded() and host_backend.load().is_symmetric(tensor.untyped_storage().data_ptr())
    if tensor.device.type == "cuda":
        return compat.is_symm_mem_tensor(tensor)
    return False


_GroupLike: TypeAlias = "str | ProcessGroup | None"
# Handles of memory that is used again and again (the pool of compiled functions), by the address of its storage.
kept_handles: dict[int, Callable[[], Callable[[torch.Tensor, _GroupLike], Handle | None] | None]] = {}


class Handle:
    """One symmetric tensor as all ranks of a group see it.

    rank, world_size  of this process in the group
    buffers           every rank's tensor, the own one included, mapped here; same shape, dtype and strides
    buffer_ptrs       their addresses in this process
    flags             every rank's int32 signal pad for protocols of the caller's own; zero-filled
    """

    def __init__(self, tensor: torch.Tensor, group: Group) -> None:
        self._tensor = tensor  # keeps the own memory alive as long as the handle
        name = group.rendezvous_name(tensor.device)
        self._symm = to_outlive(tensor.device, lambda: compat.symm_mem_class().rendezvous(tensor, name))
        if self._symm is None:
            raise SymmetricMemoryError("the tensor is not in symmetric memory")
        self.group = group
        self.rank = group.rank
        self.world_size = group.world_size
        base = self._symm.buffer_ptrs[self.rank]
        # Not data_ptr(), which is null for an empty tensor.
        self.offset = tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size() - base
        answers = group.exchange("rendezvous of a tensor", f"{_describe(tensor)}|{self.offset}")
        described = [answer.rsplit("|", 1) for answer in answers]
        if len({d[0] for d in described}) > 1:
            each = "; ".join(f"rank {rank}: {d[0]}" for rank, d in enumerate(described))
            raise DivergenceError(
                f"rendezvous over group {group.name!r} needs the same shape, dtype and strides on every rank: {each}"
            )
        self.buffers: list[torch.Tensor] = []
        for rank, (_, offset) in enumerate(described):
            if rank == self.rank:
                self.buffers.append(tensor)
                continue
            span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
            flat = self._symm.get_buffer(rank, (int(offset) + span * tensor.element_size(),), torch.uint8, 0)
            whole = flat[int(offset) :].view(tensor.dtype)
            self.buffers.append(whole.as_strided(tensor.shape, tensor.stride()))
        self.buffer_ptrs: list[int] = [b.data_ptr() for b in self.buffers]
        self._token = zlib.crc32(described[0][0].encode()) or 1

    @property
    def flags(self) -> list[torch.Tensor]:
        words = self._symm.signal_pad_size // 4
        return [self._symm.get_signal_pad(r, (words,), torch.int32, 0) for r in range(self.world_size)]

    def barrier(self, channel: int = 0) -> None:
        """Returns (on CUDA: the current stream goes on) when every rank of the group has called it.

        Raises SymmetricMemoryTimeout when a rank does not come; on CPU, DivergenceError on every rank when the ranks'
        handles are of tensors of different shape, dtype or strides, which the ranks may have put into the same memory.
        """
        if not isinstance(channel, int) or channel.bit_length() > 31:
            raise TypeError(f"barrier takes the number of a channel, not {channel!r}")
        limit_ms = max(1, int(config.timeout_s * 1000))
        try:
            if self._tensor.device.type == "cpu":
                from symmpatterns import host_backend

                host_backend.load().native.barrier_of(self._symm, channel, limit_ms, self._token)
            else:
                self._symm.barrier(channel, limit_ms)
        except DivergenceError as error:
            raise DivergenceError(f"{error}: this rank's has {_describe(self._tensor)}") from None
        except SymmetricMemoryError:
            raise
        except RuntimeError as error:
            raise SymmetricMemoryTimeout(f"barrier over group {self.group.name!r}: {error}") from error


_T = TypeVar("_T")


def to_outlive(device: torch.device, make: Callable[[], _T]) -> _T:
    """``make()``, whose CUDA memory is to outlive the running call.

    While Inductor warms up or records a CUDA graph of its own (mode="reduce-overhead"), what this thread allocates goes
    to the graphs' pool, in which nothing may outlive the call. So another thread makes it.
    """
    if device.type != "cuda":
        return make()

    def run() -> _T:
        with torch.cuda.device(device):
            made = make()
            torch.cuda.current_stream().synchronize()
        return made

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def _describe(tensor: torch.Tensor) -> str:
    return f"shape {list(tensor.shape)} dtype {tensor.dtype} strides {list(tensor.stride())}"


def rendezvous(tensor: torch.Tensor, group: str | ProcessGroup | None = None) -> Handle:
    """Maps every rank's tensor into this process; collective over `group` (default: the default group).

    `tensor` must have been allocated by `empty` or inside ``symmetric_memory()``; a view is fine, and so is any tensor
    without elements. Raises TypeError or SymmetricMemoryError for anything else, DivergenceError when shapes, dtypes or
    strides differ between ranks, SymmetricMemoryTimeout when a rank does not come.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"rendezvous takes a tensor, not {type(tensor).__name__}")
    handle = _kept_handle(tensor, group)  # first: declared operators come here in each call
    if handle is not None:
        return handle
    resolved = get_group(group)
    if resolved.is_fake:
        raise SymmetricMemoryError(f"group {resolved.name!r} uses torch's fake backend: it has no other processes")
    if not is_symmetric(tensor):
        raise SymmetricMemoryError(
            f"a {tensor.device} tensor of {_describe(tensor)} is not in symmetric memory: allocate it with "
            "symmpatterns.empty(...) or inside `with symmpatterns.symmetric_memory():`"
        )
    if tensor.numel() == 0 and not _lies_in_symmetric_memory(tensor):
        # Allocators give nothing for no bytes. The handle has to have memory all the same, for its flags and barrier.
        somewhere = empty((1,), dtype=tensor.dtype, device=tensor.device)
        tensor = somewhere.as_strided(tensor.shape, tensor.stride())
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise SymmetricMemoryError(
            "rendezvous: memory cannot be mapped while a CUDA graph is being captured: do it before, and keep the handle"
        )
    require_one_host(resolved)
    return Handle(tensor, resolved)


def _kept_handle(tensor: torch.Tensor, group: _GroupLike) -> Handle | None:
    """The handle of a tensor in memory of the pool, for its group."""
    kept = kept_handles.get(tensor.untyped_storage().data_ptr()) if tensor.layout is torch.strided else None
    keeper = None if kept is None else kept()
    return None if keeper is None else keeper(tensor, group)


def require_one_host(group: Group) -> None:
    """Raises SymmetricMemoryError on every rank unless all ranks of `group` run on one host; collective once a group."""
    if group.unique_name in _one_host:
        return
    hosts = group.exchange("host", host_identity())
    if len(set(hosts)) > 1:
        strangers = [rank for rank, host in enumerate(hosts) if host != hosts[group.rank]]
        raise SymmetricMemoryError(
            f"ranks {strangers} of group {group.name!r} run on another host (or in another PID namespace or as another "
            "user) than this rank: they cannot map each other's memory; use groups of ranks of one host"
        )
    _one_host.add(group.unique_name)


_one_host: set[str] = set()
