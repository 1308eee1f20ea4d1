"""The rotation of slots under random delays, without a compiler; wrong when a part of it is taken out."""

from __future__ import annotations

import contextlib
import gc
import random
import time
import unittest
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from parameterized import parameterized

from symmpatterns import config, groups
from symmpatterns.peer_views import plan as plan_module
from symmpatterns.peer_views import slots as slots_module
from symmpatterns.peer_views.slots import Slots, get_slots
from symmpatterns.testing import gpu_world_sizes, run_ranks

CPU = torch.device("cpu")
operators = torch.ops.symmpatterns


Nap = Callable[[], None]


def _own_device(device_type: str) -> torch.device:
    return CPU if device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())


def _naps(rng: random.Random, device: torch.device) -> Nap:
    """Now and then a delay, of the host and on the device's stream."""

    def nap() -> None:
        if rng.random() < 0.15:
            time.sleep(rng.random() * 0.004)
        if device.type == "cuda" and rng.random() < 0.2:
            torch.cuda._sleep(int(rng.random() * 8e6))  # cycles: a few milliseconds

    return nap


def _splits(world_size: int, number: int, site: int, n: int) -> list[list[int]]:
    """How much each rank sends to each; some change while others stay."""
    return [[n * (p + q) % 5 + (p * number + q * site) % 3 for q in range(world_size)] for p in range(world_size)]


def _graph_call(
    rank: int, world_size: int, kinds: list[str], base: torch.Tensor, n: int, name: str, nap: Nap, number: int = 0
) -> torch.Tensor:
    """What one call of a compiled graph does, with naps at every step; how many sites read something wrong.

    Rank r stores `base` + 100 * site + r everywhere. "in turn" among the kinds: takes slots in turn. Nothing here waits
    for a device.
    """
    in_turn, kinds = "in turn" in kinds, [kind for kind in kinds if kind != "in turn"]
    prefix = "in turn: " * in_turn
    plan = prefix + " | ".join(f"{kind} float32 1" for kind in kinds)
    sizes = []
    for site, kind in enumerate(kinds):
        rows = _splits(world_size, number, site, n)
        own = [sum(rows[rank]), *rows[rank], *(row[rank] for row in rows)]
        sizes.append(own if kind.startswith("exchange") else [n * world_size] if kind == "scatter:0" else [n])
    buffers = operators.peer_buffers(plan, [number for each in sizes for number in each], base.device, name)
    wrong = torch.zeros((), dtype=torch.int64, device=base.device)
    turns = [buffers.pop()] if in_turn else []
    for site, kind in enumerate(kinds):
        targets = world_size if kind in ("push", "gather:0") else 1
        sources = 1 if kind in ("gather:0", "from:1") else world_size
        mine, buffers = buffers[:targets], buffers[targets:]
        nap()
        for target in mine:
            mine_now = (base + 100 * site + rank).expand(sizes[site][0])
            if in_turn:
                operators.store_in_turn_(target, *turns, mine_now)
            else:
                operators.store_(target, mine_now)
        nap()
        operators.barrier_([*mine, *turns], name)
        nap()
        theirs = operators.peer_sources([*mine, *turns], f"{prefix}{kind} float32 1", sizes[site], site, name)
        if in_turn:
            theirs = [operators.take_in_turn(each, theirs[-1]) for each in theirs[:-1]]
        assert len(theirs) == sources
        lengths = [n] * world_size if len(sizes[site]) == 1 else sizes[site][1 + world_size :]
        got = list(theirs[0].chunk(world_size)) if kind == "gather:0" else theirs
        if kind == "shard":  # the last blocks reach beyond the tensor
            block = got[0].numel()
            lengths = [max(0, min(block, n - rank * block))] * world_size
            got = [part[: lengths[0]] for part in got]
        senders = [1] if kind == "from:1" else list(range(world_size))
        assert [each.numel() for each in got] == lengths[: len(senders)]
        right = [(part == base + 100 * site + source).all() for source, part in zip(senders, got, strict=True)]
        wrong += ~torch.stack(right).all()
    return wrong


def _break(fault: str) -> None:
    """Takes a part of the protocol out, in this process."""
    slots_module._SLOTS = 1 if fault == "one slot" else 2
    whole = Slots._meet

    def broken(self: Slots, what: str, site: int, turns: Sequence[torch.Tensor] = ()) -> None:
        is_entry = what.startswith("entry")
        if (fault == "no entry barrier" and is_entry) or (fault == "no barrier" and not is_entry):
            return
        if fault == "turns that stay":
            for each in turns:
                each.zero_()
        whole(self, what, site, turns)

    Slots._meet = broken  # type: ignore[method-assign]


