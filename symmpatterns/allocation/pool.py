"""The symmetric buffers of compiled functions: reused from call to call, so that rendezvous on them is done once.

All ranks must choose the same buffer at the same point of the program, or a rank would map memory in which its peer
writes something else. What a rank sees of its own memory is no safe ground for that choice: garbage is collected at
different moments. So a compiled function (a `Lease`) only ever uses buffers that it adopted, and adopting is
collective: the ranks exchange which buffers each could spare and take the first that all can, or make a new one.
After its first calls a function has what it needs, and choosing among its own buffers depends on its own past alone:
at each place of its code it takes the same one again, at first the smallest free one that is large enough. A buffer is
free when no tensor outside of the pool uses its storage; tensors in it never leave the graph (the rewrite sees to that),
so this is the same on every rank. But for a moment: gloo's threads let go of a tensor some time after the wait for
the collective has returned. So a rank waits a little before it takes a buffer to be in use.

A buffer lives as long as a compiled function that adopted it.

Two threads that run functions of one group at once would take what is free at that moment, which is not the same on
every rank. Taking is locked, so that they never get one buffer, and the second thread is refused: who comes upon a buffer
in which another thread has a tensor gets an error. Threads with groups of their own share no buffers.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from symmpatterns import compat
from symmpatterns.groups import DivergenceError, Group, SymmetricMemoryError, get_group
from symmpatterns.streams import StreamOrder
from symmpatterns.symmetric_memory import Handle, empty, kept_handles

_GRAIN = 4096  # bytes; sizes of buffers are multiples
_KEPT_REQUESTS = 4096  # of one compiled function: one for each size that it ever had
_KEPT_HANDLES = 512  # of one buffer: one for each shape that was ever in it
# On CPU, where a thread about to let go may be kept from its core for long; what uses a buffer after that is the program.
_PATIENCE_S = 0.5
_NAP_S = 0.0002
_ATTRIBUTE = "_symmpatterns_lease"


class Buffer:
    """One piece of symmetric memory; every rank of the group has one of the same `index` and `capacity`."""

    def __init__(self, index: int, capacity: int, group: Group, device: torch.device) -> None:
        self.index = index
        self.capacity = capacity
        self.group = group
        # Compiled code runs in inference mode and outside of it; the memory serves both.
        with torch.inference_mode(False):
            self.bytes = empty((capacity,), dtype=torch.uint8, device=device)
        self._typed: dict[torch.dtype, Tensor] = {torch.uint8: self.bytes}
        self._handles: dict[tuple[Any, ...], Handle] = {}
        self._live_groups = compat.live_groups()
        self.identity = compat.storage_identity(self.bytes)
        self.own_uses = compat.storage_use_count(self.identity)
        self._order = StreamOrder(self.bytes.device)
        self._thread = 0  # that took it last
        address = self.bytes.data_ptr()
        kept_handles[address] = weakref.WeakMethod(self.handle)
        weakref.finalize(self, kept_handles.pop, address, None)

    def is_free(self) -> bool:
        """Whether no tensor outside of the pool lies in the buffer."""
        return compat.storage_use_count(self.identity) == self.own_uses

    def tensor(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor at the start of the buffer; the buffer is free again when it is gone. With the lock held."""
        self._thread = threading.get_ident()
        if self.bytes.is_cuda:
            self._order.follow()
        return compat.reinterpret(self._whole(dtype), size, stride, 0)

    def _whole(self, dtype: torch.dtype) -> Tensor:
        typed = self._typed.get(dtype)
        if typed is None:
            with torch.inference_mode(False):
                typed = self._typed[dtype] = self.bytes.view(dtype)
            self.own_uses += 1
        return typed

    def handle(self, tensor: Tensor, group: str | ProcessGroup | None) -> Handle | None:
        """The handle of a tensor in this buffer, made once a shape; None for another group."""
        own = self.group
        if (group != own.name or own.pg not in self._live_groups) and get_group(group) is not own:
            return None
        key = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        known = self._handles.get(key)
        if known is None:
            if len(self._handles) >= _KEPT_HANDLES:  # the same on every rank, so they forget together
                self.own_uses -= len(self._handles)
                self._handles.clear()
            # The handle keeps the tensor it was made for, so it gets one that the pool knows of.
            whole = self._whole(tensor.dtype)
            where = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
            known = Handle(compat.reinterpret(whole, *where), own)
            self._handles[key] = known
            self.own_uses += 1
        return known

    def refuse_other_threads(self) -> None:
        """Raises SymmetricMemoryError when the buffer, which is not free, was taken by another thread."""
        if self._thread not in (threading.get_ident(), 0) and self.group.world_size > 1:
            raise SymmetricMemoryError(
                f"another thread runs a compiled function with symmetric memory of group {self.group.name!r}. The ranks "
                "have to choose their buffers in one order, which threads do not keep by themselves: give each thread a "
                "group of its own (torch.distributed.new_group), or let one call end before the other begins"
            )


