"""When one rank fails or departs from the program, the others are told soon and rightly, and nothing is left behind."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
import unittest
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized

import symmpatterns
from symmpatterns import config, host_backend, workspace
from symmpatterns.testing import run_ranks
from tests import fault_matrix
from tests.fault_matrix import DEADLY, NOT_WARM, OF_KERNELS, SURVIVABLE, TIMEOUT_S, Outcome

# fault: how the healthy rank's part ends, how the faulty one's may (it writes nothing down when it died), and the most
# seconds that the healthy one may take beyond config.timeout_s, or, where the fault is noticed at once, in all
DIVERGED, TIMED_OUT, RIGHT = "DivergenceError", "SymmetricMemoryTimeout", "right"
AT_ONCE = {
    *("other shape", "other order, not warm", "other shape, known", "other order", "skips a call"),
    *(fault for fault in DEADLY if fault not in NOT_WARM),
}
EXPECTED: dict[str, tuple[str, set[str]]] = {
    "other shape": (DIVERGED, {DIVERGED}),
    "other order, not warm": (DIVERGED, {DIVERGED}),
    "exception, not warm": (TIMED_OUT, {RIGHT}),
    "other shape, known": (DIVERGED, {DIVERGED}),
    "other order": (DIVERGED, {DIVERGED}),
    "skips a call": (DIVERGED, {DIVERGED}),
    "fewer iterations": (TIMED_OUT, {RIGHT}),
    "exception": (TIMED_OUT, {RIGHT}),
    "exception, waiting": (TIMED_OUT, {"SymmetricMemoryError"}),
    "late, but in time": (RIGHT, {RIGHT}),
    **dict.fromkeys(DEADLY, (TIMED_OUT, set())),
}


def setUpModule() -> None:
    host_backend.build()  # before the ranks' time limits run


@functools.cache
def outcomes(kernels: str, all_of_them: bool) -> dict[tuple[str, str], list[Outcome]]:
    before = set(os.listdir("/dev/shm"))
    found = fault_matrix.all_outcomes(kernels, all_of_them)
    assert set(os.listdir("/dev/shm")) <= before, "something was left in /dev/shm"
    return found


class FaultMatrixTest(unittest.TestCase):
    """Some cells of the matrix, with every fault and every family among them; all of them in the slow class below."""

    all_of_them = False

    def check(self, kernels: str, fault: str) -> None:
        cases = {
            family: parts for (family, name), parts in outcomes(kernels, self.all_of_them).items() if name == fault
        }
        self.assertTrue(cases)
        healthy_ends, faulty_ends = EXPECTED[fault]
        interpreted = kernels != "aten"
        for family, (healthy, *faulty) in cases.items():
            with self.subTest(family):
                ends = {part.ended for part in faulty}
                if interpreted and healthy_ends == DIVERGED:
                    # Tiles have flags of their own: a rank may wait for one that the other never writes.
                    self.assertIn(DIVERGED, {healthy.ended, *ends})
                    self.assertLessEqual({healthy.ended, *ends}, {DIVERGED, TIMED_OUT})
                else:
                    self.assertEqual(healthy.ended, healthy_ends, healthy)
                    self.assertLessEqual(ends, faulty_ends)
                limit = 0.8 if fault in AT_ONCE else TIMEOUT_S[kernels] + 0.5
                self.assertLess(healthy.seconds, limit + (TIMEOUT_S[kernels] + 1 if interpreted else 0), healthy)
                if healthy_ends == DIVERGED:
                    # Each names itself, the other, and what each was doing.
                    for part in (healthy, *faulty):
                        self.assertRegex(part.text, r"rank 0.*rank 1|rank 1.*rank 0")
                if healthy_ends == TIMED_OUT:
                    self.assertIn("rank 1", healthy.text)
                if fault in DEADLY and fault not in NOT_WARM:
                    self.assertRegex(healthy.text, r"process.* has ended")

    @parameterized.expand([(fault,) for fault in (*SURVIVABLE, *DEADLY)])
    def test_host(self, fault: str) -> None:
        self.check("aten", fault)

    @parameterized.expand([(fault,) for fault in (*SURVIVABLE, *DEADLY)])
    @pytest.mark.slow
    def test_interpreted_kernels(self, fault: str) -> None:
        self.check("triton", fault)

    def test_every_family_and_fault_is_there(self) -> None:
        for kernels, families in OF_KERNELS.items():
            for faults in (SURVIVABLE, DEADLY):
                cases = fault_matrix.cases_of(kernels, faults, self.all_of_them)
                self.assertEqual({family for family, _ in cases}, set(families))
                self.assertEqual({fault for _, fault in cases}, set(faults))


@pytest.mark.slow
@pytest.mark.timeout(1000)
class WholeFaultMatrixTest(FaultMatrixTest):
    all_of_them = True

    @parameterized.expand([(fault,) for fault in (*SURVIVABLE, *DEADLY)])
    def test_copies(self, fault: str) -> None:
        self.check("copies", fault)


# --- the agreement at first use: each thing that ranks may differ in --------------------------------------------------


def _fingerprints(rank: int, world_size: int) -> dict[str, str]:
    """What the error says when rank 1 differs in one thing only; by the name of the field."""
    x, one = torch.ones(4, 4), torch.ones(4)
    ops = torch.ops.symmpatterns
    differs = rank == 1

    def operator(g: str) -> Any:
        return ops.matmul_all_reduce(x, x, "sum", g)

    def buffers(plan: str, n: int = 4) -> Any:
        return lambda g: ops.peer_buffers(plan, [n], torch.device("cpu"), g)

    def norm(**given: Any) -> Any:
        residual, weight = given.get("residual"), given.get("weight")
        return lambda g: ops.all_reduce_rms_norm(given.get("x", x), residual, weight, 0.0, given.get("op", "sum"), g)

    def as_if(**fields: str) -> Any:
        """Of what this machine has one kind only; the agreement itself is the real one."""
        whole = workspace._identity
        return mock.patch.object(workspace, "_identity", lambda device: {**whole(device), **fields})

    def ended(call: Any) -> str:
        try:
            call(dist.new_group([0, 1]).group_name)
        except symmpatterns.DivergenceError as error:
            return str(error)
        return "no error"

    found = {}
    for field, change in {
        "symmpatterns": mock.patch.object(symmpatterns, "__version__", "0.0"),
        "torch": mock.patch.object(torch, "__version__", "9.9"),
        "configuration": config.patch(force=True),
        "host_kernels": config.patch(host_kernels="triton"),
        "GPU": as_if(GPU="another"),
        "device type": as_if(**{"device type": "cuda"}),
    }.items():
        with change if differs else contextlib.nullcontext():
            found[field] = ended(operator)
    for field, call in {
        "M": lambda g: ops.matmul_all_reduce(x[: 2 + rank], x, "sum", g),
        "N": lambda g: ops.matmul_all_reduce(x, x[:, : 2 + rank], "sum", g),
        "dtypes": lambda g: ops.matmul_all_reduce(*2 * [x.half() if differs else x], "sum", g),
        "reduce_op": lambda g: ops.matmul_all_reduce(x, x, "avg" if differs else "sum", g),
        "scatter_dim": lambda g: ops.matmul_reduce_scatter(x, x, "sum", rank, g),
        "gather_dim": lambda g: ops.all_gather_matmul(x, [torch.ones(4 + 4 * rank, 4)], rank, g),
        "plan": buffers(f"pull float32 1 {'max' if differs else 'sum'}"),
        "sizes": buffers("pull float32 1", 4 + rank),
        "rows": norm(x=x[: 2 + rank]),
        "columns": norm(x=x[:, : 2 + rank]),
        "dtype": norm(x=x.half() if differs else x),
        "residual": norm(residual=x if differs else None),
        "weight": norm(weight=one if differs else None),
        "strides": lambda g: symmpatterns.rendezvous(
            symmpatterns.empty((4, 4)).t() if differs else _symmetric(4, 4), g
        ),
    }.items():
        found[field] = ended(call)
    return found


def _symmetric(*size: int) -> torch.Tensor:
    return symmpatterns.empty(size)


class AgreementTest(unittest.TestCase):
    def test_each_field_is_compared_and_named(self) -> None:
        for found in run_ranks(_fingerprints, 2, timeout=100):
            for field, text in found.items():
                with self.subTest(field):
                    self.assertRegex(text, rf"\b{field}:? .*rank 0.*rank 1")


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