def _calls(
    rank: int, world_size: int, stateless: bool, fault: str, calls: int, seed: int, device_type: str = "cpu"
) -> int:
    """Random calls one after the other, on GPUs on one of two streams; how many sites of them read something wrong.

    Those with one site take slots in turn half of the time. With the fault "turns that stay" all calls are such.
    """
    device, name = _own_device(device_type), dist.group.WORLD.group_name
    get_slots(name, device).counts_sites = not stateless
    if fault:
        _break(fault)
    program, nap = random.Random(seed), _naps(random.Random(seed + rank + 1), device)
    some = ["pull", "push", "gather:0", *([] if fault else ["shard", "scatter:0", "from:1"])]
    some += [] if fault or device_type != "cpu" else [f"exchange:{world_size}"]
    lanes = [contextlib.nullcontext()] if device == CPU else [torch.cuda.stream(torch.cuda.Stream()) for _ in range(2)]
    wrong = [torch.zeros((), dtype=torch.int64, device=device) for _ in lanes]
    if device != CPU:
        torch.cuda.synchronize()
    only_in_turn = fault == "turns that stay"
    plan_module.TURN_BYTES = slots_module.TURN_BYTES = 1 << 16  # the largest sites are too large to take turns
    for call in range(calls):
        kinds = [program.choice(some) for _ in range(1 if only_in_turn else program.choice([1, 1, 2, 3]))]
        n = program.choice([1, 7, 64, 1000] if fault else [1, 7, 64, 1000, 20_000])
        can_take_turns = len(kinds) == 1 and not kinds[0].startswith("exchange")
        if can_take_turns and (only_in_turn or (program.random() < 0.5 and fault != "no entry barrier")):
            kinds.append("in turn")
        number = program.randrange(len(lanes))
        with lanes[number]:
            base = torch.full((), 1000.0 * call, device=device)
            wrong[number] += _graph_call(rank, world_size, kinds, base, n, name, nap, call)
    if device != CPU:
        torch.cuda.synchronize()
    return sum(map(int, wrong))


KINDS = ["pull", "push", "gather:0", "shard", "scatter:0", "from:1"]


def _without_barriers(rank: int, world_size: int) -> dict[str, int]:
    """How many of a few calls with each kind of site are wrong when no rank waits for another."""
    _break("no barrier")
    nap, found = _naps(random.Random(rank), CPU), {}
    for kind in KINDS:
        name, wrong = dist.new_group(list(range(world_size))).group_name, 0
        for call in range(15):
            time.sleep(0.005 * (rank == 1))
            wrong += int(_graph_call(rank, world_size, [kind], torch.full((), 1000.0 * call), 64, name, nap))
        found[kind] = wrong
        dist.barrier()
    return found


def _early_sizes(rank: int, world_size: int) -> str:
    """Exchanges whose ranks read each other's sizes without having waited for them."""
    whole = Slots._meet
    Slots._meet = lambda self, what, *args: None if what.startswith("sizes") else whole(self, what, *args)  # type: ignore[method-assign]
    wrong = 0
    try:
        for call in range(20):
            time.sleep(0.005 * (rank == 1))
            base = torch.full((), 1000.0 * call)
            name = dist.group.WORLD.group_name
            with config.patch(timeout_s=5):
                wrong += int(_graph_call(rank, world_size, [f"exchange:{world_size}"], base, 5, name, _no_nap, call))
    except (RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{wrong} wrong"


def _replays(rank: int, world_size: int, device_type: str, graphs: int) -> int:
    """Graphs of one to three sites, replayed an odd or even number of times, with other calls in between, and in turn with
    earlier ones, whose slots may have been too small for what came since.

    On CPU, where there are no CUDA graphs, a replay is another call.
    """
    device, name = _own_device(device_type), dist.group.WORLD.group_name
    get_slots(name, device).counts_sites = False
    program, nap = random.Random(11), _naps(random.Random(rank), device)
    base = torch.zeros((), device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    number = 0
    replays: list[Callable[[], None]] = []
    for index in range(graphs):
        kinds = [program.choice(["pull", "push", "gather:0"]) for _ in range(1 + index % 3)]
        kinds += ["in turn"] * (index % 6 == 3)
        n = program.choice([1, 64, 1000, 300_000])

        def run(kinds: list[str] = kinds, n: int = n) -> None:
            wrong.add_(_graph_call(rank, world_size, kinds, base, n, name, nap))

        def run_odd(n: int = n, index: int = index) -> None:
            odd = ["push", "in turn"] if index % 2 else ["push"]
            wrong.add_(_graph_call(rank, world_size, odd, base, n, name, nap))

        run(), run_odd()  # slots grow and ranks agree outside of capture
        replay: Callable[[], None] = run
        if device_type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            replay = graph.replay
        replays.append(replay)
        for times in (1, 2, 3):
            for each in (*[replay] * times, program.choice(replays)):
                number += 1
                base.fill_(1000.0 * number)
                each()
                nap()
            if program.random() < 0.5:
                number += 1
                base.fill_(1000.0 * number)
                run_odd()
    return int(wrong)


def _no_nap() -> None:
    pass


def _growth(rank: int, world_size: int) -> list[int]:
    name = dist.group.WORLD.group_name
    sizes = []
    for call, n in enumerate((10, 100_000, 10, 300_000, 299_999)):
        wrong = _graph_call(
            rank, world_size, ["pull", "gather:0", "push"], torch.full((), 1.0 * call), n, name, _no_nap
        )
        assert wrong == 0, (call, n)
        sizes.append(slots_module.live_bytes())
    return sizes


def _groups_come_and_go(rank: int, world_size: int) -> list[int]:
    held = []
    for generation in range(3):
        group = dist.new_group(list(range(world_size)))
        base = torch.full((), 1.0 * generation)
        assert _graph_call(rank, world_size, ["pull"], base, 50_000, group.group_name, _no_nap) == 0
        held.append(slots_module.live_bytes())
        torch._dynamo.reset()
        gc.collect()
        assert slots_module.live_bytes() == held[-1]  # they are the group's, not a compiled function's
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
            ("turns that stay", True),
        ]
    )
    def test_negative_control(self, fault: str, stateless: bool) -> None:
        """Each part of the rotation is needed: without it some rank reads what it should not."""
        wrong = run_ranks(_calls, 2, stateless, fault, 200, 7, timeout=120)
        self.assertGreater(sum(wrong), 0)

    def test_every_kind_of_site_needs_its_barrier(self) -> None:
        found = run_ranks(_without_barriers, 2, timeout=60)
        for kind in KINDS:
            with self.subTest(kind):
                self.assertGreater(sum(wrong[kind] for wrong in found), 0)

    def test_an_exchange_needs_the_barrier_behind_its_sizes(self) -> None:
        ended = run_ranks(_early_sizes, 2, timeout=60)
        self.assertNotEqual(ended, ["0 wrong"] * 2)

    def test_calls_that_are_repeated(self) -> None:
        self.assertEqual(run_ranks(_replays, 2, "cpu", 4, timeout=120), [0, 0])

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


