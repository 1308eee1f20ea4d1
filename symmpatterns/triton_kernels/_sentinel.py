"""Data that is its own flag (the Lamport protocol): named primitives, and what they rely on.

A receiver's memory, but for the heads at its beginning, holds a sentinel wherever nothing has arrived. A sender stores
its data there and nothing else: no fence, no flag, no barrier. The receiver loads until no sentinel is left, and puts the
sentinels back. The memory has two halves, used by the workspace's calls in turn, as staging is; docs/memory-ordering.md
has the argument.

Each element is 16 or 32 bits that arrive together, so an element that is no sentinel is all there, and elements need no
order among each other. Beside a row's elements goes its head, the sender's ticket, to a place that depends on nothing
but sender and row. The receiver waits for that first, so ranks at different calls cannot go on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from symmpatterns.triton_kernels._sync import (
    _POLLS_PER_CHECK,
    _call_has_failed,
    _check_wait,
    flags_of,
    staging_of,
)

MAX_ROWS = 4096  # of a call
_MAX_ROWS: tl.constexpr = tl.constexpr(MAX_ROWS)
_SENTINEL_16: tl.constexpr = tl.constexpr(-0x8000)
_SENTINEL_32: tl.constexpr = tl.constexpr(-0x7FFF8000)  # 0x80008000: memory is filled 16 bits at a time


@triton.jit
def as_message(values):
    """The bits of `values`, none of which is the sentinel: -0.0 becomes 0.0 (fp32: a denormal of -4.6e-41 the next)."""
    if values.dtype.primitive_bitwidth == 16:
        bits = values.to(tl.int16, bitcast=True)
        return tl.where(bits == _SENTINEL_16, 0, bits).to(tl.int16)
    else:
        bits = values.to(tl.int32, bitcast=True)
        return tl.where(bits == _SENTINEL_32, _SENTINEL_32 + 1, bits).to(tl.int32)


@triton.jit
def _head_of(sentinel_ptrs, half, rank, source, row, WORLD_SIZE: tl.constexpr):
    """Where `source` leaves the head of its row in `rank`'s memory; heads lie before everything else."""
    return staging_of(sentinel_ptrs, half, rank, WORLD_SIZE, tl.int64) + source * _MAX_ROWS + row


@triton.jit
def _elements_of(sentinel_ptrs, half, rank, source, row, rows, place, WORLD_SIZE: tl.constexpr, BITS: tl.constexpr):
    """Where `source`, another rank, leaves the elements of its row in `rank`'s memory, `place` elements from row to row."""
    heads = WORLD_SIZE * _MAX_ROWS * 64 // BITS.primitive_bitwidth
    start = ((source - rank + WORLD_SIZE - 1) % WORLD_SIZE * rows + row) * place
    return staging_of(sentinel_ptrs, half, rank, WORLD_SIZE, BITS) + heads + start


@triton.jit
def send(
    sentinel_ptrs, half, rank, peer, row, rows, place, offs, bits, mask, ticket, WORLD_SIZE: tl.constexpr
):  # fmt: skip
    """Stores a row's message and its head into `peer`'s memory, where it waits for them."""
    elements = _elements_of(sentinel_ptrs, half, peer, rank, row, rows, place, WORLD_SIZE, bits.dtype)
    tl.store(elements + offs, bits, mask=mask)
    tl.store(_head_of(sentinel_ptrs, half, peer, rank, row, WORLD_SIZE), ticket)


