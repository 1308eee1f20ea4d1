"""The memory behind peer views: two slots for each (group, device), who uses which when, and how they grow.

Site j of a group (counted over all graphs and calls) writes slot s(j), passes barrier j and reads what the others
wrote. A rank arrives at barrier j + 1 only after its reads of site j. So when a rank has passed barrier j + 1, nobody
reads site j any more, and site j + 2 may write the same memory: two slots in turn, and nothing else, are enough.

Taking turns needs a count that outlives a call. On CPU the process keeps it. A CUDA graph would freeze it, so there the
turn follows from the position in the graph alone: a call's last site uses slot 0, the one before slot 1, and so on. A
call with an even number of sites then begins with slot 1, one barrier after the last use of it; a call with an odd
number begins with slot 0, which the call before may have used last, so it passes one more barrier first.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symmpatterns import compat
from symmpatterns.groups import Group, SymmetricMemoryError, get_group, is_alive
from symmpatterns.peer_views.plan import Plan, View
from symmpatterns.symmetric_memory import Handle, Workspace, empty, get_workspace

_SLOTS = 2
_GRAIN = 1 << 16  # slots grow in multiples of this many bytes
_KEPT_VIEWS = 256  # plans with sizes whose tensors are kept: a dynamic program may have many
_FIELDS = ("operator", "plan", "sizes")


@dataclass
class _Views:
    """What one call of a graph sees of the slots: all targets; of each site its pieces and sizes, and its sources."""

    targets: list[Tensor]
    sites: list[tuple[str, tuple[int, ...]]]
    sources: list[list[Tensor]]


class Slots:
    """The two slots of every rank of one group on one device, as mapped into this process."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group = group
        self.device = device
        # One process that pretends to be many: everybody's memory is its own, as if all ranks held the same data.
        self.is_alone = group.is_fake or group.world_size == 1
        self.workspace: Workspace | None = None if self.is_alone else get_workspace(group.name, device)
        self.counts_sites = device.type == "cpu"
        self.slot_bytes = 0
        self._sites = 0
        self._addresses: list[int] = []  # of each rank's memory, as mapped here: its slots one after the other
        self._memory: Any = None  # keeps it alive
        self._captured: list[Any] = []  # memory whose addresses are in a CUDA graph
        self._is_in_capture = False
        self._views: collections.OrderedDict[tuple[str, tuple[int, ...], int], _Views] = collections.OrderedDict()
        self._current: _Views | None = None  # of the call that is running

    def fetch(self, plan_text: str, sizes: Sequence[int]) -> list[Tensor]:
        """Begins a call of a graph; the targets of every piece of every site, in order. Collective."""
        plan = Plan.parse(plan_text)
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._is_in_capture = self._is_in_capture or capturing
        first = self._first_slot(len(plan.sites))
        key = (plan_text, tuple(sizes), first)
        known = self._views.get(key)
        if known is None:
            known = self._views[key] = self._make(plan, plan_text, sizes, first)
            if len(self._views) > _KEPT_VIEWS:
                self._views.popitem(last=False)
        else:
            self._views.move_to_end(key)
        if not self.counts_sites and len(plan.sites) % 2:
            self.barrier("entry of a graph with peer views")
        self._current = known
        return known.targets

    def sources(self, pieces: str, sizes: Sequence[int], site: int) -> list[Tensor]:
        """The sources of a site of the running call, to be read after its barrier."""
        current = self._current
        if current is None or site >= len(current.sites) or current.sites[site] != (pieces, tuple(sizes)):
            raise SymmetricMemoryError(
                f"peer_sources: the running call has no site {site} of {pieces!r} with sizes {list(sizes)} in group "
                f"{self.group.name!r}; another graph of the group was run in between"
            )
        return current.sources[site]

    def _first_slot(self, sites: int) -> int:
        if not self.counts_sites:
            return (sites - 1) % _SLOTS
        first = self._sites % _SLOTS
        self._sites += sites
        return first

    def barrier(self, what: str = "peer views") -> None:
        """Returns (on CUDA: the current stream goes on) when every rank has arrived."""
        workspace = self.workspace
        if workspace is None:
            return
        with workspace.call(what):
            if self.device.type == "cpu":
                from symmpatterns import host_backend

                host_backend.load().barrier(workspace, what)
            else:
                from symmpatterns.triton_kernels import barrier

                barrier.run(workspace, what)

    def _make(self, plan: Plan, plan_text: str, sizes: Sequence[int], first: int) -> _Views:
        if any(n < 0 for n in sizes):
            raise ValueError(f"peer_buffers: sizes {list(sizes)} of plan {plan_text!r} must not be negative")
        world_size = self.group.world_size
        offsets, largest = plan.offsets(sizes, world_size)
        if self.workspace is not None:
            with self.workspace.call("peer_buffers"):
                self.workspace.agree(_FIELDS, ("peer_buffers", plan_text, tuple(sizes)))
                self._reserve(largest)
        else:
            self._reserve(largest)
        answer = _Views([], [], [])
        # Compiled code runs in inference mode and outside of it; the tensors serve both.
        with torch.inference_mode(False), torch.no_grad():
            for number, (site, site_sizes) in enumerate(zip(plan.sites, plan.split_sizes(sizes))):
                base = (first + number) % _SLOTS * self.slot_bytes
                answer.sites.append((str(Plan((site,))), tuple(n for size in site_sizes for n in size)))
                answer.sources.append([])
                for piece, size, offset in zip(site, site_sizes, offsets[number]):
                    targets, sources = piece.views(size, self.group.rank, world_size)
                    if self.is_alone and len(targets) > 1:  # what the others would have stored here
                        targets = [piece.views(size, rank, world_size)[0][rank] for rank in range(world_size)]
                    answer.targets += [self._view(view, piece.dtype, base + offset) for view in targets]
                    answer.sources[-1] += [self._view(view, piece.dtype, base + offset) for view in sources]
        return answer

    def _view(self, view: View, dtype: torch.dtype, start: int) -> Tensor:
        address = self._addresses[view.peer] + start + view.offset * dtype.itemsize
        return compat.tensor_at(address, view.size, view.stride, dtype, self.device)

    def _reserve(self, wanted: int) -> None:
        """Makes each slot hold `wanted` bytes; collective when it has to grow, free when it has not."""
        if wanted <= self.slot_bytes or wanted == 0:
            if not self._addresses:
                self._allocate(_GRAIN)
            return
        self._allocate(-(-max(wanted, min(2 * self.slot_bytes, 1 << 28)) // _GRAIN) * _GRAIN)

    def _allocate(self, slot_bytes: int) -> None:
        if self.workspace is None:
            self._memory = torch.zeros(_SLOTS * slot_bytes, dtype=torch.uint8, device=self.device)
            self._addresses = [self._memory.data_ptr()] * self.group.world_size
        else:
            self._wait_for_device(slot_bytes)
            self.workspace.reserve(1, self.group.world_size)  # the barrier's flags
            # Every rank is here, so none is inside an older call, and the old memory can go.
            self.group.agree("growth of the peers' slots", {"bytes": slot_bytes, "device": self.device.type})
            memory = empty((_SLOTS * slot_bytes,), dtype=torch.uint8, device=self.device)
            handle = Handle(memory, self.group)
            if self._is_in_capture:
                self._captured.append(self._memory)
            self._memory, self._is_in_capture = handle, False
            self._addresses = handle.buffer_ptrs
        self.slot_bytes = slot_bytes
        self._views.clear()

    def _wait_for_device(self, slot_bytes: int) -> None:
        if self.device.type != "cuda":
            return
        if torch.cuda.is_current_stream_capturing():
            raise SymmetricMemoryError(
                f"group {self.group.name!r} needs slots of {slot_bytes} bytes and has {self.slot_bytes}, and memory "
                "cannot be shared while a CUDA graph is being captured: run the function once before capture"
            )
        torch.cuda.synchronize(self.device)


_slots: dict[tuple[str, torch.device], Slots] = {}
_lock = threading.Lock()


def get_slots(group_name: str, device: torch.device) -> Slots:
    """The slots of a group on a device, made on first use (collective then)."""
    group = get_group(group_name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    known = _slots.get((group.name, device))
    if known is not None and known.group is group:
        return known
    with _lock:
        _drop_dead_groups()
        known = _slots.get((group.name, device))
        if known is None:
            known = _slots[group.name, device] = Slots(group, device)
        return known


def _drop_dead_groups() -> None:
    """Frees the slots of process groups that were destroyed since."""
    for key, slots in list(_slots.items()):
        if not is_alive(slots.group):
            del _slots[key]


def live_bytes() -> int:
    """Bytes of slot memory that this process holds, its own only."""
    held: list[Any] = list(_slots.values())
    return sum(_SLOTS * slots.slot_bytes for slots in held)