class Pool:
    """All buffers of one group on one device that some lease still holds."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.next_index = 0
        self.buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()

    def adopt(self, needed: int, preferred: int, taken: Sequence[Buffer]) -> Buffer:
        """A free buffer of at least `needed` bytes that the caller does not have; collective.

        Made new, with `preferred` bytes, unless every rank can spare the same one.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise SymmetricMemoryError(
                f"a compiled function needs {needed} bytes of symmetric memory of group {self.group.name!r}, which "
                "cannot be shared while a CUDA graph is being captured: run the function once before capture"
            )
        mine = [b.index for b in list(self.buffers.values()) if b.capacity >= needed and b not in taken and b.is_free()]
        offer = {"needed": needed, "preferred": preferred, "device": self.device.type, "next": self.next_index}
        answers = [
            json.loads(answer)
            for answer in self.group.exchange("allocation in symmetric memory", json.dumps({**offer, "spare": mine}))
        ]
        for name in ("needed", "device"):
            if len({answer[name] for answer in answers}) > 1:
                each = ", ".join(f"rank {rank}: {answer[name]}" for rank, answer in enumerate(answers))
                raise DivergenceError(
                    f"the ranks of group {self.group.name!r} want different symmetric memory ({name}: {each}): a "
                    "declared collective needs inputs of the same size on every rank"
                )
        common = set.intersection(*(set(answer["spare"]) for answer in answers))
        if common:
            return min((self.buffers[index] for index in common), key=lambda b: (b.capacity, b.index))
        index = max(answer["next"] for answer in answers)
        self.next_index = index + 1
        buffer = Buffer(index, max(answer["preferred"] for answer in answers), self.group, self.device)
        self.buffers[index] = buffer
        return buffer


_Request = tuple[Group, torch.device, int, list[Buffer], Any]  # bytes, the own buffers, the groups that are alive


class Lease:
    """The buffers that one compiled function adopted, by group and device."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[Group, torch.device], list[Buffer]] = {}
        # What a request comes to, because this is done for each declared input of each call.
        self.requests: dict[tuple[Any, ...], _Request] = {}
        self.chosen: dict[tuple[Any, ...], int] = {}  # by place in the code and request: the index of the last buffer
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Lease, ())  # a copy of the compiled function starts without buffers

    def resolve(self, request: tuple[Any, ...]) -> _Request:
        """What a request (size, stride, dtype, device, name of the group) comes to."""
        size, stride, dtype, device, group_name = request
        group = get_group(group_name)
        if device.type == "cpu":
            device = _CPU  # the C++ wrapper says cpu:0
        elif device.index is None:
            device = torch.device(device.type, torch.cuda.current_device())
        span = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride))
        own = self.buffers.setdefault((group, device), [])
        if len(self.requests) >= _KEPT_REQUESTS:
            self.requests.clear()
            self.chosen.clear()
        answer = self.requests[request] = (group, device, span * dtype.itemsize, own, compat.live_groups())
        return answer

    def adopt(self, group: Group, device: torch.device, needed: int, own: list[Buffer]) -> Buffer:
        """Another buffer for this function; collective. It may replace one that is too small."""
        with self.lock:
            small = [buffer for buffer in own if buffer.capacity < needed]
            _wait_a_little(device, lambda: all(buffer.is_free() for buffer in small))
            outgrown = [buffer for buffer in small if buffer.is_free()]
            preferred = _round_up(needed, growing=bool(outgrown))
            adopted = get_pool(group, device).adopt(needed, preferred, own)
            with _taking:
                if outgrown:
                    own.remove(outgrown[-1])
                own.append(adopted)
                own.sort(key=lambda b: (b.capacity, b.index))
        return adopted


def _round_up(needed: int, growing: bool) -> int:
    """The size of a new buffer: as needed, or in steps of a quarter when it replaces one that became too small."""
    grain = max(_GRAIN, (1 << needed.bit_length()) // 8) if growing else _GRAIN
    return -(-max(needed, 1) // grain) * grain


_CPU = torch.device("cpu")
_taking = threading.Lock()  # from finding a buffer free to having a tensor in it; never held while ranks wait for ranks
_pools: dict[tuple[str, torch.device], Pool] = {}
_pools_lock = threading.Lock()
_graph_code: Any = None  # once there are compiled graphs
_without_graph = Lease()  # of code that Inductor did not wrap: ahead-of-time packages, the operator called by hand


def get_pool(group: Group, device: torch.device) -> Pool:
    """The pool of a group on a device."""
    with _pools_lock:
        known = _pools.get((group.name, device))
        if known is None or known.group is not group:
            live = compat.live_groups()
            for dead in [key for key, pool in _pools.items() if pool.group.pg not in live]:
                del _pools[dead]
            known = _pools[group.name, device] = Pool(group, device)
        return known


def _lease() -> Lease:
    """That of the compiled function that is running: the innermost CompiledFxGraph on this thread's stack."""
    global _graph_code
    code = _graph_code
    if code is None:
        code = _graph_code = compat.compiled_graph_code()
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        if frame.f_code is code:
            graph = frame.f_locals["self"].__dict__
            lease = graph.get(_ATTRIBUTE)
            if lease is None:
                lease = graph[_ATTRIBUTE] = Lease()
            return lease
        frame = frame.f_back
    return _without_graph


