"""The rotation of slots under random delays, without a compiler; wrong when a part of it is taken out."""

from __future__ import annotations

import random
import time
import unittest
from typing import Any

import torch
import torch.distributed as dist
from parameterized import parameterized

from symmpatterns import groups
from symmpatterns.peer_views import slots as slots_module
from symmpatterns.peer_views.slots import Slots, get_slots
from symmpatterns.testing import run_ranks

CPU = torch.device("cpu")
operators = torch.ops.symmpatterns


def _payload(call: int, site: int, rank: int, n: int) -> torch.Tensor:
    return torch.full((n,), float(1000 * call + 100 * site + rank))


def _graph_call(rank: int, world_size: int, kinds: list[str], call: int, n: int, name: str, nap: Any) -> int:
    """What one call of a compiled graph does, with naps at every step; how many sites read something wrong."""
    plan = " | ".join(f"{kind} float32 1" for kind in kinds)
    buffers = operators.peer_buffers(plan, [n] * len(kinds), CPU, name)
    wrong = 0
    for site, kind in enumerate(kinds):
        targets = 1 if kind == "pull" else world_size
        sources = 1 if kind == "gather:0" else world_size
        mine, buffers = buffers[:targets], buffers[targets:]
        nap()
        for target in mine:
            operators.store_(target, _payload(call, site, rank, n))
        nap()
        operators.barrier_(mine, name)
        nap()
        theirs = operators.peer_sources(mine, f"{kind} float32 1", [n], site, name)
        assert len(theirs) == sources
        expected = [_payload(call, site, source, n) for source in range(world_size)]
        got = list(theirs[0].chunk(world_size)) if kind == "gather:0" else theirs
        wrong += any(not torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    return wrong


def _calls(rank: int, world_size: int, stateless: bool, fault: str, calls: int, seed: int) -> int:
    slots_module._SLOTS = 1 if fault == "one slot" else 2
    name = dist.group.WORLD.group_name
    slots = get_slots(name, CPU)
    slots.counts_sites = not stateless
    if fault:
        whole = Slots._meet

        def broken(self: Slots, what: str, site: int) -> None:
            is_entry = what.startswith("entry")
            if (fault == "no entry barrier" and is_entry) or (fault == "no barrier" and not is_entry):
                return
            whole(self, what, site)

        Slots._meet = broken  # type: ignore[method-assign]
    program, delays = random.Random(seed), random.Random(seed + rank + 1)

    def nap() -> None:
        if delays.random() < 0.15:
            time.sleep(delays.random() * 0.004)

    wrong = 0
    for call in range(calls):
        kinds = [program.choice(["pull", "push", "gather:0"]) for _ in range(program.choice([1, 1, 2, 3]))]
        wrong += _graph_call(rank, world_size, kinds, call, program.choice([1, 7, 64, 1000]), name, nap)
    slots_module._SLOTS = 2
    return wrong


def _growth(rank: int, world_size: int) -> list[int]:
    name = dist.group.WORLD.group_name
    sizes = []
    for call, n in enumerate((10, 100_000, 10, 300_000, 299_999)):
        wrong = _graph_call(rank, world_size, ["pull", "gather:0", "push"], call, n, name, lambda: None)
        assert wrong == 0, (call, n)
        sizes.append(slots_module.live_bytes())
    return sizes


def _groups_come_and_go(rank: int, world_size: int) -> list[int]:
    held = []
    for generation in range(3):
        group = dist.new_group(list(range(world_size)))
        assert _graph_call(rank, world_size, ["pull"], generation, 50_000, group.group_name, lambda: None) == 0
        held.append(slots_module.live_bytes())
        dist.destroy_process_group(group)
    return held


def _diverge(rank: int, world_size: int) -> str:
    name = dist.group.WORLD.group_name
    try:
        operators.peer_buffers("pull float32 1", [4 + rank], CPU, name)
    except groups.DivergenceError as error:
        return str(error)
    return ""


class StressTest(unittest.TestCase):
    @parameterized.expand([(w, stateless) for w in (2, 3) for stateless in (False, True)])
    def test_nothing_is_overwritten_before_it_was_read(self, world_size: int, stateless: bool) -> None:
        wrong = run_ranks(_calls, world_size, stateless, "", 200, 7, timeout=120)
        self.assertEqual(wrong, [0] * world_size)

    @parameterized.expand(
        [
            ("one slot", False),
            ("one slot", True),
            ("no entry barrier", True),
            ("no barrier", False),
        ]
    )
    def test_negative_control(self, fault: str, stateless: bool) -> None:
        """Each part of the rotation is needed: without it some rank reads what it should not."""
        wrong = run_ranks(_calls, 2, stateless, fault, 200, 7, timeout=120)
        self.assertGreater(sum(wrong), 0)

    def test_growth(self) -> None:
        for sizes in run_ranks(_growth, 3, timeout=60):
            self.assertEqual(sizes, sorted(sizes))
            self.assertLess(sizes[0], sizes[-1])
            self.assertEqual(sizes[-1], sizes[-2])

    def test_slots_of_destroyed_groups_are_freed(self) -> None:
        for held in run_ranks(_groups_come_and_go, 2, timeout=60):
            self.assertEqual(held, [held[0]] * 3)

    def test_ranks_that_diverge_are_named(self) -> None:
        for text in run_ranks(_diverge, 2, timeout=60):
            self.assertIn("sizes: rank 0 has (4,), rank 1 has (5,)", text)


def _interpreted_barrier(rank: int, world_size: int) -> int:
    """The barrier kernel in Triton's interpreter, between real processes; how often it let somebody go too early."""
    from symmpatterns.symmetric_memory import empty, get_workspace, rendezvous
    from symmpatterns.triton_kernels import barrier

    counters = rendezvous(empty((1,), dtype=torch.int64).zero_()).buffers
    workspace = get_workspace(dist.group.WORLD.group_name, CPU)
    workspace.reserve(1, world_size)
    delays = random.Random(rank)
    early = 0
    for call in range(1, 31):
        time.sleep(delays.random() * 0.003)
        counters[rank].fill_(call)
        barrier.run(workspace)
        early += any(int(counter) < call for counter in counters)
    return early


class InterpretedBarrierTest(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_nobody_goes_before_all_have_come(self, world_size: int) -> None:
        early = run_ranks(_interpreted_barrier, world_size, timeout=120, env={"TRITON_INTERPRET": "1"})
        self.assertEqual(early, [0] * world_size)
