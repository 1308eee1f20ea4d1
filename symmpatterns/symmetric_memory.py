"""The runtime: symmetric tensors, rendezvous, and the shared staging workspace of the fused operators.

Two backends behind one interface, torch's own ``torch.distributed._symmetric_memory``:

cuda  torch's CUDA symmetric memory: peers' memory mapped over NVLink or PCIe.
host  CPU tensors in memory shared between the processes of one host (host_backend.py registers the allocator).

The workspace protocol, and why nobody ever overwrites what somebody still reads, is docs/memory-ordering.md.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import contextlib
import ctypes
import functools
import math
import operator
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from symmpatterns import compat, config
from symmpatterns.functions import NEW, SHARED, UNKNOWN, WRITTEN, kind_of, report_left
from symmpatterns.groups import (
    DivergenceError,
    Group,
    SymmetricMemoryError,
    SymmetricMemoryTimeout,
    get_group,
    host_identity,
    is_alive,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "DivergenceError",
    "Handle",
    "SymmetricMemoryError",
    "SymmetricMemoryTimeout",
    "Workspace",
    "empty",
    "get_workspace",
    "is_symmetric",
    "rendezvous",
    "symmetric_memory",
]

FLAG_CAPACITY = 65536  # int64 flags in each half of a workspace
_STATE_WORDS = 16
# Words of the state. On CUDA the error's words are in pinned memory instead, at the address that the state has: they can
# still be read when the kernel that wrote them has trapped.
_ERROR_CODE, _ERROR_PEER, _ERROR_SITE, _ERROR_SEEN_SITE = 2, 3, 7, 8
_ERROR_WORDS = 7  # from the code on: code, peer, flag, call expected, call seen, site, site seen
_RECORD_ADDRESS = slice(12, 14)
_DIVERGED = 3  # an error code
_NO_SITE = 0x7FFFFFFF  # in a flag: its writer makes no call, because it has to agree on something with the others
_GRAIN = 1 << 16  # staging grows in multiples of this many bytes


def backend_of(device: torch.device) -> str:
    """ "cuda" or "host"; raises SymmetricMemoryError for a device that has no symmetric memory."""
    if device.type == "cuda":
        return "cuda"
    if device.type == "cpu":
        return "host"
    raise SymmetricMemoryError(f"symmetric memory exists for CUDA and CPU tensors, not for device {device}")


def _prepare(device: torch.device) -> None:
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
    _prepare(device)
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
    return device


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
        self._symm = _to_outlive(tensor.device, lambda: compat.symm_mem_class().rendezvous(tensor, name))
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


def _to_outlive(device: torch.device, make: Callable[[], _T]) -> _T:
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


class Workspace:
    """The staging memory, flags and epoch that all fused operators of one (group, device) share.

    staging_ptrs, flag_ptrs  int64 [2, W] on the device: address of half h of rank r, as mapped here
    state                    int32 [16] on the device: epoch, finished programs, error record
    site                     number of the call site that is running; what its flags carry, beside the epoch
    staging_bytes            bytes of one half

    The tables keep their addresses when the memory behind them grows, so launches recorded in a CUDA graph stay valid.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        require_one_host(group)
        group.agree("the first use of symmetric memory", _identity(device))
        _prepare(device)
        self.group = group
        self.rank = group.rank
        self.world_size = group.world_size
        self.device = device
        self._record = (ctypes.c_int32 * _STATE_WORDS)()
        self.staging_ptrs, self.flag_ptrs, self.state = _to_outlive(device, self._make_tables)
        self.staging_bytes = 0
        self.broken: str | None = None
        self._handle: Handle | None = None
        self.site = 0  # none that the ranks have agreed on
        self._agreed: dict[tuple[object, ...], int] = {}
        self._sites = [(0, "a call without a number")]  # (first number, what it is), in order
        self._next_site = 1
        self._stream: Any = None
        self._raw_stream: int | None = None
        # What calls of one signature need not find out again: of the operators (operators/) and of the launches
        # of kernels (triton_kernels/_launch.py).
        self.ready: dict[tuple[object, ...], Any] = {}
        self.launches: dict[Any, Any] = {}
        self.lock = threading.RLock()  # a call reads and bumps the epoch: one call at a time in a process

    def _make_tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        staging_ptrs, flag_ptrs = torch.zeros(2, 2, self.world_size, dtype=torch.int64, device=self.device)
        state = torch.zeros(_STATE_WORDS, dtype=torch.int32, device=self.device)
        if self.device.type == "cuda":
            self._pinned = torch.zeros(_STATE_WORDS, dtype=torch.int32).pin_memory()
            self._record = (ctypes.c_int32 * _STATE_WORDS).from_address(self._pinned.data_ptr())
            state[_RECORD_ADDRESS].view(torch.int64).fill_(self._pinned.data_ptr())
            _explain_uncaught_errors()
        return staging_ptrs, flag_ptrs, state

    def reserve(self, staging_bytes: int, flags: int) -> None:
        """Makes each half hold `staging_bytes`; collective when it has to grow, free when it has not."""
        if flags > FLAG_CAPACITY:
            raise SymmetricMemoryError(f"a call wants {flags} flags; a workspace has {FLAG_CAPACITY}")
        if staging_bytes <= self.staging_bytes:
            return
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise SymmetricMemoryError(
                    f"group {self.group.name!r} needs {staging_bytes} bytes of staging and has {self.staging_bytes}, and "
                    "memory cannot be shared while a CUDA graph is being captured: run the function once before capture"
                )
            torch.cuda.synchronize(self.device)
        wanted = max(staging_bytes, min(2 * self.staging_bytes, 1 << 28))
        half = -(-wanted // _GRAIN) * _GRAIN
        flag_bytes = 8 * FLAG_CAPACITY
        epoch = int(self.state[0])
        growth = {"bytes": half, "device": self.device.type, "calls so far": epoch}
        self.group.agree("growth of the workspace", growth, self.watch)
        memory = empty((2 * flag_bytes + 2 * half,), dtype=torch.uint8, device=self.device)
        # New flags start at the epoch of the last call: older than every call to come, also after the epoch wraps.
        memory[: 2 * flag_bytes].view(torch.int64).fill_(epoch & 0xFFFFFFFF)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        handle = Handle(memory, self.group)  # ends after every rank has filled its flags
        bases = torch.tensor(handle.buffer_ptrs, dtype=torch.int64)
        self.flag_ptrs.copy_(torch.stack([bases, bases + flag_bytes]))
        self.staging_ptrs.copy_(torch.stack([bases + 2 * flag_bytes, bases + 2 * flag_bytes + half]))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        # Freeing the old memory is safe: every rank has come to this rendezvous, so none is inside an older call.
        self._handle = handle
        self.staging_bytes = half

    def agree(self, fields: tuple[str, ...], site: tuple[object, ...], steps: int = 1) -> int:
        """Checks, the first time only, that every rank makes this call; `fields` names the values in `site`.

        Returns the site's number, the same on every rank, with the `steps` - 1 that follow it. Its calls publish it
        beside the epoch, so ranks that later run known sites in different orders notice.
        """
        known = self._agreed.get(site)
        if known is not None:
            return known
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise SymmetricMemoryError(
                f"{site[0]} was not called with these shapes before CUDA-graph capture: run the function once before capture"
            )
        self.group.agree(f"a call of {site[0]}", dict(zip(fields, site, strict=True)), self.watch)
        number = self._agreed[site] = self._next_site
        self._next_site += steps
        self._sites.append((number, f"{site[0]} ({', '.join(f'{n} {v}' for n, v in zip(fields[1:], site[1:]))})"))
        return number

    def watch(self, what: str, is_here: Callable[[int], bool]) -> None:
        """Raises when a peer is in a call that this rank has not made, and so will not come to the exchange.

        A flag of the next call proves it: who writes that has left `what` behind, and then all are here, or is not
        going to come to it before this rank has made the call. The peers are told through their flags.
        """
        if self.device.type != "cpu" or self.staging_bytes == 0:
            return
        epoch = int(self.state[0]) + 1 & 0xFFFFFFFF
        flags = self.flag_ptrs[epoch & 1].tolist()
        for peer, flag in enumerate(self._flags_at(flags[self.rank]).tolist()):
            if peer != self.rank and flag & 0xFFFFFFFF == epoch and not all(map(is_here, range(self.world_size))):
                for other in range(self.world_size):
                    self._flags_at(flags[other])[self.rank] = (_NO_SITE << 32) | epoch
                record = {
                    _ERROR_CODE: _DIVERGED,
                    _ERROR_PEER: peer,
                    _ERROR_SITE: _NO_SITE,
                    _ERROR_SEEN_SITE: flag >> 32,
                }
                for word, value in record.items():
                    self.state[word] = value
                raise DivergenceError(f"group {self.group.name!r}: this rank is at {what!r}, for the first time")

    def _flags_at(self, address: int) -> torch.Tensor:
        return compat.tensor_at(address, (self.world_size,), (1,), torch.int64, self.device)

    def call(self, what: str, site: int = 0) -> _Call:
        """Around each launch on this workspace: one at a time, ordered over streams, refused after a failure.

        `site` is the number that `agree` has given.
        """
        return _Call(self, what, site)

    def name_divergence(self, error: BaseException) -> None:
        """Adds to an error of a call what this rank and its peer were doing, if that is what the state records."""
        state = self.state.tolist() if self.device.type == "cpu" else []
        if state and state[_ERROR_CODE] == _DIVERGED:
            where = self._divergence(state[_ERROR_PEER], state[_ERROR_SITE], state[_ERROR_SEEN_SITE])
            error.args = (f"{error}: {where}",)

    def _divergence(self, peer: int, site: int, seen_site: int) -> str:
        return (
            f"rank {self.rank} is at {self._name_of(site)}; rank {peer} is at {self._name_of(seen_site)}. Every rank has "
            "to run the same operators in the same order"
        )

    def gpu_failure(self) -> SymmetricMemoryError | None:
        """Why a kernel of this workspace has trapped, if one has; does not wait for the device."""
        if self._record[0] == 0:
            return None
        code, peer, index, expected, seen, site, seen_site = self._record[:_ERROR_WORDS]
        where = f"group {self.group.name!r}"
        if code == _DIVERGED:
            return DivergenceError(f"{where}: {self._divergence(peer, site, seen_site)}")
        return SymmetricMemoryTimeout(
            f"{where}: rank {self.rank} gave up waiting for rank {peer} in {self._name_of(site)}: flag {index} should have "
            f"become {expected} (the number of this call) and was still {seen}; {self.group.waited_for(peer)}"
        )

    def has_failed(self) -> bool:
        """Whether a call has left its flags in a state that no later call can go on from (CPU; a GPU traps)."""
        return self.device.type == "cpu" and int(self.state[_ERROR_CODE]) != 0

    def _name_of(self, site: int) -> str:
        if site == _NO_SITE:
            return "a call that needs an agreement first"
        if not 0 <= site < self._next_site:
            return f"site {site}, which this rank does not know"
        first, text = self._sites[bisect.bisect_right(self._sites, site, key=lambda known: known[0]) - 1]
        return text if site == first else f"step {site - first} of {text}"

    def order_streams(self) -> None:
        """Two streams share one epoch: the later one waits. A capturing stream cannot wait for work outside."""
        raw = compat.current_raw_stream(self.device.index)
        if raw == self._raw_stream:
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self._stream)
        self._stream, self._raw_stream = stream, raw


