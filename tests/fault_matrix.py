"""What becomes of the other ranks when one fails: kind of fault x point x family x kernels, with the time to the error.

    python -m tests.fault_matrix            prints the tables of docs/reliability.md

A case is two ranks and a process group of their own. Rank "faulty" departs from the program somewhere, rank "healthy"
follows it; each writes down how its part ended. tests/test_faults.py checks every outcome.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from symmpatterns import config
from symmpatterns.symmetric_memory import rendezvous
from symmpatterns.testing import Died, run_ranks
from tests.test_copy_engine import write_table

# The kinds of kernels: ATen and C++, one Triton kernel (interpreted), the steps of copy_engine/ around Triton's, and
# Triton's on GPUs.
TIMEOUT_S = {"aten": 0.6, "triton": 2.5, "copies": 2.5, "cuda": 2.0}  # interpreted calls take tenths of a second
Step = Callable[[], bool]  # makes one collective call; whether its result was right

operators = torch.ops.symmpatterns


@contextlib.contextmanager
def kernels_in_use(kernels: str) -> Iterator[None]:
    """Calls of this process take that kind of kernels."""
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(folder, "cpu", {"variant": "copy_engine"}) if kernels == "copies" else ""
        with config.patch(host_kernels="aten" if kernels == "aten" else "triton", tuning_table=table):
            yield


# --- families: two calls, A and B, of as many bytes and of different shapes -----------------------------------------


def _payload(call: str, rank: int, *shape: int) -> torch.Tensor:
    """Sums of eight of them are exact in bfloat16, which the copies' kernels want."""
    dtype = torch.bfloat16 if config.tuning_table else torch.float32
    return torch.full(shape, float(1 + rank + 10 * (call == "B")), dtype=dtype)  # on the default device, as all here


def _is_right(result: torch.Tensor, value: float, shape: tuple[int, ...]) -> bool:
    return result.shape == shape and bool((result == value).all())


def matmul_all_reduce(group: str, rank: int, call: str, rows: int, columns: int) -> bool:
    x = _payload(call, rank, rows, 8)
    out = operators.matmul_all_reduce(x, torch.ones(8, columns, dtype=x.dtype), "sum", group)
    return _is_right(out, 8 * sum(float(_payload(call, r, 1)) for r in (0, 1)), (rows, columns))


