"""Declared collectives in compiled functions, between processes: spellings, the RFC's examples, training, eager code."""

from __future__ import annotations

import functools
import unittest
import unittest.mock
from typing import Any

import pytest
import torch
import torch.distributed as dist

import symmpatterns
from symmpatterns import fusion_aware_alloc
from symmpatterns.patterns import allocation
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.testing import RankError, run_ranks
from tests import allocation_operators as user
from tests.allocating import IN_PLACE, INPUT, LEAVES, SCOPE, details, eager, expect_error, group
from tests.allocation_operators import ops, produce, relaxed, sum_ranks

# --- spellings ----------------------------------------------------------------------------------------------------


def run_spellings(rank: int, world_size: int) -> None:
    g = group()
    names = [spelling for spelling in user.SPELLINGS if spelling != "undeclared"]

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        results = [getattr(ops, f"by_{name}")((x + i).sin(), g) for i, name in enumerate(names)]
        with symmpatterns.specify_symmetric_memory(ops.by_undeclared, "x"):
            results.append(ops.by_undeclared(x.cos(), g))
        return results + ops.sum_all([x.exp(), x, (x + 1).sum(0)], g) + [ops.through_torch(x.tan(), g)]

    x = torch.randn(8, 16) + rank
    compiled = torch.compile(function, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), eager(function, x))
    assert len(details()) == len(names) + 3, symmpatterns.report()
    assert details().count(IN_PLACE) == len(names) + 2
    assert f"{IN_PLACE}; {INPUT}" in details()
    expect_error("not in symmetric memory", torch.compile(lambda x: ops.by_undeclared(x.cos(), g)), x)


class SpellingTest(unittest.TestCase):
    def test_every_spelling(self) -> None:
        run_ranks(run_spellings, 2, timeout=120)


# --- the RFC's examples -------------------------------------------------------------------------------------------


