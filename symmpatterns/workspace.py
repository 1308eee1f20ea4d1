"""The staging memory, flags and epoch that the fused operators of one (group, device) share: a `Workspace`.

Its protocol, and why nobody ever overwrites what somebody still reads, is docs/memory-ordering.md.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from symmpatterns import compat, config
from symmpatterns.groups import (
    DivergenceError,
    Group,
    SymmetricMemoryError,
    SymmetricMemoryTimeout,
    get_group,
    is_alive,
)
from symmpatterns.streams import StreamOrder
from symmpatterns.symmetric_memory import Handle, empty, prepare, require_one_host, to_outlive

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


class Workspace:
    """The staging memory, flags and epoch that all fused operators of one (group, device) share.

    staging_ptrs, flag_ptrs  int64 [2, W] on the device: address of half h of rank r, as mapped here
    state                    int32 [16] on the device: epoch, programs of a call that have counted, error record
    site                     number of the call site that is running; what its flags carry, beside the epoch
    staging_bytes            bytes of one half

    The tables keep their addresses when the memory behind them grows, so launches recorded in a CUDA graph stay valid.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        require_one_host(group)
        group.agree("the first use of symmetric memory", _identity(device))
        prepare(device)
        if device.type == "cuda" and compat.compiled_graph_code() is not None:
            compat.settle_triton_cache(device)  # where operators/precompile.py puts the kernels of a graph
        self.group = group
        self.rank = group.rank
        self.world_size = group.world_size
        self.device = device
        self._record = (ctypes.c_int32 * _STATE_WORDS)()
        self.staging_ptrs, self.flag_ptrs, self.state = to_outlive(device, self._make_tables)
        self.staging_bytes = 0
        self.broken: str | None = None
        self._handle: Handle | None = None
        self.site = 0  # none that the ranks have agreed on
        self._agreed: dict[tuple[object, ...], int] = {}
        self._sites = [(0, "a call without a number")]  # (first number, what it is), in order
        self._next_site = 1
        self._order = StreamOrder(device)  # two streams share one epoch
        # What calls of one signature need not find out again: of the operators (operators/) and of the launches
        # of kernels (triton_kernels/_launch.py).
        self.ready: dict[tuple[object, ...], Any] = {}
        self.choices: dict[tuple[object, ...], str] = {}  # rank 0's, of kernels (operators/_kernels.py)
        self.launches: dict[Any, Any] | None = {}
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

    def from_first_rank(self, what: str, payload: str) -> str:
        """Rank 0's `payload`; collective, with `Group.exchange`'s errors."""
        return self.group.exchange(what, payload, self.watch)[0]

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

    def come_next(self, what: str) -> None:
        """What follows on the current stream comes behind the calls before; raises when one of them has failed."""
        if self.broken is not None:
            raise SymmetricMemoryError(
                f"{what}: group {self.group.name!r} can no longer be used after an earlier failure: {self.broken}"
            )
        if self.device.type == "cuda":
            failure = self.gpu_failure()
            if failure is not None:
                self.broken = str(failure)
                raise failure
            self._order.follow()

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
            workspace.come_next(self._what)
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
