"""One call's transfers: copies into the peers' memory and barriers, on a stream of their own beside the products."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch

from symmpatterns import compat
from symmpatterns.copy_engine import driver
from symmpatterns.group_memory import allocate, grown
from symmpatterns.symmetric_memory import Handle
from symmpatterns.triton_kernels import barrier
from symmpatterns.workspace import Workspace

_T = TypeVar("_T")
_VIEWS = 1024  # that are remembered at a time


class _Memory:
    """The memory into which the peers copy, and the stream of the copies; one of each for a workspace.

    views, events  what each call would make anew: views of the memory, and events, which each call uses from the first on
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        self.size = 0
        self.handle: Handle | None = None
        self.views: dict[Hashable, Any] = {}
        self.events: list[int] = []  # handles
        self._owners: list[torch.cuda.Event] = []  # of the handles
        self._captured: list[Handle] = []  # CUDA graphs hold addresses of it

    def reserve(self, workspace: Workspace, wanted: int) -> list[torch.Tensor]:
        """Every rank's memory, at least `wanted` bytes; collective when it has to grow."""
        if self.handle is None or self.size < wanted:
            size = grown(wanted, self.size)
            self.handle = allocate(workspace, "memory for copies", size)
            self.size = size
            self.views.clear()
        # The question goes to CUDA's runtime, which makes the device's context this thread's: the driver's calls need it.
        if self.stream is not None and torch.cuda.is_current_stream_capturing() and self.handle not in self._captured:
            self._captured.append(self.handle)
        return self.handle.buffers

    def add_event(self) -> None:
        event = torch.cuda.Event()
        event.record(self.stream)  # torch makes it no sooner
        self._owners.append(event)
        self.events.append(event.cuda_event)


_memories: weakref.WeakKeyDictionary[Workspace, _Memory] = weakref.WeakKeyDictionary()


def _memory_of(workspace: Workspace) -> _Memory:
    """Raises ValueError when the operands' device is not the current one, which the driver's calls are for."""
    device = workspace.device
    if device.type == "cuda" and compat.current_cuda_device() != device.index:
        raise ValueError(
            f"the operands are on {device}, the current device is cuda:{torch.cuda.current_device()}: make theirs the "
            "current one (torch.cuda.set_device)"
        )
    memory = _memories.get(workspace)
    if memory is None:
        # Of high priority: a barrier is one warp, and everything waits for it.
        stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        memory = _memories[workspace] = _Memory(stream)
    return memory


class Relay:
    """A context in which one call of all ranks sends; each rank makes the same steps in the same order.

    peers  every rank's memory of this call, uint8; the own one included. Only what peers send is ever written to it.

    It begins with a barrier: a rank passes it when all ranks have come to this call, and have thus ended the call
    before, with everything that it read (docs/memory-ordering.md). It ends with the caller's stream waiting for all
    copies.
    """

    def __init__(self, workspace: Workspace, size: int) -> None:
        if workspace.launches is None:  # kernels are compiled only, and tensors have no memory
            memory = _Memory(None)
            self.peers = [workspace.state.new_empty(size, dtype=torch.uint8)] * workspace.world_size
        else:
            memory = _memory_of(workspace)
            workspace.reserve(1, workspace.world_size)  # flags of the barriers
            self.peers = memory.reserve(workspace, size)
        self._workspace = workspace
        self._memory = memory
        self._held: list[torch.Tensor] = []
        # On CPU there is no stream, and each step is done when it returns.
        self._stream = memory.stream
        self._side = 0 if memory.stream is None else memory.stream.cuda_stream
        self._main = 0 if memory.stream is None else compat.current_raw_stream(workspace.device.index)
        self._used = 0

    def __enter__(self) -> Relay:
        self.begin()
        return self

    def __exit__(self, *error: object) -> None:
        self.wait(self._mark(self._side))
        self._held.clear()

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keeps memory that is sent from the next allocation until the copies have ended; returns it."""
        self._held.append(tensor)
        return tensor

    def view(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """``make()``, which only makes views of `peers`, or what it gave for this key before."""
        views = self._memory.views
        if key not in views:
            if len(views) >= _VIEWS:
                views.clear()
            views[key] = make()
        return views[key]

    def begin(self) -> None:
        """The barrier at the start, behind everything that the caller's stream was given before."""
        self._follow()
        self._steps(())

    def send(
        self,
        copies: Iterable[tuple[torch.Tensor, torch.Tensor]],
        received: Iterable[tuple[torch.Tensor, torch.Tensor]] = (),
        *,
        ready: bool = False,
    ) -> int | None:
        """Copies contiguous (target, source) pairs when what was started so far has been computed; then the ranks meet.

        `ready` promises that the sources were there when the call began. Then copies the `received` pairs, out of this
        rank's memory. Behind the event that is returned, what the peers have sent in this step has arrived.
        """
        if not ready:
            self._follow()
        self._steps(copies)
        arrived = self._mark(self._side)
        for target, source in received:
            self._copy(target, source)
        return arrived

    def wait(self, arrival: int | None) -> None:
        """The products started from here on may read what had arrived at `arrival`."""
        if arrival is not None:
            driver.wait(self._main, arrival)

    def _follow(self) -> None:
        """The side stream's next steps come behind what the caller's stream has been given."""
        computed = self._mark(self._main)
        if computed is not None:
            driver.wait(self._side, computed)

    def _steps(self, copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for target, source in copies:
            self._copy(target, source)
        barrier.run(self._workspace, "a barrier between copies", stream=self._stream)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self._stream is None:
            if target.shape != source.shape or not (target.is_contiguous() and source.is_contiguous()):
                raise ValueError(
                    f"the driver cannot copy {list(source.shape)} to {list(target.shape)}, or not contiguous"
                )
            target.copy_(source)
        else:
            driver.copy(target, source, self._side)

    def _mark(self, stream: int) -> int | None:
        """An event behind all that the stream has been given so far."""
        if self._stream is None:
            return None
        events = self._memory.events
        if self._used == len(events):
            self._memory.add_event()
        event = events[self._used]
        self._used += 1
        driver.record(event, stream)
        return event
