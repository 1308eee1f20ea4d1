"""How long symmetric memory of compiled functions lives, who shares it, and what caches and wrappers do to it."""

from __future__ import annotations

import concurrent.futures
import gc
import tempfile
import threading
import time
import unittest
import unittest.mock

import pytest
import torch
import torch.distributed as dist

import symmpatterns
from symmpatterns import compat, fusion_aware_alloc
from symmpatterns.allocation import pool
from symmpatterns.testing import run_ranks
from tests import allocation_operators as user
from tests.allocating import IN_PLACE, SCOPE, Function, details, eager, expect_error, group
from tests.allocation_operators import produce, sum_ranks

# --- lifetime -----------------------------------------------------------------------------------------------------


def make(shift: int) -> Function:
    def function(x: torch.Tensor) -> torch.Tensor:
        return sum_ranks(x.sin(), group()) + 1

    return function


def run_lifetime(rank: int, world_size: int) -> None:
    torch._dynamo.config.recompile_limit = 64
    small, large = torch.randn(8, 16) + rank, torch.randn(80, 160) + rank
    functions = [torch.compile(make(i), dynamic=False) for i in range(2)]
    expected = [eager(make(0), x) for x in (small, large)]
    kept = []
    for turn in range(6):  # two functions with one entry in the cache, two graphs with one size, two sizes
        for function in functions:
            found = [function(small), function(large)]
            torch.testing.assert_close(found, expected)
            kept.append(found[turn % 2])
    torch.testing.assert_close(kept[0::4], [expected[0]] * 3)
    assert fusion_aware_alloc.live_buffers() == 2, "functions that do not overlap share buffers"
    backend = symmpatterns.host_backend.load()  # type: ignore[attr-defined]
    before = (backend.live_segments(), backend.mapped_bytes())
    for _ in range(50):
        functions[0](small)
    assert (backend.live_segments(), backend.mapped_bytes()) == before

    # Garbage is collected at another time on another rank, and nobody notices.
    if rank == 0:
        gc.disable()
    torch._dynamo.reset()
    del functions, function
    if rank == 1:
        gc.collect()
        assert fusion_aware_alloc.live_buffers() == 0, fusion_aware_alloc.live_buffers()
    again = torch.compile(make(3), dynamic=False)
    for _ in range(2):
        torch.testing.assert_close([again(small), again(large)], expected)
    del again
    torch._dynamo.reset()
    gc.collect()
    assert (fusion_aware_alloc.live_buffers(), fusion_aware_alloc.live_bytes()) == (0, 0)
    assert backend.live_segments() == 0, backend.live_segments()


def run_nested(rank: int, world_size: int) -> None:
    """A function that runs while another one's input is in its buffer gets another buffer."""
    small = torch.randn(8, 16) + rank
    inner = torch.compile(make(2), dynamic=False)
    inner(small)

    @torch.library.custom_op("allocation_test::nested", mutates_args=())
    def nested(x: torch.Tensor, group_name: str) -> torch.Tensor:
        copy = x.clone()
        inner(small)
        assert torch.equal(x, copy), "the buffer was given to two functions"
        return sum_ranks(x, group_name)

    nested.register_fake(lambda x, group_name: torch.empty_like(x))
    symmpatterns.requires_symmetric_memory(nested)
    outer = torch.compile(lambda x: nested(x.cos(), group()), dynamic=False)
    for _ in range(2):
        torch.testing.assert_close(outer(small), eager(lambda x: sum_ranks(x.cos(), group()), small))
    assert fusion_aware_alloc.live_buffers() == 2, "the inner function took the other buffer"


def run_lingering(rank: int, world_size: int) -> None:
    """On one rank somebody, as gloo's threads do, lets go of an input a little after the call: no rank may notice."""

    @torch.library.custom_op("allocation_test::lingers", mutates_args=())
    def lingers(x: torch.Tensor, group_name: str) -> torch.Tensor:
        if rank == 0:
            threading.Timer(0.02, lambda x: None, (x,)).start()
        return sum_ranks(x, group_name)

    lingers.register_fake(lambda x, group_name: torch.empty_like(x))
    symmpatterns.requires_symmetric_memory(lingers)

    def function(x: torch.Tensor) -> torch.Tensor:
        return sum_ranks(lingers(x.cos(), group()).sin(), group())

    x = torch.randn(8, 16) + rank
    compiled = torch.compile(function, dynamic=False)
    user.addresses.clear()
    for _ in range(3):
        torch.testing.assert_close(compiled(x), eager(function, x))
    buffers = 1 if compat.torch_version() >= (2, 13) else 2  # torch 2.11's code holds the first input a little longer
    assert len(set(user.addresses)) == fusion_aware_alloc.live_buffers() == buffers
    again = torch.compile(function, dynamic=True)
    for rows in (2, 9, 30):
        torch.testing.assert_close(again(x[:1].expand(rows, 16)), eager(function, x[:1].expand(rows, 16)))