def run_rfc(rank: int, world_size: int) -> None:
    g = group()

    def collective(x: torch.Tensor) -> torch.Tensor:
        return sum_ranks(x, g)

    def custom_op(x: torch.Tensor) -> torch.Tensor:
        return produce(x)[0]

    def built_in_producer(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        z = y.cos()
        return collective(z)

    def custom_producer(x: torch.Tensor) -> torch.Tensor:
        y = custom_op(x)
        return collective(y)

    def eager_too(x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            y = custom_op(x)
        else:
            with symmpatterns.symmetric_memory():
                y = custom_op(x)
        return collective(y)

    def the_other_way_round(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling():
            with symmpatterns.symmetric_memory():
                y, z = produce(x)
                unused = custom_op(x + 1)
        else:
            y, z = produce(x)
            unused = custom_op(x + 1)
        return collective(y) + unused, ops.is_symmetric(z)

    x = torch.randn(8, 16) + rank
    for function, how in ((built_in_producer, IN_PLACE), (custom_producer, SCOPE), (eager_too, SCOPE)):
        symmpatterns.report().clear()
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), eager(function, x))
        assert details() == [how], symmpatterns.report()
    torch.testing.assert_close(eager_too(x), eager(eager_too, x))
    found, symmetric = torch.compile(the_other_way_round, fullgraph=True)(x)
    torch.testing.assert_close(found, eager(the_other_way_round, x)[0])
    assert symmetric


def run_block(rank: int, world_size: int) -> None:
    """``with symmetric_memory():`` in compiled code, around functions of torch's own."""
    g = group()
    scope = symmpatterns.symmetric_memory

    def function(x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        other = x.sin()
        with scope():
            a = (x.sin() + 1).cos()
            b = x @ x.t()
            values, _ = torch.topk(x, 2)
            for_undeclared = x.exp()
            for_declared = x.tan()
            both = x.cosh()
            same = x.sin()
            view = x[1:]
            reshaped = x.reshape(-1)
            written = torch.zeros(8)
            written.add_(1)
        outside = [
            other,
            view * 1,
            reshaped * 1,
            written,
            ops.by_undeclared(for_undeclared, g),
            sum_ranks(for_declared.t(), g),
            sum_ranks(both, g),
        ]
        return [a, a.t(), b, values, both, same], outside

    def over(group: Any, x: torch.Tensor) -> torch.Tensor:
        with scope(group):
            return x.sin()

    x = torch.randn(8, 16) + rank
    for each in (g, dist.group.WORLD):
        assert symmpatterns.is_symmetric(torch.compile(over, backend="aot_eager", fullgraph=True)(each, x))
    expect_error("no process group named 'nobody'", torch.compile(over, backend="eager", fullgraph=True), "nobody", x)
    compiled = torch.compile(function, fullgraph=True)
    kept = []
    for _ in range(2):
        inside, outside = compiled(x)
        torch.testing.assert_close((inside, outside), eager(function, x))
        assert all(map(symmpatterns.is_symmetric, inside)), [*map(symmpatterns.is_symmetric, inside)]
        assert not any(map(symmpatterns.is_symmetric, outside))
        kept.append(inside)
    torch.testing.assert_close(kept[0], kept[1])
    assert kept[0][0].data_ptr() != kept[1][0].data_ptr()  # new in every call, because it may be kept
    sum_ranks(kept[0][3], g)  # and of use to an eager collective
    assert details() == [IN_PLACE] * 2, symmpatterns.report()
    left = sorted((record.code, record.collective) for record in symmpatterns.report().declined)
    expected = [("may_share_memory", "symmetric_memory: reshape"), ("written_in_place", "symmetric_memory: add_")]
    assert left == expected, left


class RfcTest(unittest.TestCase):
    @pytest.mark.slow
    def test_a_block_around_torchs_functions(self) -> None:
        run_ranks(run_block, 2, timeout=120)

    def test_its_examples(self) -> None:
        run_ranks(run_rfc, 2, timeout=120)


# --- training and dynamic shapes ----------------------------------------------------------------------------------


def run_training(rank: int, world_size: int) -> None:
    g = group()

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = sum_ranks((x @ w).exp(), g)  # exp: its result is saved for backward
        return sum_ranks((y * x.shape[0]).tanh(), g) + y.sin()

    compiled = torch.compile(function, dynamic=True, fullgraph=True)
    kept = []
    for rows in (3, 8, 5, 300, 8, 2):
        torch.manual_seed(rows + 10 * rank)
        x, w = torch.randn(rows, 16).div(4).requires_grad_(), torch.randn(16, 16).div(4).requires_grad_()
        results = []
        for run in (compiled, functools.partial(eager, function)):
            y = run(x, w)
            with relaxed() if run is not compiled else torch.enable_grad():
                results.append((y, *torch.autograd.grad(y.square().mean(), (x, w))))
        torch.testing.assert_close(*results)
        kept.append((results[0][0], results[1][0].clone()))
    for found, expected in kept:
        torch.testing.assert_close(found, expected)
    assert len(symmpatterns.report().rewrites) == 4, symmpatterns.report()
    assert LEAVES in details()
    assert fusion_aware_alloc.live_buffers() <= 6, fusion_aware_alloc.live_buffers()


class TrainingTest(unittest.TestCase):
    def test_backward_and_dynamic_shapes(self) -> None:
        run_ranks(run_training, 2, timeout=120)


# --- torch's collectives, operators that write, several groups ----------------------------------------------------


def run_others(rank: int, world_size: int) -> None:
    c10d = torch.ops._c10d_functional
    for op in (c10d.all_reduce, c10d.all_gather_into_tensor, c10d.broadcast):
        symmpatterns.requires_symmetric_memory(op)
    g = group()
    other = dist.new_group(list(range(world_size))).group_name  # type: ignore[attr-defined]

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = x.sin()
        ops.sum_ranks_(a, g)
        b = x.cos()
        ops.sum_ranks_(b, g)
        c = x.tan()
        d = c.clone()
        ops.sum_ranks_(d, g)
        e = c10d.wait_tensor(c10d.all_reduce(x.exp(), "sum", g))
        f = c10d.wait_tensor(c10d.all_gather_into_tensor((e + 1).t().contiguous(), world_size, g))
        h = c10d.wait_tensor(c10d.broadcast(x.sigmoid(), 0, g))
        two = x.tanh()
        return a, b * 2, c + d, e, f, h + 1, sum_ranks(two, g), sum_ranks(two, other)

    x = torch.randn(8, 16) + rank
    expected = eager(function, x.clone())
    with symmpatterns.config.patch(peer_views=False):
        compiled = torch.compile(function, fullgraph=True)
        user.addresses.clear()
        for _ in range(2):
            found = compiled(x)
            torch.testing.assert_close(found, expected)
    assert not any(symmpatterns.is_symmetric(t) for t in found)
    shared = "copied: the collective writes to it and it is used elsewhere"
    how = [str(d) for d in details()]
    assert how.count(IN_PLACE) == 6 and how.count(shared) == 1, how
    assert f"copied: it is in symmetric memory of group {g!r} already" in how, how
    assert user.addresses[-1] != user.addresses[-2], "two groups share signal pads"


def run_torchs_that_write(rank: int, world_size: int) -> None:
    """An operator of torch's own that writes, with a CPU kernel: torch has one for CUDA only."""
    g = group()

    def sum_to_root(in_tile: torch.Tensor, out_tile: torch.Tensor, root: int, g: str, reduce_op: str = "sum") -> None:
        assert symmpatterns.is_symmetric(out_tile) or user.is_relaxed()
        total = user.check_and_sum(in_tile, g)
        if dist.get_rank() == root:
            out_tile.copy_(total)

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("tile_reduce", sum_to_root, "CPU")
    library.impl("tile_reduce", lambda *args: None, "Meta")

    def function(x: torch.Tensor, out: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        torch.ops.symm_mem.tile_reduce(x.sin(), out, 0, g)
        fresh = torch.zeros_like(x)
        torch.ops.symm_mem.tile_reduce(x.cos(), fresh, 1, g)
        ops.sum_ranks_(plain, g)
        return fresh

    x = torch.randn(8, 16) + rank
    out = symmpatterns.empty((8, 16)).fill_(0)
    plain = x.clone()
    wanted = (torch.zeros(8, 16), x.clone())
    expected = eager(function, x, *wanted)
    found = torch.compile(function, fullgraph=True)(x, out, plain)
    torch.testing.assert_close((found, out, plain), (expected, *wanted))
    assert not symmpatterns.is_symmetric(found)
    # What the caller gave is copied in and back, also where it is symmetric: nothing in the graph says so.
    assert details() == [f"{IN_PLACE}; {INPUT}", IN_PLACE, INPUT], symmpatterns.report()


class InPlaceGraphTest(unittest.TestCase):
    def test_a_write_that_the_graph_does_not_return_is_declined(self) -> None:
        graph = torch.fx.Graph()
        with torch._subclasses.FakeTensorMode():
            value = torch.empty(3)
        x = graph.placeholder("x")
        y = graph.call_function(torch.ops.aten.sin.default, (x,))
        x.meta["val"] = y.meta["val"] = value
        graph.call_function(ops.sum_ranks_.default, (y, "0"))
        graph.output((y,))
        rewriting = Rewriting(graph)
        allocation.apply(rewriting)
        symmpatterns.report().clear()
        rewriting.finish()
        (record,) = symmpatterns.report().records
        self.assertEqual(record.code, "writes_in_place")
        self.assertEqual(len(graph.nodes), 4)


class OtherCollectivesTest(unittest.TestCase):
    @unittest.skipUnless(hasattr(torch.ops.symm_mem, "tile_reduce"), "this torch has no tile_reduce")
    def test_torchs_own_that_write(self) -> None:
        run_ranks(run_torchs_that_write, 2, timeout=120)

    def test_torchs_own_and_mutating_and_two_groups(self) -> None:
        run_ranks(run_others, 2, timeout=120)


# --- eager --------------------------------------------------------------------------------------------------------


def run_eager(rank: int, world_size: int) -> None:
    g = group()
    x = torch.randn(8, 16) + rank
    expect_error("not in symmetric memory", sum_ranks, x, g)
    with symmpatterns.symmetric_memory():
        with symmpatterns.symmetric_memory(g):
            y = x.sin()
        z = y @ y.t()
        outside = x.view(-1)
    torch.testing.assert_close(sum_ranks(y, g), eager(sum_ranks, y, g))
    torch.testing.assert_close(sum_ranks(z[1:], g), eager(sum_ranks, z[1:], g))
    assert not symmpatterns.is_symmetric(outside)
    scope = symmpatterns.symmetric_memory()
    for _ in range(2):
        try:
            with scope, scope:
                raise KeyError
        except KeyError:
            assert not symmpatterns.is_symmetric(x.sin())
    expect_error("there is no process group named 'nobody'", symmpatterns.symmetric_memory("nobody").__enter__)
    assert not symmpatterns.is_symmetric(x.sin())
    # Without elements there is no memory to share, and every rank may have made the tensor in another way.
    with symmpatterns.symmetric_memory():
        nothing = torch.empty(0, 4)
    for each in (nothing, x[:0], torch.ones(0)):
        assert symmpatterns.is_symmetric(each) and sum_ranks(each, g).shape == each.shape
    handle = symmpatterns.rendezvous(nothing if rank else torch.ones(0, 4), g)
    handle.barrier()
    assert [buffer.shape for buffer in handle.buffers] == [(0, 4)] * world_size
    assert not symmpatterns.is_symmetric(torch.empty(0, device="meta"))
    # The marker by itself.
    marked = torch.ops.symmpatterns.to_symmetric(x.t(), g)
    assert symmpatterns.is_symmetric(marked) and marked.stride() == (1, 16) and torch.equal(marked, x.t())
    torch.testing.assert_close(sum_ranks(marked, g), eager(sum_ranks, marked, g))


class EagerTest(unittest.TestCase):
    def test_symmetric_memory(self) -> None:
        run_ranks(run_eager, 2, timeout=60)

    def test_errors_name_the_rank(self) -> None:
        with self.assertRaisesRegex(RankError, "not in symmetric memory"):
            run_ranks(run_undeclared, 2, timeout=60)


def run_undeclared(rank: int, world_size: int) -> None:
    ops.by_undeclared(torch.ones(3), group())


if __name__ == "__main__":
    unittest.main()