@triton.jit
def await_head(
    sentinel_ptrs, flag_ptrs, half, rank, peer, row, ticket, state_ptr, timeout_ns, WORLD_SIZE: tl.constexpr
):  # fmt: skip
    """Returns when `peer` has sent this row of this call, at least its head.

    An atomic, because one thread does it for all: plain loads may differ between threads, and control flow may not. It
    also keeps the others from loading elements over and over, which delays the peer's stores.

    Gives up as `await_flag` does: after `timeout_ns`, or when the peer is at another call site. The record's index is
    the row.
    """
    head_ptr = _head_of(sentinel_ptrs, half, rank, peer, row, WORLD_SIZE)
    given_up = _call_has_failed(state_ptr)
    polls = 0
    began = tl.full([], 0, tl.int64)  # 0: no clock looked at yet
    head = tl.atomic_add(head_ptr, 0, sem="relaxed", scope="sys")
    while (head != ticket) & (given_up == 0):
        polls += 1
        if polls % _POLLS_PER_CHECK == 0:
            seen = _whereabouts(flag_ptrs, half, rank, peer, head, ticket, WORLD_SIZE)
            began, given_up = _check_wait(began, timeout_ns, state_ptr, peer, row, ticket, seen)
        head = tl.atomic_add(head_ptr, 0, sem="relaxed", scope="sys")


@triton.jit
def receive(
    sentinel_ptrs, half, rank, peer, row, rows, place, offs, mask, ticket, state_ptr, timeout_ns,
    WORLD_SIZE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The message that `peer` has sent for this row; its places hold sentinels again afterwards.

    Behind `await_head`. Elements may arrive after their head; gives up after `timeout_ns`.
    """
    ptrs = _elements_of(sentinel_ptrs, half, rank, peer, row, rows, place, WORLD_SIZE, BITS) + offs
    given_up = _call_has_failed(state_ptr)
    polls = 0
    began = tl.full([], 0, tl.int64)
    bits = tl.load(ptrs, mask=mask, other=0, volatile=True)
    missing = _missing(bits)
    while (missing != 0) & (given_up == 0):
        polls += 1
        if polls % _POLLS_PER_CHECK == 0:
            began, given_up = _check_wait(began, timeout_ns, state_ptr, peer, row, ticket, ticket - 1)
        bits = tl.load(ptrs, mask=mask, other=0, volatile=True)
        missing = _missing(bits)
    # Each thread puts sentinels where it has loaded itself.
    if BITS.primitive_bitwidth == 16:
        tl.store(ptrs, tl.full(bits.shape, _SENTINEL_16, tl.int16), mask=mask)
    else:
        tl.store(ptrs, tl.full(bits.shape, _SENTINEL_32, tl.int32), mask=mask)
    return bits


@triton.jit
def _missing(bits):
    """Whether an element has not arrived; the same for all threads."""
    if bits.dtype.primitive_bitwidth == 16:
        return tl.max((bits == _SENTINEL_16).to(tl.int32), axis=0)
    else:
        return tl.max((bits == _SENTINEL_32).to(tl.int32), axis=0)


@triton.jit
def _whereabouts(flag_ptrs, half, rank, peer, head, ticket, WORLD_SIZE: tl.constexpr):
    """The ticket of the call at which `peer` is, if it is another one of this epoch; else something older.

    A peer in this kernel has left its head; any other may have announced itself in the flag that a barrier uses. This
    rank announces itself there as well: so late, because only who waits in vain looks for it.
    """
    theirs = flags_of(flag_ptrs, half, peer, WORLD_SIZE) + rank
    tl.atomic_xchg(theirs, ticket, sem="relaxed", scope="sys")
    seen = tl.atomic_add(flags_of(flag_ptrs, half, rank, WORLD_SIZE) + peer, 0, sem="relaxed", scope="sys")
    # What memory is filled with is negative, a ticket is not.
    seen = tl.where((head >= 0) & ((head & 0xFFFFFFFF) == (ticket & 0xFFFFFFFF)), head, seen)
    return tl.where(seen == ticket, ticket - 1, seen)


def needed_bytes(rows: int, row_bytes: int, world_size: int) -> int:
    """Of a half, for a call of so many rows (at most MAX_ROWS) of so many bytes, which are rounded up to 16."""
    return world_size * 8 * MAX_ROWS + (world_size - 1) * rows * (-(-row_bytes // 16) * 16)
