"""Thousands of calls of every family on one group, eager and compiled in turn, with delays: right, and the same again."""

from __future__ import annotations

import contextlib
import random
import time
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

import symmpatterns
from symmpatterns import config, host_backend
from symmpatterns.symmetric_memory import Handle
from symmpatterns.testing import RankError, assert_same_on_all_ranks, run_ranks
from symmpatterns.workspace import get_workspace
from tests.allocation_operators import check_and_sum
from tests.families import FAMILIES, PROGRAMS, that_took

CPU = torch.device("cpu")
ONE_HALF, NO_AWAIT, SLOW_READER = 1, 2, 4  # faults of csrc/workspace.h
operators: Any = torch.ops.symmpatterns
# The methods of Stress, one for each family.
EAGER = (
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "all_gather_matmul",
    "all_reduce_rms_norm",
    "peer_collectives",
    "allocation",
)


def setUpModule() -> None:
    host_backend.build()  # before the ranks' time limits run


class Stress:
    """One rank's part. `plan` is the same on every rank, `own` is not."""

    def __init__(self, rank: int, world_size: int, seed: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.plan, self.own = random.Random(seed), random.Random(1000 * seed + rank)
        self.group = dist.group.WORLD
        self.name: str = self.group.group_name  # type: ignore[union-attr]
        self.compiled = [torch.compile(fn, dynamic=True) for fn in (self._gated, self._product)]
        self.kinds = [getattr(self, family) for family in EAGER]

    def nap(self) -> None:
        if self.own.random() < 0.1:
            time.sleep(self.own.random() * 0.002)

    def call(self, number: int, with_compiled: bool) -> tuple[Tensor, Tensor]:
        """(result, what it should be) of one random call, whose operands are integers: sums are exact in any order."""
        w = self.world_size
        m, k = w * self.plan.choice([1, 2, 5, 16, 33]), self.plan.choice([1, 4, 7, 32])
        generator = torch.Generator().manual_seed(number)
        everybody = [torch.randint(-3, 4, (m, k), generator=generator).float() for _ in range(w)]
        kind = self.plan.randrange(len(self.kinds) + 2)
        self.nap()
        if kind >= len(self.kinds):
            fn = (self._gated, self._product)[kind - len(self.kinds)]
            if with_compiled:
                return self.compiled[kind - len(self.kinds)](everybody[self.rank]), fn(everybody[self.rank])
            kind -= len(self.kinds)
        return self.kinds[kind](everybody)

    def matrix(self, k: int) -> Tensor:
        n = self.world_size * self.plan.choice([1, 3, 8, 40])
        return torch.randint(-2, 3, (k, n), generator=torch.Generator().manual_seed(k * n)).float()

    def matmul_all_reduce(self, xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        b = self.matrix(xs[0].shape[1])
        return operators.matmul_all_reduce(xs[self.rank], b, "sum", self.name), sum(xs) @ b

    def matmul_reduce_scatter(self, xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        b, dim = self.matrix(xs[0].shape[1]), self.plan.choice([0, 1])
        out = operators.matmul_reduce_scatter(xs[self.rank], b, "sum", dim, self.name)
        return out, (sum(xs) @ b).chunk(self.world_size, dim)[self.rank]

    def all_gather_matmul(self, xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        b = self.matrix(xs[0].shape[1])
        gathered, (out,) = operators.all_gather_matmul(xs[self.rank], [b], 0, self.name)
        return torch.cat([gathered, out], 1), torch.cat([torch.cat(xs), torch.cat(xs) @ b], 1)

    def all_reduce_rms_norm(self, xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The sum is exact; of the norm it is compared whether it is that of this sum, within its own rounding."""
        norm, total = operators.all_reduce_rms_norm(xs[self.rank], xs[0], None, 1.0, "sum", self.name)
        expected = sum(xs) + xs[0]
        scaled = norm / torch.rsqrt(expected.square().mean(-1, keepdim=True) + 1)
        return torch.cat([total, scaled.round()], 1), torch.cat([expected, expected], 1)

    def peer_collectives(self, xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The operators of a graph with peer views, with naps between them."""
        sizes = list(xs[0].shape)
        kind = self.plan.choice(["pull", "push", "gather:0"])
        piece = f"{kind} float32 2"
        targets = operators.peer_buffers(piece, sizes, CPU, self.name)
        for target in targets:
            operators.store_(target, xs[self.rank])
            self.nap()
        operators.barrier_(targets, self.name)
        self.nap()
        sources = operators.peer_sources(targets, piece, sizes, 0, self.name)
        if kind == "gather:0":
            return sources[0].clone(), torch.cat(xs)
        return operators.reduce_peers(sources, "sum"), sum(xs)  # type: ignore[return-value]

    def allocation(self, xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = operators.symmetric_empty(list(xs[0].shape), list(xs[0].stride()), torch.float32, CPU, self.name)
        x.copy_(xs[self.rank])
        return check_and_sum(x, self.name), sum(xs)  # type: ignore[return-value]

    def _gated(self, x: Tensor) -> Tensor:
        y = torch.relu(funcol.all_reduce(x * 2, "sum", self.group)) + x
        return funcol.all_gather_tensor(y - 1, 0, self.group)

    def _product(self, x: Tensor) -> Tensor:
        y = funcol.all_reduce(x @ torch.ones(x.shape[1], 8), "sum", self.group)
        return funcol.reduce_scatter_tensor(y.clamp(-4, 4).repeat(self.world_size, 1), "sum", 0, self.group)


def calls(rank: int, world_size: int, count: int, faults: int, with_compiled: bool = True) -> int:
    """How many results were wrong."""
    stress = Stress(rank, world_size, 11)
    get_workspace(stress.name, CPU).reserve(1 << 20, 64)
    if faults:
        host_backend.load().native.inject_faults_for_tests(faults if rank == 0 else faults & ~SLOW_READER)
    wrong = 0
    with config.patch(force=True, keep_overlap=False):
        for number in range(count):
            result, expected = stress.call(number, with_compiled)
            wrong += not torch.equal(result, expected)
    return wrong


def without_waits(rank: int, world_size: int) -> dict[str, int]:
    """How many of a few calls of each family are wrong when nobody waits for anybody, and rank 0 is late."""
    stress = Stress(rank, world_size, 12)
    right = {family: getattr(stress, family) for family in EAGER}
    found = {}
    for family, call in right.items():
        group = dist.new_group(list(range(world_size)))
        stress.name = group.group_name
        get_workspace(stress.name, CPU).reserve(1 << 20, 64)
        with contextlib.ExitStack() as stack:
            if family == "allocation":
                stack.enter_context(mock.patch.object(Handle, "barrier", lambda self: None))
            host_backend.load().native.inject_faults_for_tests(NO_AWAIT)
            wrong = 0
            for number in range(12):
                generator = torch.Generator().manual_seed(number)
                xs = [torch.randint(-3, 4, (4 * world_size, 8), generator=generator).float() for _ in range(world_size)]
                time.sleep(0.01 * (rank == 0))
                result, expected = call(xs)
                wrong += not torch.equal(result, expected)
            host_backend.load().native.inject_faults_for_tests(0)
        found[family] = wrong
        dist.barrier()
    return found


def again(rank: int, world_size: int) -> dict[str, Tensor]:
    """Every family twice with the same operands, which are no integers, eager and compiled; the first results."""
    torch.manual_seed(rank)
    x, b, group = torch.randn(6 * world_size, 36), torch.randn(36, 4 * world_size), dist.group.WORLD
    name: str = group.group_name  # type: ignore[union-attr]
    torch.manual_seed(0)
    shared = torch.randn(36, 4 * world_size)  # ranks that multiply by the same matrix get the same bits
    residual, weight = torch.randn(6 * world_size, 36), torch.randn(36)

    def programs(x: Tensor) -> list[Tensor]:
        return [program(x, group) for program in PROGRAMS.values()]

    compiled = torch.compile(programs)
    eager: dict[str, Callable[[], Tensor]] = {
        "all_reduce": lambda: operators.matmul_all_reduce(x, b, "sum", name),
        "all_reduce in bfloat16": lambda: operators.matmul_all_reduce(x.bfloat16(), b.bfloat16(), "avg", name),
        "all_gather": lambda: operators.all_gather_matmul(x, [shared], 0, name)[1][0],
        "own block, reduce_scatter": lambda: operators.matmul_reduce_scatter(x, b, "sum", 0, name),
        "norm": lambda: operators.all_reduce_rms_norm(x, residual, weight, 1e-5, "avg", name)[0],
        "sum under a norm": lambda: operators.all_reduce_rms_norm(x.half(), None, None, 1e-5, "sum", name)[1],
    }
    with config.patch(force=True, keep_overlap=False):
        kept = dict(zip(PROGRAMS, compiled(x)))
        taken = that_took(symmpatterns.report().rewrites)
        assert taken == set(FAMILIES), taken
        kept.update((what, make()) for what, make in eager.items())
        for _ in range(5):
            time.sleep(random.random() * 0.002)
            now = [*compiled(x), *(make() for make in eager.values())]
            for what, result in zip(kept, now, strict=True):
                assert torch.equal(result, kept[what]), f"{what}: the same call gave other bits"
    return kept


class StressTest(unittest.TestCase):
    def test_two_thousand_calls(self) -> None:
        self.assertEqual(run_ranks(calls, 3, 2000, 0, timeout=250), [0] * 3)

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_twenty_thousand_calls(self) -> None:
        for world_size in (2, 4):
            self.assertEqual(run_ranks(calls, world_size, 20_000, 0, timeout=1700), [0] * world_size)

    def test_negative_control(self) -> None:
        """With one half of the workspace instead of two, the same calls go wrong, or meet a flag of another call."""
        env = {"SYMMPATTERNS_ALLOW_FAULTS": "1"}
        try:
            wrong = sum(run_ranks(calls, 3, 120, ONE_HALF | SLOW_READER, False, timeout=100, env=env))
        except RankError as error:
            self.assertIn("at another call", str(error))
        else:
            self.assertGreater(wrong, 0)

    def test_each_family_needs_its_waits(self) -> None:
        """The negative control of each: without waits some rank reads what is not there yet, or no longer."""
        found = run_ranks(without_waits, 2, timeout=100, env={"SYMMPATTERNS_ALLOW_FAULTS": "1"})
        for family in EAGER:
            with self.subTest(family):
                self.assertGreater(sum(wrong[family] for wrong in found), 0)

    @pytest.mark.slow
    def test_same_bits(self) -> None:
        """Of every family, in two calls and on all ranks (but for a rank's own block)."""
        results = run_ranks(again, 3, timeout=200)
        for what in results[0]:
            if "reduce_scatter" not in what:
                with self.subTest(what):
                    assert_same_on_all_ranks([each[what] for each in results])
