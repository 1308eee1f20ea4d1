"""What becomes of the other ranks when one fails: kind of fault x point x family x backend, with the time to the error.

    python -m tests.fault_matrix            prints the table of docs/reliability.md

A case is two ranks and a process group of their own. Rank "faulty" departs from the program somewhere, rank "healthy"
follows it; each writes down how its part ended. tests/test_faults.py checks every outcome.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from symmpatterns import config
from symmpatterns.symmetric_memory import rendezvous
from symmpatterns.testing import Died, run_ranks

TIMEOUT_S = {"aten": 0.6, "triton": 2.5}  # interpreted calls take tenths of a second
CPU = torch.device("cpu")
Step = Callable[[], bool]  # makes one collective call; whether its result was right

operators = torch.ops.symmpatterns


# --- families: two calls, A and B, of as many bytes and of different shapes -----------------------------------------


def _payload(call: str, rank: int, *shape: int) -> torch.Tensor:
    return torch.full(shape, float(1 + rank + 10 * (call == "B")))


def _is_right(result: torch.Tensor, value: float, shape: tuple[int, ...]) -> bool:
    return result.shape == shape and bool((result == value).all())


def matmul_all_reduce(group: str, rank: int, call: str, rows: int, columns: int) -> bool:
    x = _payload(call, rank, rows, 8)
    out = operators.matmul_all_reduce(x, torch.ones(8, columns), "sum", group)
    return _is_right(out, 8 * sum(float(_payload(call, r, 1)) for r in (0, 1)), (rows, columns))


def matmul_reduce_scatter(group: str, rank: int, call: str, rows: int, columns: int) -> bool:
    x = _payload(call, rank, rows, 8)
    out = operators.matmul_reduce_scatter(x, torch.ones(8, columns), "sum", 0, group)
    return _is_right(out, 8 * sum(float(_payload(call, r, 1)) for r in (0, 1)), (rows // 2, columns))


def all_gather_matmul(group: str, rank: int, call: str, rows: int, columns: int) -> bool:
    _, (out,) = operators.all_gather_matmul(_payload(call, rank, rows, columns), [torch.ones(columns, 3)], 0, group)
    values = [columns * float(_payload(call, r, 1)) for r in (0, 1)]
    return all(_is_right(part, value, (rows, 3)) for part, value in zip(out.chunk(2), values))


def peer_views(group: str, rank: int, call: str, rows: int, columns: int) -> bool:
    """What a compiled graph runs: two sites, the operators called one by one."""
    plan, size = "pull float32 2 sum | gather:0 float32 2", [rows, columns]
    first, *others = operators.peer_buffers(plan, size * 2, CPU, group)
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


def declared(group: str, rank: int, call: str, rows: int, columns: int) -> bool:
    """A custom collective whose input comes from the pool; A and B have a buffer each."""
    size = (rows, columns) if call == "A" else (rows * 1024, columns)
    x = operators.symmetric_empty(size, (columns, 1), torch.float32, CPU, group)
    x.copy_(_payload(call, rank, *size))
    handle = rendezvous(x, group)
    handle.barrier()
    total = sum(buffer.clone() for buffer in handle.buffers)
    handle.barrier()
    return _is_right(total, sum(float(_payload(call, r, 1)) for r in (0, 1)), size)


FAMILIES = {f.__name__: f for f in (matmul_all_reduce, matmul_reduce_scatter, all_gather_matmul, peer_views, declared)}
SHAPES = {"A": (4, 6), "B": (6, 4)}
KERNEL_FAMILIES = ["matmul_all_reduce", "matmul_reduce_scatter", "all_gather_matmul"]  # these have Triton kernels

# --- faults: what the two ranks do after the warm-up; "!" marks the faulty rank's departure ---------------------------

# fault: (point, healthy, faulty). A and B are calls, A2 is A with another shape; the rest is in `_do`.
SURVIVABLE: dict[str, tuple[str, str, str]] = {
    "other shape": ("first use", "C", "D"),
    "other shape, known": ("between calls", "A B A", "A A A"),
    "other order": ("between calls", "A B A", "B A A"),
    "skips a call": ("between calls", "A A B", "A B"),
    "fewer iterations": ("between calls", "A A A", "A A idle"),
    "exception": ("between calls", "A A", "A raise idle"),
    "late, but in time": ("between calls", "A B A", "A nap B A"),
}
DEADLY: dict[str, tuple[str, str, str]] = {
    "SIGKILL, not warm": ("before rendezvous", "A", "kill"),
    "SIGKILL": ("between calls", "A A", "A kill"),
    "SIGKILL, waiting": ("inside a wait", "nap A A", "killed_soon A A"),
    "exit": ("between calls", "A A", "A exit"),
}


@dataclass(frozen=True)
class Outcome:
    """How a rank's part of a case ended: what was raised (or "right", "WRONG"), its text, seconds of the last call."""

    ended: str
    text: str
    seconds: float


def _do(word: str, call: Callable[[str], bool]) -> bool:
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "killed_soon":
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()
    elif word == "exit":
        os._exit(3)
    elif word == "idle":  # alive, and not coming any more
        time.sleep(TIMEOUT_S[config.host_kernels] + 0.2)
    elif word == "nap":
        time.sleep(0.25)
    elif word == "raise":
        try:
            raise ArithmeticError("in the program, caught by it")
        except ArithmeticError:
            pass
    else:
        return call(word)
    return True


