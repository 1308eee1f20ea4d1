"""Graphs of one site that take their slots in turn: on GPUs the rule, here switched on for CPU tensors."""

from __future__ import annotations

import re
import unittest
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch import Tensor
from torch._inductor import config as inductor_config

import symmpatterns
from symmpatterns import config, cost_model
from symmpatterns.peer_views import Plan
from symmpatterns.peer_views.slots import get_slots
from symmpatterns.testing import fake_group, run_ranks
from tests.test_peer_views import calls, generated, kernels, kinds_of

warnings.filterwarnings("ignore", category=FutureWarning)

operators = torch.ops.symmpatterns
SITE = ["peer_buffers", "kernel", "barrier_", "peer_sources", "kernel"]


def world() -> Any:
    return dist.group.WORLD


def norm_gather(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.nn.functional.rms_norm(x, (weight.shape[0],), weight)
    return funcol.all_gather_tensor(y, 0, world()) * 2


def gather_columns(x: Tensor, weight: Tensor) -> Tensor:
    return funcol.all_gather_tensor(x.cos(), 1, world()).softmax(-1)


def leaving_gather(x: Tensor, weight: Tensor) -> Tensor:
    return funcol.all_gather_tensor(x * weight, 0, world())


def reduce(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = funcol.all_reduce(x.sin(), "sum", world()) + x
    return torch.nn.functional.layer_norm(h, (weight.shape[0],)), h


def statistics(x: Tensor, weight: Tensor) -> Tensor:
    return funcol.all_reduce(x.amax(-1), "max", world()).exp()


def scatter(x: Tensor, weight: Tensor) -> Tensor:
    return funcol.reduce_scatter_tensor(x * weight, "sum", 0, world()) + 1


def spread(x: Tensor, weight: Tensor) -> Tensor:
    return funcol.broadcast(x.tan(), 1, world()) * weight


def shared(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two collectives at one barrier, of two dtypes."""
    rows = funcol.all_gather_tensor(x.half() * 2, 0, world())
    total = funcol.all_reduce(x.exp(), "sum", world())
    return rows.float() + 1, total * weight


PROGRAMS = (norm_gather, gather_columns, leaving_gather, reduce, statistics, scatter, spread, shared)


def concatenation(x: Tensor, w: Tensor) -> Tensor:
    return funcol.all_gather_tensor(torch.cat([x.sin(), x.cos()]), 0, world()) * 2


def large(x: Tensor, w: Tensor) -> Tensor:
    return funcol.all_gather_tensor(x.expand(1 << 16, 8, 16).sin(), 0, world()) * 2


def product_before(x: Tensor, w: Tensor) -> Tensor:
    return funcol.reduce_scatter_tensor(x @ w, "sum", 0, world()) + 1


def product_behind(x: Tensor, w: Tensor) -> Tensor:
    return funcol.all_gather_tensor(x.sin(), 0, world()) @ w


def two_sites(x: Tensor, w: Tensor) -> Tensor:
    y = funcol.all_reduce(x.sin(), "sum", world()) * 2
    return funcol.all_reduce(y.cos(), "sum", world()) + 1


class GeneratedCodeTest(unittest.TestCase):
    def setUp(self) -> None:
        self.enterContext(mock.patch.dict(cost_model.TAKES_TURNS, cpu=True))
        self.enterContext(config.patch(template=False, keep_overlap=False))

    @parameterized.expand([(fn,) for fn in PROGRAMS])
    def test_loops_find_the_slot(self, fn: Callable[..., Any]) -> None:
        x, weight = torch.randn(8, 16), torch.randn(16)
        _, code = generated(fn, x, weight, world_size=3 if fn in (norm_gather, reduce) else 2)
        self.assertEqual(kinds_of(calls(code)), SITE)
        self.assertIn("'in turn: ", code)
        store, read = kernels(code)
        # The index is the first turn where values are stored, and the second where they are read.
        self.assertRegex(store, r"\w+ = in_ptr\d+\[static_cast<int64_t>\(0L\)\]")
        self.assertRegex(read, r"\w+ = in_ptr\d+\[static_cast<int64_t>\(1L\)\]")
        for kernel in (store, read):
            self.assertRegex(kernel, r"\d+L\*tmp\d+")
        if fn is norm_gather:
            self.assertEqual(len(set(re.findall(r"\.store\((out_ptr\d+) [^)]*\*tmp", store))), 3)

    @parameterized.expand([(product_before,), (product_behind,), (concatenation,), (large,), (two_sites,)])
    def test_what_has_a_better_place_stays_where_it_is(self, fn: Callable[..., Any]) -> None:
        """A product is computed in a slot and reads one, and parts are stored there; what is too large would pass the
        barrier all the same, and several sites need none at the entry of their graph."""
        _, code = generated(fn, torch.randn(8, 16), torch.randn(16, 16))
        self.assertIn("peer_buffers", code)
        self.assertNotIn("in turn", code)

    def test_not_on_cpu(self) -> None:
        """The process counts the sites there, and no call has a barrier at its entry."""
        with mock.patch.dict(cost_model.TAKES_TURNS, cpu=False):
            _, code = generated(norm_gather, torch.randn(8, 16), torch.randn(16))
        self.assertNotIn("in turn", code)


def _run(rank: int, world_size: int, slot_bytes: int) -> dict[str, float]:
    """The largest error of each program, called with changing sizes, in turns with the others and in both modes."""
    from symmpatterns.peer_views import plan, slots

    cost_model.TAKES_TURNS["cpu"] = True
    config.keep_overlap = False  # of two collectives that share a barrier, one hides the other
    plan.TURN_BYTES = slots.TURN_BYTES = slot_bytes
    inductor_config.fx_graph_cache = False  # none of what is set here is part of its key
    compiled = [(fn, torch.compile(fn, fullgraph=True, dynamic=True)) for fn in (*PROGRAMS, two_sites)]
    errors: dict[str, float] = {}
    kept = []
    for call, n in enumerate((2, 6, 64, 2, 4)):
        for fn, fast in compiled:
            torch.manual_seed(100 * call + rank)
            x = torch.randn(n * world_size, 32)
            torch.manual_seed(call)
            weight = torch.randn(32)
            with torch.inference_mode(call % 2 == 1):
                one = fast(x, weight)
                kept.append((fn.__name__, one, fn(x, weight)))
    for name, one, other in kept:  # what the caller kept is not slot memory
        pairs = zip(*(each if isinstance(each, tuple) else (each,) for each in (one, other)), strict=True)
        errors[name] = max(errors.get(name, 0.0), *(float((a - b).abs().max()) for a, b in pairs))
    assert not symmpatterns.report().declined, symmpatterns.report()
    in_turn = get_slots(dist.group.WORLD.group_name, torch.device("cpu"))._in_turn
    assert in_turn.addresses and in_turn.distance == slot_bytes
    return errors


class RanksTest(unittest.TestCase):
    @parameterized.expand([(2, 1 << 20), (3, 1 << 10)])
    def test_values(self, world_size: int, slot_bytes: int) -> None:
        """Also where the larger calls of a compiled function do not fit into slots that are taken in turn."""
        for errors in run_ranks(_run, world_size, slot_bytes, timeout=250):
            for name, error in errors.items():
                with self.subTest(name):
                    self.assertLess(error, 1e-4)


class OperatorTest(unittest.TestCase):
    def test_plan(self) -> None:
        plan = Plan.parse("in turn: push float32 2 sum, gather:0 float16 1")
        self.assertTrue(plan.in_turn)
        self.assertEqual(str(plan), "in turn: push float32 2 sum, gather:0 float16 1")
        for text in ("in turn: push float32 1 | pull float32 1", "in turn: exchange:2 float32 2"):
            with self.subTest(text), self.assertRaisesRegex(ValueError, "one site"):
                Plan.parse(text)

    def test_opcheck(self) -> None:
        both, turns = torch.randn(2, 3, 4), torch.tensor([1, 0])
        torch.library.opcheck(operators.store_in_turn_.default, (both.clone(), turns, torch.randn(3, 4)))
        torch.library.opcheck(operators.take_in_turn.default, (both, turns))

    def test_one_process(self) -> None:
        """Each call stores where the one before did not, and the barrier exchanges the two."""
        seen = []
        with fake_group(2) as name:
            for call in range(4):
                plan, cpu = "in turn: pull float32 1 sum", torch.device("cpu")
                target, turns = operators.peer_buffers(plan, [4], cpu, name)
                operators.store_in_turn_(target, turns, torch.full((4,), float(call)))
                seen.append(target[:, 0].tolist())
                operators.barrier_([target, turns], name)
                first, _, turns = operators.peer_sources([target, turns], plan, [4], 0, name)
                self.assertEqual(operators.take_in_turn(first, turns).tolist(), [call] * 4)
        self.assertEqual(seen[1:], [[0, 1], [2, 1], [2, 3]])


if __name__ == "__main__":
    unittest.main()
