"""The memory behind peer views: a pair of slots for each (group, device), who uses which when, and how they grow.

Site j of a group (counted over all graphs and calls) writes slot s(j), passes barrier j and reads what the others
wrote. A rank arrives at barrier j + 1 only after its reads of site j. So when a rank has passed barrier j + 1, nobody
reads site j any more, and site j + 2 may write the same memory: two slots in turn, and nothing else, are enough.

Taking turns needs a count that outlives a call. On CPU the process keeps it. A CUDA graph would freeze it, so there the
turn follows from the position in the graph alone: a call's last site uses slot 0, the one before slot 1, and so on. A
call with an even number of sites then begins with slot 1, one barrier after the last use of it; a call with an odd
number begins with slot 0, which the call before may have used last, so it passes one more barrier first.

A graph of one site would pay that barrier in every call. It takes its slots in turn instead: a second pair of slots, and
two words in the device's memory that say which is stored into and which is read. Kernels load them and the barrier
exchanges them, in replays of a CUDA graph as well. The pair is used by such sites alone, and the argument above holds for
them, counted by themselves.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from symmpatterns import compat
from symmpatterns.groups import DivergenceError, Group, SymmetricMemoryError, get_group, is_alive
from symmpatterns.peer_views.plan import TURN_BYTES, Plan, View
from symmpatterns.symmetric_memory import Handle, backend_of, empty, to_outlive
from symmpatterns.workspace import Workspace, get_workspace

_SLOTS = 2
_GRAIN = 1 << 16  # slots grow in multiples of this many bytes
_KEPT_VIEWS = 256  # plans with sizes whose tensors are kept: a dynamic program may have many
_FIELDS = ("operator", "plan", "sizes")
_AllSizes = tuple[tuple[int, ...], ...]  # each rank's; one for all where they do not differ


@dataclass
class _Views:
    """What one call of a graph sees of the slots: all targets; of each site its pieces and sizes, and its sources.

    `number` is what the ranks have agreed on for its entry; the sites' numbers follow. `turns` is there for slots that
    are taken in turn: which one is stored into, which one is read; the barrier exchanges the two.
    """

    number: int
    meets_first: bool  # passes a barrier at its entry
    is_of_pair: bool  # lies in the pair that grows
    turns: list[Tensor]
    targets: list[Tensor] = field(default_factory=list)
    sites: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    sources: list[list[Tensor]] = field(default_factory=list)


@dataclass
class _Pair:
    """Two slots of every rank, `distance` bytes apart; `addresses`: of each rank's first one, as mapped here."""

    distance: int = 0
    addresses: list[int] = field(default_factory=list)
    turns: list[Tensor] = field(default_factory=list)
    memory: Any = None  # keeps it alive


