"""Data that is its own flag (the Lamport protocol): named primitives, and what they rely on.

A receiver's memory holds a sentinel wherever nothing has arrived. A sender stores its data there and nothing else: no
fence, no flag, no barrier. The receiver loads until no sentinel is left, and puts the sentinels back. The memory has two
halves, used by the workspace's calls in turn, as staging is; docs/memory-ordering.md has the argument.

Each element is 16 or 32 bits that arrive together, so an element that is no sentinel is all there, and elements need no
order among each other. Beside a row's elements goes its head, the sender's ticket, to a place that depends on nothing
but sender and row. The receiver waits for that as well, so ranks at different calls cannot go on.
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
def announce(flag_ptrs, half, rank, ticket, WORLD_SIZE: tl.constexpr):
    """Lets the peers know at which call site this rank is; only who waits in vain looks for it."""
    for distance in tl.range(1, WORLD_SIZE, num_stages=1):
        peer = (rank + distance) % WORLD_SIZE
        tl.atomic_xchg(flags_of(flag_ptrs, half, peer, WORLD_SIZE) + rank, ticket, sem="relaxed", scope="sys")


@triton.jit
def _missing(bits, head, ticket):
    """Whether an element has not arrived, or not the head of this call; the same for all threads.

    Every thread loads the head itself and may find something else than its neighbour. In a maximum over all threads'
    elements they agree, which control flow has to.
    """
    if bits.dtype.primitive_bitwidth == 16:
        return tl.max(((bits == _SENTINEL_16) | (head != ticket)).to(tl.int32), axis=0)
    else:
        return tl.max(((bits == _SENTINEL_32) | (head != ticket)).to(tl.int32), axis=0)


@triton.jit
def receive(
    sentinel_ptrs,
    flag_ptrs,
    half,
    rank,
    peer,
    row,
    rows,
    place,
    offs,
    mask,
    ticket,
    state_ptr,
    timeout_ns,
    WORLD_SIZE: tl.constexpr,
    BITS: tl.constexpr,
):
    """The message that `peer` has sent for this row of this call; its places hold sentinels again afterwards.

    Gives up as `await_flag` does: after `timeout_ns`, or when the peer has announced itself at another call site. The
    record's index is the row.
    """
    ptrs = _elements_of(sentinel_ptrs, half, rank, peer, row, rows, place, WORLD_SIZE, BITS) + offs
    head_ptr = _head_of(sentinel_ptrs, half, rank, peer, row, WORLD_SIZE)
    given_up = _call_has_failed(state_ptr)
    polls = 0
    began = tl.full([], 0, tl.int64)  # 0: no clock looked at yet
    head = tl.load(head_ptr, volatile=True)
    bits = tl.load(ptrs, mask=mask, other=0, volatile=True)
    missing = _missing(bits, head, ticket)
    while (missing != 0) & (given_up == 0):
        polls += 1
        if polls % _POLLS_PER_CHECK == 0:
            seen = _announced(flag_ptrs, half, rank, peer, ticket, WORLD_SIZE)
            began, given_up = _check_wait(began, timeout_ns, state_ptr, peer, row, ticket, seen)
        head = tl.load(head_ptr, volatile=True)
        bits = tl.load(ptrs, mask=mask, other=0, volatile=True)
        missing = _missing(bits, head, ticket)
    # Each thread puts sentinels where it has loaded itself.
    if BITS.primitive_bitwidth == 16:
        tl.store(ptrs, tl.full(bits.shape, _SENTINEL_16, tl.int16), mask=mask)
    else:
        tl.store(ptrs, tl.full(bits.shape, _SENTINEL_32, tl.int32), mask=mask)
    return bits


@triton.jit
def _announced(flag_ptrs, half, rank, peer, ticket, WORLD_SIZE: tl.constexpr):
    """The peer's announcement; of a peer at this very call, which is only slow, something older."""
    flag = flags_of(flag_ptrs, half, rank, WORLD_SIZE) + peer
    seen = tl.atomic_add(flag, 0, sem="relaxed", scope="sys")
    return tl.where(seen == ticket, ticket - 1, seen)


def needed_bytes(rows: int, row_bytes: int, world_size: int) -> int:
    """Of a half, for a call of so many rows (at most MAX_ROWS) of so many bytes, which are rounded up to 16."""
    return world_size * 8 * MAX_ROWS + (world_size - 1) * rows * (-(-row_bytes // 16) * 16)
