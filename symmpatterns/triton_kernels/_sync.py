"""The named synchronisation primitives of the Triton kernels; docs/memory-ordering.md has the argument behind them.

A call of a fused operator is one kernel launch on every rank of the group. It has a number, its epoch, which the
device keeps (``state[0]`` counts calls), so a launch recorded in a CUDA graph counts on when it is replayed.
It uses one half of the staging memory and of the flags, chosen by the epoch's parity. What the call writes to flags is
its ticket: the epoch and, above it, the number of the call site, on which the ranks have agreed. A flag equal to the
reader's ticket means "what my writer stored for this call can be read"; the same epoch under another site means that
the writer is at another call of the program.

The same functions run compiled for CUDA and, with ``TRITON_INTERPRET=1`` set before triton is imported, in Triton's
interpreter between CPU processes. What must differ (clocks, giving up) is chosen once, when the module is loaded.
"""

from __future__ import annotations

import time

import torch
import triton
import triton.language as tl

# Read once: triton decides when a function is decorated, that is, when these modules are imported.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
_IS_COMPILED: tl.constexpr = tl.constexpr(not INTERPRETED)

ERROR_TIMEOUT, ERROR_DIVERGED = 1, 3
_TIMEOUT: tl.constexpr = tl.constexpr(ERROR_TIMEOUT)
_DIVERGED: tl.constexpr = tl.constexpr(ERROR_DIVERGED)

# A clock is looked at once in so many polls, so that its cost vanishes beside the polls'. An interpreted poll takes
# about 50 us of a CPU that the peer may need, and a check there gives the CPU away.
_POLLS_PER_CHECK: tl.constexpr = tl.constexpr(4 if INTERPRETED else 1024)
_INTERPRETER_NAP_S = 0.0002


class FlagError(RuntimeError):
    """A flag did not become what it should: who should have written it, and what was there instead."""

    def __init__(self, text: str, peer: int, index: int, expected: int, seen: int, site: int) -> None:
        super().__init__(text)
        self.peer, self.index = peer, index
        self.expected, self.seen, self.site = expected, seen, site


class FlagTimeoutError(FlagError):
    """It did not arrive in time."""


class FlagDivergedError(FlagError):
    """Its writer is at another call site."""


def read_error(state: torch.Tensor, rank: int) -> FlagError | None:
    """The error that the last kernels left in `state`, if any; waits for the device, so not for the hot path."""
    code, peer, index, expected, seen, site, seen_site = state[2:9].tolist()
    record = (peer, index, expected, seen, site)
    if code == ERROR_DIVERGED:
        text = f"rank {rank} met rank {peer} at another call: flag {index} says site {seen_site}, not {site}"
        return FlagDivergedError(text, *record)
    if code == ERROR_TIMEOUT:
        text = (
            f"rank {rank} gave up waiting for rank {peer}: flag {index} should have become {expected} "
            f"(the number of this call) and was still {seen}; call site {site}"
        )
        return FlagTimeoutError(text, *record)
    return None


def raise_if_interpreted_call_failed(state: torch.Tensor, rank: int) -> None:
    """Raises FlagError after an interpreted launch that gave up; a compiled kernel traps instead."""
    if INTERPRETED:
        error = read_error(state, rank)
        if error is not None:
            raise error


# --- the kernels before and behind ----------------------------------------------------------------------------------


@triton.jit
def await_kernel_before():
    """Before the first access of memory in every kernel: it may have been launched while the kernel before it on the stream
    was running (programmatic dependent launch, compute capability 9.0 and later), and waits here until all of it has
    happened.

    Then the kernel behind it may be launched in the same way. That one waits as well, for this kernel, which has waited: so
    kernels still take effect one after the other, and only the launching overlaps.
    """
    if _IS_COMPILED:
        if tl.target_info.cuda_capability_geq(9, 0):
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()


# --- one call -----------------------------------------------------------------------------------------------------


@triton.jit
def begin_call(state_ptr, site):
    """(ticket of this call of `site`, half of the workspace that it uses).

    state[0] cannot change before all programs of this call have come to count_call, so all of them read the same.
    """
    await_kernel_before()
    word = tl.load(_call_word(state_ptr))
    epoch = ((word & 0xFFFFFFFF) + 1) & 0xFFFFFFFF
    return (tl.cast(site, tl.int64) << 32) | epoch, (epoch & 1).to(tl.int32)


@triton.jit
def half_of_last_call(state_ptr):
    """The half of the last finished call, for a kernel that reads again what that call received.

    It may, as long as this rank has not begun its next call: no peer stores to this half before that.
    """
    await_kernel_before()
    return tl.load(state_ptr) & 1


