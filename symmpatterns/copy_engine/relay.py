"""One call's transfers: copies into the peers' memory and barriers, on a stream of their own beside the products."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator

import torch

from symmpatterns.group_memory import allocate, grown
from symmpatterns.symmetric_memory import Handle, Workspace
from symmpatterns.triton_kernels import barrier


class _Memory:
    """The memory into which the peers copy, and the stream of the copies; one of each for a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self.stream: torch.cuda.Stream | None = None
        if workspace.device.type == "cuda":
            # Of high priority: a barrier is one warp, and everything waits for it.
            self.stream = torch.cuda.Stream(workspace.device, priority=-1)
        self.size = 0
        self.handle: Handle | None = None
        self._captured: list[Handle] = []  # CUDA graphs hold addresses of it

    def reserve(self, workspace: Workspace, wanted: int) -> list[torch.Tensor]:
        """Every rank's memory, at least `wanted` bytes; collective when it has to grow."""
        if self.handle is None or self.size < wanted:
            size = grown(wanted, self.size)
            self.handle = allocate(workspace, "memory for copies", size)
            self.size = size
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
        self._held: list[torch.Tensor] = []
        self._side = memory.stream
        self._main = None if memory.stream is None else torch.cuda.current_stream(workspace.device)

    def __enter__(self) -> Relay:
        self.begin()
        return self

    def __exit__(self, *error: object) -> None:
        if self._main is not None and self._side is not None:
            self._main.wait_stream(self._side)
        self._held.clear()

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keeps memory that is sent from the next allocation until the copies have ended; returns it."""
        self._held.append(tensor)
        return tensor

    def begin(self) -> None:
        """The barrier at the start."""
        self.send([])

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """What is started here runs beside the products, after what was sent before."""
        with torch.cuda.stream(self._side) if self._side is not None else contextlib.nullcontext():
            yield

    def send(self, copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event | None:
        """Copies (target, source) pairs when what was started so far has been computed; then the ranks meet.

        Behind the event, what the peers have sent in this step has arrived.
        """
        if self._side is not None and self._main is not None:
            self._side.wait_stream(self._main)
        with self.beside():
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            barrier.run(self._workspace, "a barrier between copies")
            return None if self._side is None else self._side.record_event()

    def wait(self, arrival: torch.cuda.Event | None) -> None:
        """The products started from here on may read what had arrived at `arrival`."""
        if arrival is not None and self._main is not None:
            self._main.wait_event(arrival)