@pytest.mark.gpu
class CudaStressTest(unittest.TestCase):
    """The same on GPUs; ranks share one where there is only one, so that 2 and 4 ranks are tried."""

    def _world_sizes(self) -> list[int]:
        return gpu_world_sizes() or self.skipTest("needs a CUDA GPU")

    @parameterized.expand([(False,), (True,)])
    def test_nothing_is_overwritten_before_it_was_read(self, stateless: bool) -> None:
        for world_size in self._world_sizes():
            with self.subTest(world_size):
                run = (_calls, world_size, stateless, "", 150, 7, "cuda")
                self.assertEqual(run_ranks(*run, timeout=280, backend="nccl"), [0] * world_size)

    def test_cuda_graphs(self) -> None:
        for world_size in self._world_sizes():
            with self.subTest(world_size):
                wrong = run_ranks(_replays, world_size, "cuda", 12, timeout=280, backend="nccl")
                self.assertEqual(wrong, [0] * world_size)

    @parameterized.expand(
        [
            ("one slot", False),
            ("one slot", True),
            ("no entry barrier", True),
            ("no barrier", True),
            ("turns that stay", True),
        ]
    )
    def test_negative_control(self, fault: str, stateless: bool) -> None:
        self._world_sizes()
        wrong = run_ranks(_calls, 2, stateless, fault, 150, 7, "cuda", timeout=280, backend="nccl")
        self.assertGreater(sum(wrong), 0)


def _interpreted_barrier(rank: int, world_size: int, with_waits: bool = True) -> int:
    """The barrier kernel in Triton's interpreter, between real processes; how often it let somebody go too early."""
    from symmpatterns.symmetric_memory import empty, rendezvous
    from symmpatterns.triton_kernels import _sync, barrier
    from symmpatterns.workspace import get_workspace

    if not with_waits:
        # They end at once when the call has failed already.
        _sync._call_has_failed = lambda state_ptr: 1
    counters = rendezvous(empty((1,), dtype=torch.int64).zero_()).buffers
    workspace = get_workspace(dist.group.WORLD.group_name, CPU)
    workspace.reserve(1, world_size)
    delays = random.Random(rank)
    early, turns, expected = 0, torch.arange(2), [0, 1]
    for call in range(1, 31):
        time.sleep(delays.random() * 0.003)
        counters[rank].fill_(call)
        barrier.run(workspace, turns=[turns] * (call % 3 > 0))
        early += any(int(counter) < call for counter in counters)
        expected = expected[::-1] if call % 3 else expected
        assert turns.tolist() == expected, "the turns were not exchanged, or those of a call without them"
    return early


class InterpretedBarrierTest(unittest.TestCase):
    def test_the_waits_are_needed(self) -> None:
        early = run_ranks(_interpreted_barrier, 2, False, timeout=120, env={"TRITON_INTERPRET": "1"})
        self.assertGreater(sum(early), 0)

    @parameterized.expand([(2,), (3,)])
    def test_nobody_goes_before_all_have_come(self, world_size: int) -> None:
        early = run_ranks(_interpreted_barrier, world_size, timeout=120, env={"TRITON_INTERPRET": "1"})
        self.assertEqual(early, [0] * world_size)
