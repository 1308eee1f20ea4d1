"""When one rank fails or departs from the program, the others are told soon and rightly, and nothing is left behind."""

from __future__ import annotations

import functools
import os
import tempfile
import time
import unittest
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized

import symmpatterns
from symmpatterns import config, host_backend
from symmpatterns.testing import run_ranks
from tests import fault_matrix
from tests.fault_matrix import DEADLY, FAMILIES, SURVIVABLE, TIMEOUT_S, Outcome

# fault: how the healthy rank's part ends, the faulty one's, and the most seconds that the healthy one may take
EXPECTED = {
    "other shape": ("DivergenceError", "DivergenceError", 0.5),
    "other shape, known": ("DivergenceError", "DivergenceError", 0.5),
    "other order": ("DivergenceError", "DivergenceError", 0.5),
    "skips a call": ("DivergenceError", "DivergenceError", 0.5),
    "fewer iterations": ("SymmetricMemoryTimeout", "right", TIMEOUT_S["aten"] + 0.5),
    "exception": ("SymmetricMemoryTimeout", "right", TIMEOUT_S["aten"] + 0.5),
    "late, but in time": ("right", "right", TIMEOUT_S["aten"]),
    "SIGKILL, not warm": ("SymmetricMemoryTimeout", "", TIMEOUT_S["aten"] + 0.5),
    "SIGKILL": ("SymmetricMemoryTimeout", "", 0.8),
    "SIGKILL, waiting": ("SymmetricMemoryTimeout", "", 0.8),
    "exit": ("SymmetricMemoryTimeout", "", 0.8),
}


def setUpModule() -> None:
    host_backend.build()  # before the ranks' time limits run


@functools.cache
def outcomes(kernels: str) -> dict[tuple[str, str], list[Outcome]]:
    before = set(os.listdir("/dev/shm"))
    found = fault_matrix.all_outcomes(kernels)
    assert set(os.listdir("/dev/shm")) <= before, "something was left in /dev/shm"
    return found


class FaultMatrixTest(unittest.TestCase):
    def check(self, kernels: str, fault: str, slower: float) -> None:
        cases = {family: parts for (family, name), parts in outcomes(kernels).items() if name == fault}
        self.assertTrue(cases)
        healthy_ends, faulty_ends, limit = EXPECTED[fault]
        for family, (healthy, *faulty) in cases.items():
            with self.subTest(family):
                ends = [part.ended for part in faulty]
                if kernels == "triton" and healthy_ends == "DivergenceError":
                    # Tiles have flags of their own: a rank may wait for one that the other never writes.
                    self.assertIn("DivergenceError", (healthy.ended, *ends))
                    self.assertLessEqual({healthy.ended, *ends}, {"DivergenceError", "SymmetricMemoryTimeout"})
                else:
                    self.assertEqual(healthy.ended, healthy_ends, healthy)
                    self.assertEqual(ends, [faulty_ends] if faulty_ends else [])
                self.assertLess(healthy.seconds, limit + slower, healthy)
                if healthy_ends == "DivergenceError":
                    # Each names itself, the other, and what each was doing.
                    for part in (healthy, *faulty):
                        self.assertRegex(part.text, r"rank 0.*rank 1|rank 1.*rank 0")
                if healthy_ends == "SymmetricMemoryTimeout":
                    self.assertIn("rank 1", healthy.text)
                if fault in DEADLY and fault != "SIGKILL, not warm":
                    self.assertRegex(healthy.text, r"process.* has ended")

    @parameterized.expand([(fault,) for fault in (*SURVIVABLE, *DEADLY)])
    def test_host(self, fault: str) -> None:
        self.check("aten", fault, 0.0)

    @parameterized.expand([(fault,) for fault in (*SURVIVABLE, "SIGKILL") if fault != "fewer iterations"])
    def test_interpreted_kernels(self, fault: str) -> None:
        self.check("triton", fault, TIMEOUT_S["triton"] + 1)

    def test_all_families_are_there(self) -> None:
        self.assertEqual({family for family, _ in outcomes("aten")}, set(FAMILIES))


# --- whole compiled programs ----------------------------------------------------------------------------------------


def _compiled(pg: Any) -> dict[str, Any]:
    def gate(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(funcol.all_reduce(x * 2, "sum", pg)) + 1

    def largest(x: torch.Tensor) -> torch.Tensor:
        return funcol.all_reduce(torch.nn.functional.gelu(x), "max", pg) - 1

    def product(x: torch.Tensor) -> torch.Tensor:
        return funcol.all_reduce(x @ x, "sum", pg)

    return {"G": torch.compile(gate), "L": torch.compile(largest), "P": torch.compile(product)}


def _compiled_programs(rank: int, world_size: int) -> dict[str, str]:
    """How each kind of divergence of compiled programs ends on this rank; the last rank is the one that departs."""
    ended = {}
    x = torch.full((4, 4), rank + 1.0)
    for name, warm, together, departing in (
        ("order", "GLP", "GLP", "PGL"),
        ("first use", "", "G", "L"),
    ):
        group = dist.new_group(list(range(world_size)))
        calls = _compiled(group)
        with config.patch(force=True, keep_overlap=False):
            for word in 2 * warm:
                calls[word](x)
            dist.barrier()
            with config.patch(timeout_s=20):
                try:
                    for word in departing if rank == world_size - 1 else together:
                        calls[word](x)
                    ended[name] = "nothing"
                except RuntimeError as error:
                    ended[name] = f"{type(error).__name__}: {error}"
        torch._dynamo.reset()
    return ended


def _known_on_one_rank(rank: int, world_size: int, folder: str) -> list[str]:
    """Rank 0 runs what it knows, rank 1 something new: after a call, and with nothing but a cached graph."""
    from torch._dynamo.utils import counters

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{rank}"
    x = torch.full((4, 4), rank + 1.0)
    ended = []
    with config.patch(force=True, keep_overlap=False, timeout_s=20):
        _compiled(dist.group.WORLD)["G"](x)
        for again in (False, True):
            if again:  # a group of the same name, for which nothing has been agreed on
                dist.destroy_process_group()
                store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
                store = dist.PrefixStore("again", store)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            torch._dynamo.reset()
            counters.clear()
            began = time.monotonic()
            try:
                _compiled(dist.group.WORLD)["G" if rank == 0 else "L"](x)
            except symmpatterns.DivergenceError as error:
                ended.append(str(error))
                assert time.monotonic() - began < 15, "that was the timeout"
            hits = counters["inductor"]["fxgraph_cache_hit"]
            assert hits == int(rank == 0 or again), hits
    return ended


class CompiledProgramsTest(unittest.TestCase):
    def test_divergence_is_named_on_every_rank(self) -> None:
        for rank, ended in enumerate(run_ranks(_compiled_programs, 3, timeout=200)):
            for name, text in ended.items():
                with self.subTest(name, rank=rank):
                    self.assertTrue(text.startswith("DivergenceError"), text)
                    self.assertIn("rank 2", text)
                    self.assertRegex(text, "peer_buffers.*(max|sum).*peer_buffers|matmul_all_reduce|rank 2 has")

    def test_one_rank_knows_what_the_other_does_not(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for known, cached in run_ranks(_known_on_one_rank, 2, folder, timeout=200):
                self.assertRegex(known, r"a call that needs an agreement first")
                self.assertRegex(known, r"rank \d is at step 1 of peer_buffers \(plan pull float32 2 sum")
                self.assertIn("plan: rank 0 has pull float32 2 sum, rank 1 has pull float32 2 max", cached)