def play(family: str, script: str, group: str, rank: int, warm: bool, barrier: Callable[[], None]) -> Outcome:
    """One rank's part of a case."""
    shapes = {**SHAPES, "C": (2, 12), "D": (12, 2)}

    def call(word: str) -> bool:
        return FAMILIES[family](group, rank, word, *shapes[word])

    barrier()
    for word in "ABAB" if warm else "":
        assert call(word), f"{family}: the warm-up gave a wrong result"
    barrier()
    with config.patch(timeout_s=TIMEOUT_S[config.host_kernels]):
        began = time.monotonic()
        for word in script.split():
            began = time.monotonic()
            try:
                if not _do(word, call):
                    return Outcome("WRONG", "", time.monotonic() - began)
            except RuntimeError as error:
                return Outcome(type(error).__name__, str(error), time.monotonic() - began)
        return Outcome("right", "", time.monotonic() - began)


def survivable(rank: int, families: list[str], faults: list[str], kernels: str, pair: Any) -> dict[Any, Outcome]:
    """All cases in which both ranks live, one after the other, a process group each."""
    outcomes = {}
    for family, fault in itertools.product(families, faults):
        group = dist.new_group([0, 1], use_local_synchronization=True)
        _, healthy, faulty = SURVIVABLE[fault]
        with config.patch(host_kernels=kernels):
            outcomes[family, fault] = play(
                family,
                faulty if rank else healthy,
                group.group_name,
                rank,
                fault != "other shape",
                lambda: dist.barrier(pair),
            )
        if outcomes[family, fault].ended.startswith("Sym"):  # nothing works on this group any more
            with config.patch(host_kernels=kernels):
                again = play(family, "A", group.group_name, rank, False, lambda: None)
            assert again.ended != "right" and again.seconds < TIMEOUT_S[kernels] + 1, again
        dist.barrier(pair)
    return outcomes


def deadly(rank: int, cases: list[tuple[str, str]], kernels: str) -> dict[Any, Outcome]:
    """Rank 0 sees the others die, each in a case of its own."""
    groups = [dist.new_group([0, 1 + index]) for index in range(len(cases))]
    outcomes = {}
    for index, (family, fault) in enumerate(cases):
        group = groups[index]
        if rank not in (0, 1 + index):
            continue
        _, healthy, faulty = DEADLY[fault]
        with config.patch(host_kernels=kernels):
            outcomes[family, fault] = play(
                family,
                faulty if rank else healthy,
                group.group_name,
                min(rank, 1),
                fault != "SIGKILL, not warm",
                lambda group=group: dist.barrier(group),  # type: ignore[misc]
            )
    return outcomes


def everything(
    rank: int, world_size: int, families: list[str], deaths: list[tuple[str, str]], kernels: str
) -> dict[tuple[str, str], list[Outcome]]:
    """Rank 0's answer: the outcomes of both ranks where both live, of rank 0 where the other dies."""
    pair = dist.new_group([0, 1])
    found: dict[tuple[str, str], list[Outcome]] = {}
    everybody: list[Any] = [None] * 2
    if rank < 2:
        faults = [fault for fault in SURVIVABLE if kernels == "aten" or fault != "fewer iterations"]
        mine = survivable(rank, families, faults, kernels, pair)
        dist.all_gather_object(everybody, mine, pair)
        found = {case: [outcomes[case] for outcomes in everybody] for case in mine}
    dist.monitored_barrier(timeout=timedelta(seconds=200))  # the others wait for the two
    found.update({case: [outcome] for case, outcome in deadly(rank, deaths, kernels).items()})
    return found


def all_outcomes(kernels: str = "aten") -> dict[tuple[str, str], list[Outcome]]:
    """(family, fault): the outcomes of healthy and faulty; of the healthy one alone when the faulty one died."""
    families, deaths, env = list(FAMILIES), list(itertools.product(FAMILIES, DEADLY)), None
    if kernels == "triton":  # every rank is a new interpreter, which takes seconds, so there are only two
        families, deaths, env = KERNEL_FAMILIES, [("matmul_all_reduce", "SIGKILL")], {"TRITON_INTERPRET": "1"}
    world_size = 1 + len(deaths)
    found, *dead = run_ranks(everything, world_size, families, deaths, kernels, timeout=250, allow_death=True, env=env)
    assert all(isinstance(each, Died) for each in dead), dead
    return found


def table(kernels: str) -> str:
    """The outcomes as a table; families with one outcome share a row, with the longest time."""
    found = all_outcomes(kernels)
    lines = ["| fault of rank 1 | where | families | rank 0 | after | rank 1 |", "|---|---|---|---|---:|---|"]
    for fault in {**SURVIVABLE, **DEADLY}:
        alike: dict[tuple[str, ...], list[tuple[str, float]]] = {}
        for (family, name), outcomes in found.items():
            if name == fault:
                ends = tuple(outcome.ended for outcome in outcomes)
                alike.setdefault(ends, []).append((family, outcomes[0].seconds))
        for (healthy, *faulty), cases in alike.items():
            point = {**SURVIVABLE, **DEADLY}[fault][0]
            families = "all" if len(alike) == 1 and len(cases) > 1 else ", ".join(family for family, _ in cases)
            longest = max(seconds for _, seconds in cases)
            lines.append(f"| {fault} | {point} | {families} | {healthy} | {longest:.2f} s | {(*faulty, 'dead')[0]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for backend in sys.argv[1:] or ["aten", "triton"]:
        print(
            f"\nhost, config.host_kernels = {backend!r}, config.timeout_s = {TIMEOUT_S[backend]:g}\n\n{table(backend)}"
        )
