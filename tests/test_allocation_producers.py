"""Inputs of declared collectives, by who produces them: in place, under the scope, or copied; no kernel more."""

from __future__ import annotations

import functools
import unittest
import unittest.mock
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as funcol

import symmpatterns
from symmpatterns.testing import compiled_code, run_ranks
from tests import allocation_operators as user
from tests.allocating import IN_PLACE, INPUT, LEAVES, SCOPE, calls, details, eager, group
from tests.allocation_operators import from_elsewhere, ops, produce, relaxed, sum_ranks


def producers(x: torch.Tensor, w: torch.Tensor, collective: Any, g: str) -> list[torch.Tensor]:
    hidden = x @ w
    values, _ = torch.topk(x.sin(), 3)
    variance, mean = torch.var_mean(x + 1, 1)
    attention = torch.nn.functional.scaled_dot_product_attention(x[None, None], w[None, None], w[None, None])
    convolved = torch.nn.functional.conv1d(x[None], w[:, :8, None])
    first, second = produce(x)
    return [
        collective(x.sin().cos(), g),  # pointwise
        collective((x * 2).sum(0), g),  # reduction
        collective(torch.addmm(w[0], x, w), g),  # extern matmul
        collective((x @ (w + 1)).relu(), g),  # pointwise that could be computed in the memory of the matmul
        collective(torch.nn.functional.layer_norm(x, (16,)), g),
        collective((hidden + x).reshape(-1), g),  # a view of the buffer
        collective(x.exp().t(), g),
        collective(x.tan()[:, ::2], g),
        collective(x[:, :1].cosh().expand(8, 4), g),
        collective(torch.cat([x.sigmoid(), x @ w]), g),
        collective(variance, g) + mean,  # one of two outputs of a reduction
        collective(values, g),  # operators that allocate their outputs
        collective(attention, g),
        collective(convolved, g),
        collective(first, g),
        second,
        collective(from_elsewhere(x), g),
        collective(x, g),  # no control
        collective(w.view(4, 64), g),
        hidden,
        collective(hidden, g),  # leaves the graph
        collective(collective(x.neg(), g).abs(), g),  # one after the other
        collective(x[:0].sin(), g),
        collective((w @ w.cos()).diagonal(), g),
    ]


DETAILS = [IN_PLACE] * 11 + [SCOPE] * 5 + [INPUT] * 2 + [LEAVES] + [IN_PLACE] * 4


def run_producers(rank: int, world_size: int) -> None:
    torch.manual_seed(rank)
    x, w = torch.randn(8, 16), torch.randn(16, 16)
    function = functools.partial(producers, collective=sum_ranks, g=group())
    compiled = torch.compile(function, fullgraph=True)
    expected = eager(function, x, w)
    for _ in range(2):
        found = compiled(x, w)
        torch.testing.assert_close(found, expected)
    assert sorted(map(str, details())) == sorted(DETAILS), symmpatterns.report()
    for record in symmpatterns.report().records:
        assert (record.collective, record.family) == ("allocation_test::sum_ranks", "allocation"), record
        assert (record.strategy, record.world_size, record.group_name) == ("allocation", world_size, group()), record
    del found[15]  # of a producer under the scope: symmetric too, and as good as any tensor
    assert not any(symmpatterns.is_symmetric(t) for t in found if t.numel()), "pool memory has left the graph"


def run_three(rank: int, world_size: int) -> None:
    g = group()

    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return sum_ranks(x.sin(), g), sum_ranks((x @ w).t(), g), sum_ranks(produce(x)[0], g), sum_ranks(x, g)

    x, w = torch.randn(8, 16) + rank, torch.randn(16, 16)
    compiled = torch.compile(function, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x, w), eager(function, x, w))
    assert details().count(IN_PLACE) == 2 and {r.world_size for r in symmpatterns.report().rewrites} == {3}


def run_kernels(rank: int, world_size: int) -> None:
    """No additional kernel and no copy, producer by producer, in the generated code."""
    x, w = torch.randn(8, 16), torch.randn(16, 16)

    def function(x: torch.Tensor, w: torch.Tensor, collective: Any) -> tuple[torch.Tensor, ...]:
        g = group()
        producers = x.sin(), (x @ w).relu(), x.cos(), x.sum(0), w @ w  # Inductor fuses the two that go over x
        return tuple(collective(y, g) for y in producers)

    with relaxed():
        _, plain = compiled_code(functools.partial(function, collective=ops.by_undeclared), x, w)
    found, code = compiled_code(functools.partial(function, collective=sum_ranks), x, w)
    torch.testing.assert_close(found, eager(functools.partial(function, collective=sum_ranks), x, w))
    for name in ("cpp_fused", "extern_kernels"):
        assert calls(code, name) == calls(plain, name) > 0, (name, code)
    assert calls(code, "symmpatterns_take(") == 5
    # All are in pool memory; the relu is no longer computed in the memory of its matmul, which is an ordinary one.
    assert calls(code, "empty_strided_cpu") == 1