def take(
    size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device, group_name: str
) -> Tensor:
    """An uninitialised tensor in symmetric memory for the compiled function that is running, and calls this.

    Collective over the group at the first calls of a compiled function. Raises DivergenceError when ranks ask for
    different sizes, SymmetricMemoryError when there is no memory to share.
    """
    caller = sys._getframe(1)
    return _take((id(caller.f_code), caller.f_lasti), (tuple(size), tuple(stride), dtype, device, group_name))


def take_anywhere(
    size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device, group_name: str
) -> Tensor:
    """`take` for who is called from several places of the compiled function, or from code that is not Python's."""
    return _take(None, (tuple(size), tuple(stride), dtype, device, group_name))


def _take(place: tuple[int, int] | None, request: tuple[Any, ...]) -> Tensor:
    lease = _lease()
    group, device, needed, own, live_groups = lease.requests.get(request) or lease.resolve(request)
    if group.pg not in live_groups:  # destroyed, and perhaps made again under the same name
        group, device, needed, own, live_groups = lease.resolve(request)
    size, stride, dtype = request[:3]
    if group.is_fake:  # one process that pretends: there is nobody to share memory with
        return torch.empty_strided(size, stride, dtype=dtype, device=device)
    where = (place, request)
    last = lease.chosen.get(where)
    if last is not None:
        with _taking:
            for buffer in own:
                if buffer.index == last and buffer.is_free():
                    return buffer.tensor(size, stride, dtype)
    candidates = [buffer for buffer in own if buffer.capacity >= needed]  # the smallest first
    candidates.sort(key=lambda buffer: buffer.index != last)
    while (found := _first_free(candidates, device, place is not None, size, stride, dtype)) is None:
        candidates = [lease.adopt(group, device, needed, own)]
    tensor, buffer = found
    if place is not None and buffer.index != last:
        lease.chosen[where] = buffer.index
    return tensor


def _first_free(
    candidates: list[Buffer],
    device: torch.device,
    prefers_first: bool,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Buffer] | None:
    """A tensor in the first candidate that is free, and that one; None if none is."""
    wanted = candidates[:1] if prefers_first else candidates
    _wait_a_little(device, lambda: not candidates or any(buffer.is_free() for buffer in wanted))
    with _taking:
        for buffer in candidates:
            if buffer.is_free():
                return buffer.tensor(size, stride, dtype), buffer
            buffer.refuse_other_threads()
    return None


def _wait_a_little(device: torch.device, is_so: Callable[[], bool]) -> None:
    """Returns when it is so, or when that cannot be a matter of time any more."""
    if is_so() or device.type != "cpu":
        return
    deadline = time.monotonic() + _PATIENCE_S
    while not is_so() and time.monotonic() < deadline:
        time.sleep(_NAP_S)


def live_buffers() -> int:
    """How many buffers this process's compiled functions hold."""
    return sum(len(pool.buffers) for pool in list(_pools.values()))


def live_bytes() -> int:
    """Bytes of them."""
    return sum(buffer.capacity for pool in list(_pools.values()) for buffer in list(pool.buffers.values()))