def matmul_reduce_scatter(group: str, rank: int, call: str, rows: int, columns: int) -> bool:
    x = _payload(call, rank, rows, 8)
    out = operators.matmul_reduce_scatter(x, torch.ones(8, columns, dtype=x.dtype), "sum", 0, group)
    return _is_right(out, 8 * sum(float(_payload(call, r, 1)) for r in (0, 1)), (rows // 2, columns))


def all_gather_matmul(group: str, rank: int, call: str, rows: int, columns: int) -> bool:
    x = _payload(call, rank, rows, columns)
    _, (out,) = operators.all_gather_matmul(x, [torch.ones(columns, 4, dtype=x.dtype)], 0, group)
    values = [columns * float(_payload(call, r, 1)) for r in (0, 1)]
    return all(_is_right(part, value, (rows, 4)) for part, value in zip(out.chunk(2), values))


def all_reduce_rms_norm(group: str, rank: int, call: str, rows: int, columns: int) -> bool:
    norm, out = operators.all_reduce_rms_norm(_payload(call, rank, rows, columns), None, None, 0.0, "sum", group)
    total = sum(float(_payload(call, r, 1)) for r in (0, 1))
    return _is_right(out, total, (rows, columns)) and bool(((norm - 1).abs() < 1e-5).all())


def peer_collectives(group: str, rank: int, call: str, rows: int, columns: int) -> bool:
    """What a compiled graph runs: two sites, the operators called one by one."""
    plan, size = "pull float32 2 sum | gather:0 float32 2", [rows, columns]
    first, *others = operators.peer_buffers(plan, size * 2, torch.get_default_device(), group)
    operators.store_(first, _payload(call, rank, rows, columns))
    operators.barrier_([first], group)
    total = operators.reduce_peers(operators.peer_sources([first], "pull float32 2 sum", size, 0, group), "sum")
    for target in others:
        operators.store_(target, _payload(call, rank, rows, columns))
    operators.barrier_(others, group)
    (gathered,) = operators.peer_sources(others, "gather:0 float32 2", size, 1, group)
    values = [float(_payload(call, r, 1)) for r in (0, 1)]
    return _is_right(total, sum(values), (rows, columns)) and all(
        _is_right(part, value, (rows, columns)) for part, value in zip(gathered.chunk(2), values)
    )


def allocation(group: str, rank: int, call: str, rows: int, columns: int) -> bool:
    """A custom collective whose input comes from the pool; A and B have a buffer each."""
    size = (rows, columns) if call == "A" else (rows * 1024, columns)
    x = operators.symmetric_empty(size, (columns, 1), torch.float32, torch.get_default_device(), group)
    x.copy_(_payload(call, rank, *size))
    handle = rendezvous(x, group)
    handle.barrier()
    total = sum(buffer.clone() for buffer in handle.buffers)
    handle.barrier()
    return _is_right(total, sum(float(_payload(call, r, 1)) for r in (0, 1)), size)


FAMILIES = {
    f.__name__: f
    for f in (
        matmul_all_reduce,
        matmul_reduce_scatter,
        all_gather_matmul,
        all_reduce_rms_norm,
        peer_collectives,
        allocation,
    )
}
SHAPES = {"A": (4, 6), "B": (6, 4), "C": (2, 12), "D": (12, 2)}
GPU_SHAPES = {"A": (64, 96), "B": (96, 64), "C": (32, 192), "D": (192, 32)}
_MATMULS = ["matmul_all_reduce", "matmul_reduce_scatter", "all_gather_matmul"]
# Who has kernels of that kind; what the others do on CPU does not depend on it.
OF_KERNELS = {
    "aten": list(FAMILIES),
    "triton": [*_MATMULS, "all_reduce_rms_norm"],
    "copies": _MATMULS,
    "cuda": [*_MATMULS, "all_reduce_rms_norm", "peer_collectives"],
}

# --- faults: what the two ranks do after the warm-up ------------------------------------------------------------------

# fault: (point, healthy, faulty). A to D are calls of different shapes; the rest is in `_do`.
SURVIVABLE: dict[str, tuple[str, str, str]] = {
    "other shape": ("first use", "C", "D"),
    "other order, not warm": ("first use", "A B", "B A"),
    "exception, not warm": ("first use", "A", "raise idle"),
    "other shape, known": ("between calls", "A B A", "A A A"),
    "other order": ("between calls", "A B A", "B A A"),
    "skips a call": ("between calls", "A A B", "A B"),
    "fewer iterations": ("between calls", "A A A", "A A idle"),
    "exception": ("between calls", "A A", "A raise idle"),
    "exception, waiting": ("inside a wait", "nap A A", "raised_soon A A idle"),
    "late, but in time": ("between calls", "A B A", "A nap B A"),
}
DEADLY: dict[str, tuple[str, str, str]] = {
    "SIGKILL, not warm": ("before rendezvous", "A", "kill"),
    "exit, not warm": ("before rendezvous", "A", "exit"),
    "SIGKILL, agreeing": ("inside an agreement", "nap A", "killed_soon A"),
    "SIGKILL": ("between calls", "A A", "A kill"),
    "exit": ("between calls", "A A", "A exit"),
    "SIGKILL, waiting": ("inside a wait", "nap A A", "killed_soon A A"),
    "exit, waiting": ("inside a wait", "nap A A", "exits_soon A A"),
    "SIGKILL, at random": ("inside a call", "forever", "killed_at_random forever"),
}
NOT_WARM = {"other shape", "other order, not warm", "exception, not warm"} | {
    "SIGKILL, not warm",
    "exit, not warm",
    "SIGKILL, agreeing",
}


def cases_of(kernels: str, faults: dict[str, Any], all_of_them: bool) -> list[tuple[str, str]]:
    """(family, fault) of that kind of kernels: all, or one family for each fault, every family in turn."""
    families = OF_KERNELS[kernels]
    return [
        (family, fault)
        for (i, family), (j, fault) in itertools.product(enumerate(families), enumerate(faults))
        if all_of_them or (i + j) % len(families) == 0
    ]


@dataclass(frozen=True)
class Outcome:
    """How a rank's part of a case ended: what was raised (or "right", "WRONG"), its text, seconds of the last call."""

    ended: str
    text: str
    seconds: float


class _Interruption(Exception):
    """What a signal's handler raises in the program, which catches it."""


def _interrupt(*_: object) -> None:
    raise _Interruption


def _do(word: str, call: Callable[[str], bool], timeout_s: float) -> bool:
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "killed_soon":
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()
    elif word == "killed_at_random":
        threading.Timer(random.random() * 0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    elif word == "exit":
        os._exit(3)
    elif word == "exits_soon":
        threading.Timer(0.1, os._exit, (3,)).start()
    elif word == "raised_soon":
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
    elif word == "idle":  # alive, and not coming any more
        time.sleep(timeout_s + 0.2)
    elif word == "nap":
        time.sleep(0.25)
    elif word == "raise":
        with contextlib.suppress(ArithmeticError):
            raise ArithmeticError("in the program, caught by it")
    else:
        try:
            return call(word)
        except RuntimeError:
            raise
        except Exception as error:
            if _Interruption.__name__ not in repr(error):  # Triton's interpreter puts it into an error of its own
                raise
    return True


def _words(script: str) -> Iterator[str]:
    for word in script.split():
        yield from itertools.cycle("AB") if word == "forever" else [word]


def play(
    family: str, script: str, group: str, rank: int, kernels: str, warm: bool, barrier: Callable[[], None]
) -> Outcome:
    """One rank's part of a case."""

    def call(word: str) -> bool:
        return FAMILIES[family](group, rank, word, *(GPU_SHAPES if kernels == "cuda" else SHAPES)[word])

    with kernels_in_use(kernels):
        barrier()
        for word in "ABAB" if warm else "":
            assert call(word), f"{family}: the warm-up gave a wrong result"
        barrier()
        with config.patch(timeout_s=TIMEOUT_S[kernels]):
            began = time.monotonic()
            for word in _words(script):
                began = time.monotonic()
                try:
                    if not _do(word, call, TIMEOUT_S[kernels]):
                        return Outcome("WRONG", "", time.monotonic() - began)
                except RuntimeError as error:
                    return Outcome(type(error).__name__, str(error), time.monotonic() - began)
            return Outcome("right", "", time.monotonic() - began)


def survivable(
    rank: int, cases: list[tuple[str, str]], groups: list[Any], kernels: str, pair: Any
) -> dict[Any, Outcome]:
    """All cases in which both ranks live, one after the other, a process group each."""
    outcomes = {}
    for (family, fault), group in zip(cases, groups, strict=True):
        name = group.group_name
        _, healthy, faulty = SURVIVABLE[fault]
        outcomes[family, fault] = play(
            family, faulty if rank else healthy, name, rank, kernels, fault not in NOT_WARM, lambda: dist.barrier(pair)
        )
        if outcomes[family, fault].ended.startswith("Sym"):  # nothing works on this group any more
            again = play(family, "A", name, rank, kernels, False, lambda: None)
            assert again.ended != "right" and again.seconds < TIMEOUT_S[kernels] + 1, again
        dist.barrier(pair)
    return outcomes


def deadly(rank: int, cases: list[tuple[str, str]], groups: list[Any], kernels: str) -> dict[Any, Outcome]:
    """Rank 0 sees the others die, each in a case of its own."""
    outcomes = {}
    for index, ((family, fault), group) in enumerate(zip(cases, groups, strict=True)):
        if rank not in (0, 1 + index):
            continue
        _, healthy, faulty = DEADLY[fault]
        outcomes[family, fault] = play(
            family,
            faulty if rank else healthy,
            group.group_name,
            min(rank, 1),
            kernels,
            fault not in NOT_WARM,
            lambda group=group: dist.barrier(group),  # type: ignore[misc]
        )
    return outcomes


def everything(
    rank: int, world_size: int, lives: list[tuple[str, str]], deaths: list[tuple[str, str]], kernels: str
) -> dict[tuple[str, str], list[Outcome]]:
    """Rank 0's answer: the outcomes of both ranks where both live, of rank 0 where the other dies."""
    pair = dist.new_group([0, 1])
    # By all ranks, and none by its members alone: torch names groups by counts, which ranks would have different ones of.
    for_lives = [dist.new_group([0, 1]) for _ in lives]
    for_deaths = [dist.new_group([0, 1 + index]) for index in range(len(deaths))]
    found: dict[tuple[str, str], list[Outcome]] = {}
    everybody: list[Any] = [None] * 2
    if rank < 2:
        mine = survivable(rank, lives, for_lives, kernels, pair)
        dist.all_gather_object(everybody, mine, pair)
        found = {case: [outcomes[case] for outcomes in everybody] for case in mine}
    dist.monitored_barrier(timeout=timedelta(seconds=900))  # the others wait for the two
    found.update({case: [outcome] for case, outcome in deadly(rank, deaths, for_deaths, kernels).items()})
    return found


def all_outcomes(kernels: str = "aten", all_of_them: bool = True) -> dict[tuple[str, str], list[Outcome]]:
    """(family, fault): the outcomes of healthy and faulty; of the healthy one alone when the faulty one died."""
    lives, deaths = (cases_of(kernels, faults, all_of_them) for faults in (SURVIVABLE, DEADLY))
    env = None if kernels == "aten" else {"TRITON_INTERPRET": "1"}
    args = (everything, 1 + len(deaths), lives, deaths, kernels)
    found, *dead = run_ranks(*args, timeout=900, allow_death=True, env=env)
    assert all(isinstance(each, Died) for each in dead), dead
    return found


def table(kernels: str) -> str:
    """The outcomes as a table; families with one outcome share a row, with the longest time."""
    found = all_outcomes(kernels)
    everything = {**SURVIVABLE, **DEADLY}
    lines = ["| fault of rank 1 | where | families | rank 0 | after | rank 1 |", "|---|---|---|---|---:|---|"]
    for fault, (point, *_) in everything.items():
        alike: dict[tuple[str, ...], list[tuple[str, float]]] = {}
        for (family, name), outcomes in found.items():
            if name == fault:
                ends = tuple(outcome.ended for outcome in outcomes)
                alike.setdefault(ends, []).append((family, outcomes[0].seconds))
        for (healthy, *faulty), cases in alike.items():
            families = "all" if len(alike) == 1 else ", ".join(family for family, _ in cases)
            longest = max(seconds for _, seconds in cases)
            lines.append(f"| {fault} | {point} | {families} | {healthy} | {longest:.2f} s | {(*faulty, 'dead')[0]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for kind in sys.argv[1:] or list(TIMEOUT_S):
        print(f"\n{kind} kernels, config.timeout_s = {TIMEOUT_S[kind]:g}\n\n{table(kind)}", flush=True)