class _Call:
    """``Workspace.call``; a class, because a generator costs as much as the rest of a call's bookkeeping."""

    __slots__ = ("_site", "_what", "_workspace")

    def __init__(self, workspace: Workspace, what: str, site: int) -> None:
        self._workspace = workspace
        self._what = what
        self._site = site

    def __enter__(self) -> None:
        workspace = self._workspace
        if not workspace.lock.acquire(blocking=False):
            raise SymmetricMemoryError(
                f"{self._what}: another thread is in a call of group {workspace.group.name!r}. The ranks have to make a "
                "group's calls in one order, which threads do not keep by themselves: give each thread a group of its "
                "own (torch.distributed.new_group), or let one call end before the other begins"
            )
        try:
            if workspace.broken is not None:
                raise SymmetricMemoryError(
                    f"{self._what}: group {workspace.group.name!r} can no longer be used after an earlier failure: "
                    f"{workspace.broken}"
                )
            if workspace.device.type == "cuda":
                failure = workspace.gpu_failure()
                if failure is not None:
                    workspace.broken = str(failure)
                    raise failure
                workspace.order_streams()
            workspace.site = self._site
        except BaseException:
            workspace.lock.release()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            if isinstance(error, DivergenceError):
                self._workspace.name_divergence(error)
            # What a signal's handler raises (KeyboardInterrupt, say) may end a call of several steps between two of them.
            interrupted = self._site != 0 and not isinstance(error, (RuntimeError, TypeError, ValueError))
            if interrupted or isinstance(error, SymmetricMemoryTimeout) or self._workspace.has_failed():
                # KeyboardInterrupt has no text.
                self._workspace.broken = str(error) or f"{type(error).__name__} ended it"
        self._workspace.lock.release()