def run_own_sizes(rank: int, world_size: int) -> None:
    """Ranks whose own tensors differ in size get other loops from Inductor, in another order; the calls keep theirs."""

    def other_loops(x: torch.Tensor, y: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return sum_ranks(x.sin() * own.amax(1)[0], group()), sum_ranks(y.cos() * own.amin(1)[0], group())

    def computed_early(x: torch.Tensor, y: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x.sin() * own.amax(1)[0]
        return sum_ranks((y.cos() + h)[:4], group()), sum_ranks(h, group())

    def written_early(x: torch.Tensor, y: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x.sin() * own.amax(1)[0]
        return sum_ranks(y.cos() + h, group()), sum_ranks(h, group())

    def parts(x: torch.Tensor, y: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = x @ y.t()
        total = sum_ranks(first.relu() * own.amax(1)[0], group())
        return total, sum_ranks(torch.cat([first, total @ first, first.sin()]), group())

    def written_to(x: torch.Tensor, y: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x.sin() * own.amax(1)[0]
        total = sum_ranks(h, group())
        return total, sum_ranks(h.index_put((torch.arange(2),), total[:2]), group())

    torch.manual_seed(rank)
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    for short, functions in ((4, (other_loops, written_early, parts, written_to)), (7, (computed_early,))):
        for function in functions:
            own = torch.randn(2, (short, 3000)[rank])
            torch._dynamo.reset()  # or one rank alone would compile anew
            compiled = torch.compile(function, fullgraph=True)
            for _ in range(2):
                torch.testing.assert_close(compiled(x, y, own), eager(function, x, y, own), rtol=1e-4, atol=1e-4)


def run_behind_kept(rank: int, world_size: int) -> None:
    """Inductor makes its own collectives write to a copy of their input, which is the declared input then."""

    def one(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x.sin()
        return h, sum_ranks(funcol.all_reduce(h, "sum", group()), group())

    def coalesced(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = funcol.all_reduce_coalesced([x.sin(), x.cos()], "sum", group())
        return tuple(sum_ranks(part, group()) for part in parts)

    x = torch.randn(8, 16) + rank
    with symmpatterns.config.patch(peer_views=False):
        for function in (one, coalesced):
            compiled = torch.compile(function, fullgraph=True)
            for _ in range(2):
                torch.testing.assert_close(compiled(x), eager(function, x))


def run_given_memory(rank: int, world_size: int) -> None:
    """Producers that write to memory that they are given: it is the pool's, and nothing is copied."""
    g = group()

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        out = torch.empty_like(x)
        ops.fill(x[:4], out[:4])
        ops.fill(x[4:], out[4:])
        results = [sum_ranks(out, g), sum_ranks(torch.zeros_like(x).index_put((torch.tensor([1, 2]),), x[:2]), g)]
        if user.HAS_OUT_TAG:
            first, second = ops.two(x)
            results += [sum_ranks(ops.one(x), g), sum_ranks(first, g), second + 1]
        return results

    x = torch.randn(8, 16) + rank
    expected = eager(function, x)
    user.given.clear()
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), expected)
    symmetric = 4 if user.HAS_OUT_TAG else 2  # that nobody asked for is not
    assert (user.given.count(True), len(user.given)) == (symmetric, 5 if user.HAS_OUT_TAG else 2), user.given
    assert set(details()) == {IN_PLACE}, symmpatterns.report()


def run_strides(rank: int, world_size: int) -> None:
    """What Inductor would copy to the strides that the operator relies on, after it was put into symmetric memory."""
    g = group()

    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            ops.contiguous_only(x.sin().t(), g),
            ops.contiguous_only((x @ w).t(), g),
            ops.contiguous_only(x.t(), g),
            sum_ranks(torch.zeros(16, x.shape[0]) + x.t(), g),  # a pass drops the sum, and with it its strides
        )

    x, w = torch.randn(8, 16) + rank, torch.randn(16, 16)
    for dynamic in (False, True):
        symmpatterns.report().clear()
        torch.testing.assert_close(
            torch.compile(function, fullgraph=True, dynamic=dynamic)(x, w), eager(function, x, w)
        )
        assert details() == [IN_PLACE, "copied: its producer has other strides", INPUT, INPUT], details()


def run_sizes_from_data(rank: int, world_size: int) -> None:
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    g = group()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        places = torch.nonzero(x)
        written = places + 1
        ops.sum_ranks_(written, g)
        return sum_ranks(places, g), written

    compiled = torch.compile(function, fullgraph=True)
    for size in (3, 5):
        x = torch.eye(6)
        x[size:] = 0
        found = compiled(x)
        torch.testing.assert_close(found, eager(function, x))
        assert not symmpatterns.is_symmetric(found[1])
    assert sorted(map(str, details())) == [IN_PLACE, SCOPE], details()


class ProducerTest(unittest.TestCase):
    @pytest.mark.slow
    def test_strides_that_operators_rely_on(self) -> None:
        run_ranks(run_strides, 2, timeout=120)

    def test_memory_that_is_given(self) -> None:
        run_ranks(run_given_memory, 2, timeout=120)

    def test_sizes_that_depend_on_data(self) -> None:
        run_ranks(run_sizes_from_data, 2, timeout=120)

    def test_every_producer(self) -> None:
        run_ranks(run_producers, 2, timeout=120)

    @pytest.mark.slow
    def test_three_ranks(self) -> None:
        run_ranks(run_three, 3, timeout=120)

    def test_behind_collectives_that_stay(self) -> None:
        run_ranks(run_behind_kept, 2, timeout=120)

    def test_ranks_with_tensors_of_different_sizes(self) -> None:
        run_ranks(run_own_sizes, 2, timeout=200)

    def test_no_additional_kernel(self) -> None:
        run_ranks(run_kernels, 2, timeout=120)