class Slots:
    """The slots of every rank of one group on one device, as mapped into this process."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group = group
        self.device = device
        self._live_groups = compat.live_groups()
        backend_of(device)  # raises where there is no symmetric memory
        # One process that pretends to be many: everybody's memory is its own, as if all ranks held the same data.
        self.is_alone = group.is_fake or group.world_size == 1
        self.workspace: Workspace | None = None if self.is_alone else get_workspace(group.name, device)
        self.counts_sites = device.type == "cpu"
        self._sites = 0
        self._pair = _Pair()
        self._in_turn = _Pair()
        self._equal_turns: list[Tensor] = []
        self._captured: list[Any] = []  # memory whose addresses are in a CUDA graph
        self._is_in_capture = False
        self._views: collections.OrderedDict[tuple[str, _AllSizes, int], _Views] = collections.OrderedDict()
        self._announcements: Announcements | None = None
        self._current: _Views | None = None  # of the call that is running
        self._arrived = 0  # barriers of that call
        self._thread = 0  # that makes it
        self._is_open = False  # whether barriers of it are still to come
        self._lock = threading.Lock()

    def is_usable(self) -> bool:
        """Whether the process group has not been destroyed (another may have been made under its name then)."""
        return self.group.pg in self._live_groups

    def fetch(self, plan_text: str, sizes: Sequence[int]) -> list[Tensor]:
        """Begins a call of a graph; the targets of every piece of every site, in order, and the turns if it takes its
        slots in turn. Collective."""
        self._take_over()
        try:
            if self.workspace is not None:
                self.workspace.come_next("peer_buffers")  # the stores, too, come behind the call before
            self._current = self._begin(plan_text, sizes)
        except BaseException:
            self._is_open = False
            raise
        self._arrived = 0
        return self._current.targets

    def _begin(self, plan_text: str, sizes: Sequence[int]) -> _Views:
        plan = Plan.parse(plan_text)
        first = (self._sites if self.counts_sites else len(plan.sites) - 1) % _SLOTS
        all_sizes: _AllSizes = (tuple(sizes),)
        if plan.ranks_differ and not self.is_alone:
            all_sizes = self._announce(plan, plan_text, all_sizes[0])
        key = (plan_text, all_sizes, first)
        known = self._views.get(key)
        if known is None:
            known = self._views[key] = self._make(plan, plan_text, all_sizes, first)
            if len(self._views) > _KEPT_VIEWS:
                self._views.popitem(last=False)
        else:
            self._views.move_to_end(key)
        if known.is_of_pair and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._is_in_capture = True
        if known.meets_first:
            self._meet("entry of a graph with peer views", known.number)
        return known

    def _take_over(self) -> None:
        """This thread makes the running call from here on, unless that of another thread has not ended."""
        me = threading.get_native_id()
        with self._lock:
            # A thread that has ended leaves its call open only when an exception ended both.
            if me != self._thread and self._is_open and os.path.exists(f"/proc/self/task/{self._thread}"):
                raise self._two_threads()
            self._thread, self._is_open = me, True

    def _two_threads(self) -> SymmetricMemoryError:
        return SymmetricMemoryError(
            f"peer views: two threads run compiled functions of group {self.group.name!r} at once, and share its slots. "
            "Give each thread a group of its own (torch.distributed.new_group), or let one call end before the other "
            "begins"
        )

    def sources(self, pieces: str, sizes: Sequence[int], site: int) -> list[Tensor]:
        """The sources of a site of the running call, to be read after its barrier."""
        current = self._current
        if current is not None and self._thread != threading.get_native_id():
            raise self._two_threads()
        if current is None or not 0 <= site < len(current.sites) or current.sites[site] != (pieces, tuple(sizes)):
            raise SymmetricMemoryError(
                f"peer_sources: the running call has no site {site} of {pieces!r} with sizes {list(sizes)} in group "
                f"{self.group.name!r}; another graph of the group was run in between"
            )
        return current.sources[site]

    def barrier(self) -> None:
        """The next barrier of the running call; one that belongs to no call if none is running."""
        if not self._is_open or self._current is None:
            self._meet("peer views", 0)
            return
        if self._thread != threading.get_native_id():
            raise self._two_threads()
        self._arrived += 1
        self._sites += 1
        self._meet("peer views", self._current.number + self._arrived, self._current.turns)
        self._is_open = self._arrived < len(self._current.sites)

    def _meet(self, what: str, site: int, turns: Sequence[Tensor] = ()) -> None:
        """Returns (on CUDA: the current stream goes on) when every rank has arrived; exchanges the two `turns`."""
        workspace = self.workspace
        if workspace is not None:
            with workspace.call(what, site):
                if self.device.type == "cuda":
                    from symmpatterns.triton_kernels import barrier

                    barrier.run(workspace, what, turns)
                    return
                from symmpatterns import host_backend

                host_backend.load().barrier(workspace, what)
        for each in turns:
            each.copy_(each.flip(0))

    def _announce(self, plan: Plan, plan_text: str, sizes: tuple[int, ...]) -> _AllSizes:
        """Every rank's sizes for a plan in which ranks differ; checked to fit together, with one error for all."""
        workspace = self.workspace
        assert workspace is not None
        if self.device.type != "cpu":  # the host would have to wait for the device, which no CUDA graph can record
            raise SymmetricMemoryError(f"peer_buffers: plan {plan_text!r} is for CPU tensors")
        plan.split_sizes(sizes)  # raises when there are too many or too few
        with workspace.call("peer_buffers"):
            number = workspace.agree(_FIELDS[:2], ("sizes of peer_buffers", plan_text))
            if self._announcements is None or self._announcements.capacity < len(sizes):
                workspace.reserve(1, self.group.world_size)
                self.group.agree("memory for sizes of peer views", {"sizes": len(sizes)}, workspace.watch)
                self._announcements = Announcements(self.group, len(sizes))
        self._announcements.write(sizes)
        self._meet("sizes of peer views", number)
        all_sizes = self._announcements.read(len(sizes))
        for site, site_sizes in zip(plan.sites, plan.by_piece(all_sizes)):
            for piece, its_sizes in zip(site, site_sizes):
                problem = piece.problem(its_sizes)
                if problem is not None:
                    self._is_open = False
                    raise DivergenceError(f"{str(piece)!r} in group {self.group.name!r}: {problem}")
        return all_sizes

    def _make(self, plan: Plan, plan_text: str, all_sizes: _AllSizes, first: int) -> _Views:
        sizes = all_sizes[self.group.rank if len(all_sizes) > 1 else 0]
        if any(n < 0 for n in sizes):
            raise ValueError(f"peer_buffers: sizes {list(sizes)} of plan {plan_text!r} must not be negative")
        world_size = self.group.world_size
        offsets, largest = plan.offsets(all_sizes, world_size)
        takes_turns = plan.in_turn and largest <= TURN_BYTES
        number = 0
        with self.workspace.call("peer_buffers") if self.workspace is not None else contextlib.nullcontext():
            if self.workspace is not None:
                site = ("peer_buffers", plan_text, all_sizes if plan.ranks_differ else sizes)
                number = self.workspace.agree(_FIELDS, site, steps=1 + len(plan.sites))
            if takes_turns:
                self._reserve_in_turn()
            else:
                self._reserve(largest)
        pair = self._in_turn if takes_turns else self._pair
        turns = [] if not plan.in_turn else pair.turns if takes_turns else self._make_equal_turns()
        meets_first = not (self.counts_sites or takes_turns) and len(plan.sites) % 2 == 1
        answer = _Views(number, meets_first, not takes_turns, turns)
        # Compiled code runs in inference mode and outside of it; the tensors serve both.
        with torch.inference_mode(False), torch.no_grad():
            by_piece = plan.by_piece(all_sizes)
            for position, (parts, part_sizes) in enumerate(zip(plan.sites, plan.split_sizes(sizes))):
                base = 0 if takes_turns else (first + position) % _SLOTS * pair.distance
                text = str(Plan((parts,), plan.in_turn))
                answer.sites.append((text, tuple(n for size in part_sizes for n in size)))
                answer.sources.append([])
                for number_of_piece, (piece, size, offset) in enumerate(zip(parts, part_sizes, offsets[position])):
                    everyones = by_piece[position][number_of_piece] if len(all_sizes) > 1 else ()
                    targets, sources = plan.views(piece, size, self.group.rank, world_size, everyones)
                    if self.is_alone and len(targets) > 1:  # what the others would have stored here
                        targets = [plan.views(piece, size, rank, world_size)[0][rank] for rank in range(world_size)]
                    answer.targets += [self._view(pair, view, piece.dtype, base + offset) for view in targets]
                    answer.sources[-1] += [self._view(pair, view, piece.dtype, base + offset) for view in sources]
        answer.targets += answer.turns
        for each in answer.sources:
            each += answer.turns
        return answer

    def _view(self, pair: _Pair, view: View, dtype: torch.dtype, start: int) -> Tensor:
        address = pair.addresses[view.peer] + start + view.offset * dtype.itemsize
        return compat.tensor_at(address, view.size, view.stride, dtype, self.device)

    def _reserve(self, wanted: int) -> None:
        """Makes each slot hold `wanted` bytes; collective when it has to grow, free when it has not."""
        pair = self._pair
        if pair.addresses and wanted <= pair.distance:
            return
        distance = -(-max(wanted, min(2 * pair.distance, 1 << 28), 1) // _GRAIN) * _GRAIN
        if self._is_in_capture:
            self._captured.append(pair.memory)
        self._pair, self._is_in_capture = self._allocate(distance, _SLOTS * distance), False
        self._views.clear()

    def _reserve_in_turn(self) -> None:
        """The same for sites that take their slots in turn; that pair never grows."""
        if self._in_turn.addresses:
            return
        pair = self._allocate(TURN_BYTES, _SLOTS * TURN_BYTES + _GRAIN)
        # In the same memory, which no CUDA graph's pool can take back.
        address = pair.addresses[self.group.rank] + _SLOTS * TURN_BYTES
        with torch.inference_mode(False), torch.no_grad():
            turns = compat.tensor_at(address, (2,), (1,), torch.int64, self.device)
            turns.copy_(torch.arange(2) % _SLOTS)
        pair.turns = [turns]
        self._in_turn = pair

    def _make_equal_turns(self) -> list[Tensor]:
        """Of what is too large to take turns: both 0, so that it does not matter that the barrier exchanges them."""
        if not self._equal_turns:
            with torch.inference_mode(False):
                make = functools.partial(torch.zeros, 2, dtype=torch.int64, device=self.device)
                self._equal_turns = [to_outlive(self.device, make)]
        return self._equal_turns

    def _allocate(self, distance: int, num_bytes: int) -> _Pair:
        if self.workspace is None:
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
            return _Pair(distance, [memory.data_ptr()] * self.group.world_size, [], memory)
        self._wait_for_device(num_bytes)
        self.workspace.reserve(1, self.group.world_size)  # the barrier's flags
        # Every rank is here, so none is inside an older call, and the old memory can go.
        growth = {"bytes": num_bytes, "device": self.device.type}
        self.group.agree("growth of the peers' slots", growth, self.workspace.watch)
        handle = Handle(empty((num_bytes,), dtype=torch.uint8, device=self.device), self.group)
        return _Pair(distance, handle.buffer_ptrs, [], handle)

    def _wait_for_device(self, num_bytes: int) -> None:
        if self.device.type != "cuda":
            return
        if torch.cuda.is_current_stream_capturing():
            raise SymmetricMemoryError(
                f"group {self.group.name!r} needs {num_bytes} bytes for slots, and memory cannot be shared while a CUDA "
                "graph is being captured: run the function once before capture"
            )
        torch.cuda.synchronize(self.device)

    def live_bytes(self) -> int:
        """Bytes of this rank's slots."""
        in_turn = _SLOTS * self._in_turn.distance + _GRAIN if self._in_turn.addresses else 0
        return _SLOTS * self._pair.distance + in_turn


class Announcements:
    """What ranks say of themselves at the beginning of a call, in memory that all have mapped (CPU).

    A rank writes call k + 1's numbers after it has passed call k's barrier, and others may read call k's until they
    arrive at the next one: two places in turn are enough.
    """

    def __init__(self, group: Group, capacity: int) -> None:
        self.capacity = capacity
        self._handle = Handle(empty((2, capacity), dtype=torch.int64), group)
        self._calls = 0

    def write(self, numbers: Sequence[int]) -> None:
        """The own numbers of the next call; a barrier follows, then `read`."""
        self._calls += 1
        self._numbers(self._handle.rank, len(numbers)).copy_(torch.tensor(numbers, dtype=torch.int64))

    def read(self, count: int) -> _AllSizes:
        """Every rank's numbers."""
        return tuple(tuple(self._numbers(rank, count).tolist()) for rank in range(self._handle.world_size))

    def _numbers(self, rank: int, count: int) -> Tensor:
        return self._handle.buffers[rank][self._calls % 2, :count]


_slots: dict[tuple[str, torch.device], Slots] = {}
_lock = threading.Lock()


def get_slots(group_name: str, device: torch.device) -> Slots:
    """The slots of a group on a device, made on first use (collective then)."""
    known = _slots.get((group_name, device))
    if known is not None and known.is_usable():  # a compiled function asks three times a site
        return known
    group = get_group(group_name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    known = _slots.get((group.name, device))
    if known is not None and known.group is group:
        return known
    with _lock:
        _drop_dead_groups()
    with group.making:
        known = _slots.get((group.name, device))
        if known is None or known.group is not group:
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
    return sum(slots.live_bytes() for slots in held)