@functools.cache
def _explain_uncaught_errors() -> None:
    """A trapped kernel is an error of CUDA's wherever the program next waits for it; this adds what it was."""
    before = sys.excepthook

    def explain(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        before(kind, error, trace)
        for workspace in list(_workspaces.values()):
            failure = workspace.gpu_failure()
            if failure is not None and str(failure) != str(error):
                print(f"symmpatterns: {type(failure).__name__}: {failure}", file=sys.stderr)

    sys.excepthook = explain


def _identity(device: torch.device) -> dict[str, object]:
    """What has to be equal on all ranks before they share memory."""
    from symmpatterns import __version__

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "symmpatterns": __version__,
        "torch": torch.__version__,
        "device type": device.type,
        "GPU": gpu,
        "configuration": config.fingerprint(),
        "host_kernels": config.host_kernels,
    }


_workspaces: dict[tuple[str, torch.device], Workspace] = {}
_workspaces_lock = threading.Lock()


def get_workspace(group_name: str, device: torch.device) -> Workspace:
    """The workspace of a group on a device, made on first use (collective then).

    Raises SymmetricMemoryError for an unknown group, a group whose ranks are on several hosts, or a device without
    symmetric memory.
    """
    group = get_group(group_name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (group.name, device)
    known = _workspaces.get(key)
    if known is not None and known.group is group:
        return known
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise SymmetricMemoryError(
            f"group {group.name!r} was not used before CUDA-graph capture: run the function once before capture"
        )
    with _workspaces_lock:
        for other, workspace in list(_workspaces.items()):  # of process groups that were destroyed since
            if not is_alive(workspace.group):
                del _workspaces[other]
    with group.making:
        known = _workspaces.get(key)
        if known is None or known.group is not group:
            known = _workspaces[key] = Workspace(group, device)
        return known


_live_groups = compat.live_groups()


def find_workspace(group_name: str, device: torch.device) -> Workspace | None:
    """The workspace that `get_workspace` has made, if its process group still exists; for the hot path."""
    known = _workspaces.get((group_name, device))
    return known if known is not None and known.group.pg in _live_groups else None


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