@triton.jit
def count_call(state_ptr, ticket, programs):
    """Counts this program; the last one of the call counts the call. Anywhere behind begin_call, once.

    Nobody waits for this: the next launch of this rank reads the epoch after this kernel has ended. Kernels whose time is
    that of one exchange call it before they wait for a peer, because the answer takes as long as a load.

    Relaxed is enough: the count and the epoch are halves of one word, and accesses of one place are never reordered. A
    program's load of the word precedes its addition, and the additions of all programs precede the new epoch.
    """
    tl.debug_barrier()  # all threads of this program have loaded the word
    before = tl.atomic_add(_call_word(state_ptr), 1 << 32, sem="relaxed", scope="gpu")
    if (before >> 32) == programs - 1:
        tl.store(_call_word(state_ptr), ticket & 0xFFFFFFFF)


@triton.jit
def _call_word(state_ptr):
    """state[0:2] as one word: the epoch, the number of calls so far; above it how many programs of this call counted."""
    return tl.cast(state_ptr, tl.pointer_type(tl.int64))


# --- where things are -----------------------------------------------------------------------------------------------


@triton.jit
def staging_of(staging_ptrs, half, rank, WORLD_SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Rank `rank`'s staging memory of that half, as mapped in this process; 16-byte aligned by construction."""
    return tl.multiple_of(_of_half(staging_ptrs, half, rank, WORLD_SIZE).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def flags_of(flag_ptrs, half, rank, WORLD_SIZE: tl.constexpr):
    """Rank `rank`'s flags of that half, as mapped in this process."""
    return _of_half(flag_ptrs, half, rank, WORLD_SIZE).to(tl.pointer_type(tl.int64))


@triton.jit
def _of_half(table, half, rank, WORLD_SIZE: tl.constexpr):
    """Both halves' addresses are loaded, so that the loads need not wait for the epoch."""
    return tl.where(half == 0, tl.load(table + rank), tl.load(table + WORLD_SIZE + rank))


# --- telling and waiting --------------------------------------------------------------------------------------------


@triton.jit
def publish(flag_ptrs, half, peer, index, ticket, WORLD_SIZE: tl.constexpr):
    """Tells `peer` that everything this program has stored so far can be read.

    Only one thread writes the flag. Its release covers what the other threads stored only if they have met at a
    barrier before; Triton 3.6 inserts none before an atomic (3.9 does).
    """
    flags = flags_of(flag_ptrs, half, peer, WORLD_SIZE)
    tl.debug_barrier()
    tl.atomic_xchg(flags + index, ticket, sem="release", scope="sys")


@triton.jit
def publish_to_peers(flag_ptrs, half, rank, index, ticket, WORLD_SIZE: tl.constexpr):
    """`publish` to every other rank, after all their data: one barrier serves all flags."""
    tl.debug_barrier()
    for distance in tl.range(1, WORLD_SIZE, num_stages=1):
        peer = (rank + distance) % WORLD_SIZE
        flags = flags_of(flag_ptrs, half, peer, WORLD_SIZE)
        tl.atomic_xchg(flags + index, ticket, sem="release", scope="sys")


@triton.jit
def await_flag(flag_ptrs, half, rank, peer, index, ticket, state_ptr, timeout_ns, WORLD_SIZE: tl.constexpr):
    """Returns when `peer` has published flag `index` of this rank for this call; its data may be loaded then.

    An atomic with a used result is done by one thread and followed by a barrier, so the acquire covers all threads'
    later loads. Equality, not order: a flag cannot run ahead, because its writer begins call e + 2 only after this
    rank has finished call e; and equality needs no care when epochs wrap around.

    After `timeout_ns`, or as soon as the flag has this epoch and another site, an error is recorded (state[2:9]);
    compiled code then traps, interpreted code stops waiting.
    """
    flag = flags_of(flag_ptrs, half, rank, WORLD_SIZE) + index
    given_up = _call_has_failed(state_ptr)
    polls = 0
    began = tl.full([], 0, tl.int64)  # 0: no clock looked at yet
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    while (seen != ticket) & (given_up == 0):
        polls += 1
        if polls % _POLLS_PER_CHECK == 0:
            began, given_up = _check_wait(began, timeout_ns, state_ptr, peer, index, ticket, seen)
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")


@triton.jit
def meet(flag_ptrs, half, rank, ticket, state_ptr, timeout_ns, WORLD_SIZE: tl.constexpr, LANES: tl.constexpr):
    """`publish_to_peers` and `await_flag` of every peer, in the flags numbered by their writers: a thread for each peer,
    so that it takes no longer with more of them. `LANES`: a power of 2, at least WORLD_SIZE.

    For a kernel that loads and stores nothing that peers share: what a thread acquires is not made known to the others.
    """
    lane = tl.arange(0, LANES)
    is_peer = (lane < WORLD_SIZE) & (lane != rank)
    peer = tl.minimum(lane, WORLD_SIZE - 1)
    theirs = flags_of(flag_ptrs, half, peer, WORLD_SIZE) + rank
    mine = flags_of(flag_ptrs, half, rank, WORLD_SIZE) + peer
    tl.debug_barrier()
    tl.atomic_xchg(theirs, tl.full([LANES], 0, tl.int64) + ticket, mask=is_peer, sem="release", scope="sys")
    count_call(state_ptr, ticket, 1)
    given_up = _call_has_failed(state_ptr)
    polls = 0
    began = tl.full([], 0, tl.int64)
    seen = tl.atomic_add(mine, tl.full([LANES], 0, tl.int64), mask=is_peer, sem="acquire", scope="sys")
    missing = tl.min(tl.where(is_peer & (seen != ticket), lane, LANES), axis=0)
    while (missing < LANES) & (given_up == 0):
        polls += 1
        if polls % _POLLS_PER_CHECK == 0:
            there = tl.sum(tl.where(lane == missing, seen, 0), axis=0)
            began, given_up = _check_wait(began, timeout_ns, state_ptr, missing, missing, ticket, there)
        seen = tl.atomic_add(mine, tl.full([LANES], 0, tl.int64), mask=is_peer, sem="acquire", scope="sys")
        missing = tl.min(tl.where(is_peer & (seen != ticket), lane, LANES), axis=0)


# The clock differs from thread to thread, so no control flow of Triton's (which holds barriers) may depend on it: the
# comparison, the record and the trap are one block of assembly, in which threads may diverge. All threads of a program
# would write the same record. The code is written last, behind a fence. The record goes to the address in state[12:14],
# or stays in state[2:9] where that is 0.
_TRAP_WHEN_HOPELESS: tl.constexpr = tl.constexpr(
    """{
    .reg .pred is_first, is_early, is_other_call, is_here;
    .reg .b64 now, elapsed, record;
    .reg .b32 epoch, site, seen_epoch, seen_site, code;
    mov.b64 {epoch, site}, $6;
    mov.b64 {seen_epoch, seen_site}, $7;
    setp.ne.s32 is_other_call, epoch, seen_epoch;
    selp.b32 code, $8, $9, is_other_call;
    mov.u64 now, %globaltimer;
    setp.eq.s64 is_first, $1, 0;
    selp.b64 $0, now, $1, is_first;
    sub.s64 elapsed, now, $0;
    setp.lt.and.s64 is_early, elapsed, $2, is_other_call;
    @is_early bra IN_TIME;
    ld.global.b64 record, [$3+40];
    setp.eq.s64 is_here, record, 0;
    selp.b64 record, $3, record, is_here;
    st.relaxed.sys.global.b32 [record+4], $4;
    st.relaxed.sys.global.b32 [record+8], $5;
    st.relaxed.sys.global.b32 [record+12], epoch;
    st.relaxed.sys.global.b32 [record+16], seen_epoch;
    st.relaxed.sys.global.b32 [record+20], site;
    st.relaxed.sys.global.b32 [record+24], seen_site;
    fence.acq_rel.sys;
    st.relaxed.sys.global.b32 [record], code;
    fence.acq_rel.sys;
    trap;
    IN_TIME:
    }"""
)

if INTERPRETED:

    def _call_has_failed(state_ptr):
        """Whether an earlier wait of this call gave up: the later ones would only wait again."""
        return tl.load(state_ptr + 2) != 0

    def _check_wait(began, timeout_ns, state_ptr, peer, index, ticket, seen):
        """(when the waiting began, whether it is to end); plain Python, which only interpreted code can call."""
        time.sleep(_INTERPRETER_NAP_S)
        now = time.monotonic_ns()
        (site, epoch), (seen_site, seen_epoch) = (_halves(int(value)) for value in (ticket, seen))
        if seen_epoch != epoch and (not began or now - int(began) < int(timeout_ns)):
            return (began if began else tl.full([], now, tl.int64)), tl.full([], 0, tl.int32)
        code = ERROR_DIVERGED if seen_epoch == epoch else ERROR_TIMEOUT
        for offset, value in enumerate((code, int(peer), int(index), epoch, seen_epoch, site, seen_site)):
            tl.store(state_ptr + 2 + offset, value)
        return began, tl.full([], 1, tl.int32)

    def _halves(value):
        """(site, epoch), as the int32 that the state holds."""
        epoch = value & 0xFFFFFFFF
        return value >> 32, epoch - (1 << 32) if epoch >> 31 else epoch

else:

    @triton.jit
    def _call_has_failed(state_ptr):
        return 0  # compiled code does not live on after a failure

    @triton.jit
    def _check_wait(began, timeout_ns, state_ptr, peer, index, ticket, seen):
        """(when the waiting began, 0); traps when it has taken too long or is in vain."""
        record = (state_ptr + 2).to(tl.int64)
        began = tl.inline_asm_elementwise(
            _TRAP_WHEN_HOPELESS,
            "=&l,l,l,l,r,r,l,l,r,r",
            [began, tl.cast(timeout_ns, tl.int64), record, peer, index, ticket, seen, _TIMEOUT, _DIVERGED],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
        return began, 0