def run_threads(rank: int, world_size: int) -> None:
    g = group()
    small = torch.randn(8, 16) + rank
    first_is_inside, second_has_ended = threading.Event(), threading.Event()

    @torch.library.custom_op("allocation_test::slow", mutates_args=())
    def slow(x: torch.Tensor, group_name: str) -> torch.Tensor:
        copy = x.clone()
        first_is_inside.set()
        assert second_has_ended.wait(60)
        assert torch.equal(x, copy), "the buffer was given to two threads"
        return sum_ranks(x, group_name)

    slow.register_fake(lambda x, group_name: torch.empty_like(x))
    symmpatterns.requires_symmetric_memory(slow)
    first = torch.compile(lambda x: slow(x.sin(), g))
    second = torch.compile(lambda x: sum_ranks(x.sin() + 1, g))
    second_has_ended.set()
    first(small), second(small)  # one after the other: they share a buffer
    assert fusion_aware_alloc.live_buffers() == 1
    first_is_inside.clear(), second_has_ended.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        call = thread.submit(first, small)
        assert first_is_inside.wait(60)
        expect_error("another thread runs a compiled function with symmetric memory of group", second, small)
        second_has_ended.set()
        torch.testing.assert_close(call.result(), eager(lambda x: sum_ranks(x.sin(), g), small))

    # Of a group of one rank nobody else has to choose alike: every thread has a buffer.
    alone = [dist.new_group([r]) for r in range(world_size)][rank].group_name  # type: ignore[attr-defined]

    def take(number: int) -> None:
        for _ in range(50):
            tensor = pool.take((64,), (1,), torch.int64, torch.device("cpu"), alone)
            tensor.fill_(number)
            assert bool((tensor == number).all()), "the buffer was given to two threads"
            del tensor

    count = compat.storage_use_count

    def count_and_give_way(identity: int) -> int:
        uses = count(identity)
        time.sleep(0.0001)  # others run between finding a buffer free and taking it, if anything lets them
        return uses

    with (
        unittest.mock.patch.object(compat, "storage_use_count", count_and_give_way),
        concurrent.futures.ThreadPoolExecutor(4) as threads,
    ):
        for done in [threads.submit(take, number) for number in range(4)]:
            done.result()


def run_divergence(rank: int, world_size: int) -> None:
    with symmpatterns.config.patch(timeout_s=20):
        expect_error(
            "want different symmetric memory (needed: rank 0: 512, rank 1: 1024)",
            torch.compile(make(0)),
            torch.randn(8 * (rank + 1), 16),
        )


class LifetimeTest(unittest.TestCase):
    def test_reuse_and_release(self) -> None:
        run_ranks(run_lifetime, 2, timeout=120)

    @pytest.mark.slow
    def test_a_compiled_function_inside_a_collective(self) -> None:
        run_ranks(run_nested, 2, timeout=120)

    @pytest.mark.slow
    def test_inputs_that_linger(self) -> None:
        run_ranks(run_lingering, 2, timeout=120)

    def test_threads_do_not_get_one_buffer(self) -> None:
        run_ranks(run_threads, 2, timeout=120)

    def test_sizes_that_differ_between_ranks_are_an_error(self) -> None:
        run_ranks(run_divergence, 2, timeout=60)


# --- wrappers and caches ------------------------------------------------------------------------------------------


def run_cpp_wrapper(rank: int, world_size: int) -> None:
    import torch._inductor.config as inductor

    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        g = group()
        return sum_ranks(x.sin(), g), sum_ranks(x @ w, g), sum_ranks(produce(x)[0], g)

    x, w = torch.randn(8, 16) + rank, torch.randn(16, 16)
    with inductor.patch(cpp_wrapper=True):
        compiled = torch.compile(function)
        for _ in range(2):
            torch.testing.assert_close(compiled(x, w), eager(function, x, w))
    assert details()[:2] == [IN_PLACE] * 2 and str(details()[2]).startswith("copied"), details()


def run_fx_wrapper(rank: int, world_size: int) -> None:
    import torch._inductor.config as inductor

    x = torch.randn(16, 16) + rank
    # It knows neither C++ kernels nor, in torch 2.13, the assertions after a custom operator.
    with inductor.patch(fx_wrapper=True, alignment_asserts=False, size_asserts=False):
        compiled = torch.compile(lambda x: sum_ranks(x @ x, group()))
        for _ in range(2):
            torch.testing.assert_close(compiled(x), eager(lambda x: sum_ranks(x @ x, group()), x))
    assert details() == [IN_PLACE]


def run_warm(rank: int, world_size: int) -> tuple[int, list[bool]]:
    from torch._dynamo.utils import counters

    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        g = group()
        return sum_ranks(x.sin(), g), sum_ranks(produce(x)[0], g), sum_ranks(x @ w, g)

    x, w = torch.randn(8, 16) + rank, torch.randn(16, 16)
    compiled = torch.compile(function, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x, w), eager(function, x, w))
    records = symmpatterns.report().rewrites
    assert sorted(str(r.detail) for r in records) == sorted([IN_PLACE, SCOPE, IN_PLACE]), symmpatterns.report()
    return counters["inductor"]["fxgraph_cache_hit"], [r.from_cache for r in records]


class CacheTest(unittest.TestCase):
    @pytest.mark.slow
    def test_cpp_wrapper(self) -> None:
        run_ranks(run_cpp_wrapper, 2, timeout=200)

    @pytest.mark.slow
    def test_fx_wrapper(self) -> None:
        run_ranks(run_fx_wrapper, 2, timeout=120)

    @pytest.mark.slow  # test_cache.py has the other families'
    def test_a_second_process_takes_the_graph_from_the_cache(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            env = {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
            run_ranks(run_warm, 2, timeout=120, env=env)
            for hits, from_cache in run_ranks(run_warm, 2, timeout=120, env=env):
                self.assertEqual((hits, from_cache), (1, [True] * 3))
