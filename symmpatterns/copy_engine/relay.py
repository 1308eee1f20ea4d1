"""One call's transfers: copies into the peers' memory and barriers, on a stream of their own beside the products."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch

from symmpatterns.group_memory import allocate, grown
from symmpatterns.symmetric_memory import Handle
from symmpatterns.triton_kernels import barrier
from symmpatterns.workspace import Workspace

_T = TypeVar("_T")
_VIEWS = 1024  # that are remembered at a time


class _Memory:
    """The memory into which the peers copy, and the stream of the copies; one of each for a workspace.

    views, events  what each call would make anew: views of the memory, and events, which calls use in turn
    """

    def __init__(self, workspace: Workspace) -> None:
        self.stream: torch.cuda.Stream | None = None
        if workspace.device.type == "cuda":
            # Of high priority: a barrier is one warp, and everything waits for it.
            self.stream = torch.cuda.Stream(workspace.device, priority=-1)
        self.size = 0
        self.handle: Handle | None = None
        self.views: dict[Hashable, Any] = {}
        self.events: list[torch.cuda.Event] = []
        self._captured: list[Handle] = []  # CUDA graphs hold addresses of it

    def reserve(self, workspace: Workspace, wanted: int) -> list[torch.Tensor]:
        """Every rank's memory, at least `wanted` bytes; collective when it has to grow."""
        if self.handle is None or self.size < wanted:
            size = grown(wanted, self.size)
            self.handle = allocate(workspace, "memory for copies", size)
            self.size = size
            self.views.clear()
        if self.stream is not None and torch.cuda.is_current_stream_capturing() and self.handle not in self._captured:
            self._captured.append(self.handle)
        return self.handle.buffers


_memories: weakref.WeakKeyDictionary[Workspace, _Memory] = weakref.WeakKeyDictionary()


class Relay:
    """A context in which one call of all ranks sends; each rank makes the same steps in the same order.

    peers  every rank's memory of this call, uint8; the own one included. Only what peers send is ever written to it.

    It begins with a barrier: a rank passes it when all ranks have come to this call, and have thus ended the call
    before, with everything that it read (docs/memory-ordering.md). It ends with the caller's stream waiting for all
    copies.
    """

    def __init__(self, workspace: Workspace, size: int) -> None:
        memory = _memories.get(workspace)
        if memory is None:
            memory = _memories[workspace] = _Memory(workspace)
        workspace.reserve(1, workspace.world_size)  # flags of the barriers
        self.peers = memory.reserve(workspace, size)
        self._workspace = workspace
        self._memory = memory
        self._held: list[torch.Tensor] = []
        self._side = memory.stream
        self._main = None if memory.stream is None else torch.cuda.current_stream(workspace.device)
        self._used = 0

    def __enter__(self) -> Relay:
        self.begin()
        return self

    def __exit__(self, *error: object) -> None:
        if self._main is not None and self._side is not None:
            event = self._event()
            event.record(self._side)
            self._main.wait_event(event)
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
        """The barrier at the start."""
        self.send([])

    def send(
        self,
        copies: Iterable[tuple[torch.Tensor, torch.Tensor]],
        received: Iterable[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> torch.cuda.Event | None:
        """Copies (target, source) pairs when what was started so far has been computed; then the ranks meet.

        Then copies the `received` pairs, out of this rank's memory. Behind the event, what the peers have sent in this
        step has arrived.
        """
        side, main = self._side, self._main
        if side is None or main is None:
            self._steps(copies, received)
            return None
        computed, arrived = self._event(), self._event()
        computed.record(main)
        side.wait_event(computed)
        torch.cuda.set_stream(side)
        try:
            self._steps(copies, ())
            arrived.record(side)
            for target, source in received:
                target.copy_(source, non_blocking=True)
        finally:
            torch.cuda.set_stream(main)
        return arrived

    def _steps(
        self,
        copies: Iterable[tuple[torch.Tensor, torch.Tensor]],
        received: Iterable[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        for target, source in copies:
            target.copy_(source, non_blocking=True)
        barrier.run(self._workspace, "a barrier between copies")
        for target, source in received:
            target.copy_(source, non_blocking=True)

    def wait(self, arrival: torch.cuda.Event | None) -> None:
        """The products started from here on may read what had arrived at `arrival`."""
        if arrival is not None and self._main is not None:
            self._main.wait_event(arrival)

    def _event(self) -> torch.cuda.Event:
        events = self._memory.events
        if self._used == len(events):
            events.append(torch.cuda.Event())
        self._used += 1
        return events[self._used - 1]
