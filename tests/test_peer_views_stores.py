"""What stands in front of a store and is no loop of its own: library routines that write into slots, concatenations."""

from __future__ import annotations

import re
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch._inductor import config as inductor_config

from symmpatterns import config, cost_model
from symmpatterns.testing import assert_same_on_all_ranks, gpu_world_sizes, run_ranks
from tests.test_peer_views import calls, generated, kinds_of, world
from tests.test_peer_views_ranks import compare


def outputs_of(code: str) -> list[str]:
    """Where library routines write, in order: "slot" or "temporary"."""
    body = code[code.index("def call(") : code.index("def get_args")]
    slots = set(re.findall(r"(buf\d+) = buf\d+\[\d+\]", body))
    written = re.findall(r"out=(?:reinterpret_tensor\()?(buf\d+)", body)
    return ["slot" if name in slots else "temporary" for name in written]


class CallsIntoSlotsTest(unittest.TestCase):
    """Library routines that are given where to write, matmuls for instance, write into the slot."""

    def check(self, fn: Callable[..., Any], outputs: list[str], called: list[str] | None, **options: Any) -> Any:
        x, w = torch.randn(8, 16), torch.randn(16, 16)
        with config.patch(template=False, force=True, keep_overlap=False):
            result, code = generated(fn, x, w, **options)
        self.assertEqual(outputs_of(code), outputs)
        if called is not None:
            self.assertEqual(kinds_of(calls(code)), called)
        return x, w, result

    @parameterized.expand([(False,), (True,)])
    def test_matmul(self, dynamic: bool) -> None:
        def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
            h = funcol.all_reduce(x @ w, "sum", world()).relu()
            y = torch.nn.functional.linear(h.view(2, 4, 16), w, w[0])
            return funcol.reduce_scatter_tensor(y, "sum", 1, world()) + 1

        site = ["barrier_", "peer_sources", "kernel"]
        x, w, result = self.check(fn, ["slot", "slot"], ["peer_buffers", "mm", *site, "addmm", *site], dynamic=dynamic)
        y = torch.nn.functional.linear((2 * (x @ w)).relu().view(2, 4, 16), w, w[0])
        torch.testing.assert_close(result, 2 * y[:, :2] + 1)

    def test_a_reduction_stands_between_the_product_and_its_store(self) -> None:
        def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
            return funcol.all_reduce_coalesced([x @ w, w.softmax(-1)], "sum", world())

        x, w, (product, rows) = self.check(fn, ["slot"], None)
        torch.testing.assert_close(rows, 2 * w.softmax(-1))
        torch.testing.assert_close(product, 2 * (x @ w))

    def test_custom_operator_with_an_output_argument(self) -> None:
        if not hasattr(torch.Tag, "out"):
            self.skipTest("this torch knows no output arguments of custom operators")
        name = "symmpatterns_tests_twice"
        library = torch.library.Library(name, "DEF")
        self.addCleanup(library._destroy)
        library.define("twice(Tensor x) -> Tensor")
        library.define("twice.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)", tags=(torch.Tag.out,))
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("twice.out", lambda x, *, out: out.copy_(x * 2), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{name}::twice", torch.empty_like, lib=library)
        twice = getattr(torch.ops, name).twice.default

        def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
            return funcol.broadcast(twice(x.sin()), 1, world()) + 1

        x, _, result = self.check(fn, ["slot"], None)
        torch.testing.assert_close(result, 2 * x.sin() + 1)

    def test_somebody_else_reads_it(self) -> None:
        def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
            y = x @ w
            return funcol.all_reduce(y, "sum", world()) + 1, y

        x, w, (total, product) = self.check(fn, ["temporary"], None)
        torch.testing.assert_close(product, x @ w)
        torch.testing.assert_close(total, 2 * (x @ w) + 1)

    def test_every_rank_gets_a_copy_of_one_product(self) -> None:
        """It is computed once, not once for each rank."""

        def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
            return funcol.all_gather_tensor(x @ w, 0, world()) + 1

        self.check(fn, ["temporary"], ["peer_buffers", "mm", "kernel", "barrier_", "peer_sources", "kernel"])

    def test_not_before_the_barrier_that_frees_the_slot(self) -> None:
        """A product of before another site's barrier must not be in a slot that peers may still read."""

        def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
            name = world().group_name
            c10d = torch.ops._c10d_functional
            early = x @ w
            total = c10d.wait_tensor(c10d.all_reduce(x.sin(), "sum", name)).sum()
            scalar = c10d.wait_tensor(c10d.all_reduce(total, "sum", name))
            return c10d.wait_tensor(c10d.all_reduce(early, "sum", name)) * scalar

        with inductor_config.patch(reorder_for_locality=False):
            x, w, result = self.check(fn, ["temporary"], None)
        torch.testing.assert_close(result, 2 * (x @ w) * 4 * x.sin().sum(), rtol=1e-4, atol=1e-3)
        # Inductor by itself computes it late, and then it may.
        with config.patch(template=False, force=True, keep_overlap=False):
            _, code = generated(fn, x, w)
        self.assertEqual(outputs_of(code), ["slot"])
        called = calls(code)
        self.assertGreater(called.index("mm"), called.index("barrier_"))

    def test_parts_of_a_concatenation(self) -> None:
        def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
            return funcol.all_reduce(torch.cat([x @ w.t(), x.sin(), x @ w]), "sum", world()) + 1

        site = ["barrier_", "peer_sources", "kernel"]
        x, w, result = self.check(fn, ["slot", "slot"], ["peer_buffers", "mm", "mm", "kernel", *site])
        torch.testing.assert_close(result, 2 * torch.cat([x @ w.t(), x.sin(), x @ w]) + 1)

    def test_the_same_part_twice(self) -> None:
        def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
            y = x @ w
            return funcol.all_reduce(torch.cat([y, y]), "sum", world()) + 1

        x, w, result = self.check(fn, ["temporary"], None)
        torch.testing.assert_close(result, 2 * (x @ w).repeat(2, 1) + 1)


class ConcatenationTest(unittest.TestCase):
    """The parts of a concatenation that only a collective reads are stored where they belong."""

    @parameterized.expand([(dim, dynamic) for dim in (0, 1, -1) for dynamic in (False, True)])
    def test_no_temporary(self, dim: int, dynamic: bool) -> None:
        def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return funcol.all_gather_tensor(torch.cat([x, y.sin(), y.cos()], dim), 0, world()) * 2

        x, y = torch.randn(8, 16), torch.randn(8, 16)
        with config.patch(force=True):
            result, code = generated(fn, x, y, dynamic=dynamic)
        self.assertEqual(kinds_of(calls(code)), ["peer_buffers", "kernel", "barrier_", "peer_sources", "kernel"])
        self.assertNotIn("# alias", code)
        sizes = re.findall(r"= empty_strided_cpu\(\((.*?)\), ", code)
        self.assertEqual(len(sizes), 1, sizes)  # the result
        torch.testing.assert_close(result, 2 * torch.cat([x, y.sin(), y.cos()], dim).repeat(2, 1))

    def test_parts_of_several_dtypes_or_with_another_reader_stay_whole(self) -> None:
        def fn(x: torch.Tensor, y: torch.Tensor) -> Any:
            mixed = torch.cat([x + 1, (y * 5).int()])
            shared = torch.cat([x + 1, y])
            return (
                funcol.all_gather_tensor(mixed, 0, world()) * 2,
                funcol.all_gather_tensor(shared, 0, world()) * 2,
                shared.sum(),
            )

        x, y = torch.randn(8, 16), torch.randn(8, 16)
        with config.patch(force=True, keep_overlap=False):
            (mixed, shared, total), _ = generated(fn, x, y)
        torch.testing.assert_close(mixed, 2 * torch.cat([x + 1, (y * 5).int()]).repeat(2, 1))
        torch.testing.assert_close(shared, 2 * torch.cat([x + 1, y]).repeat(2, 1))
        torch.testing.assert_close(total, torch.cat([x + 1, y]).sum())


def products(x: torch.Tensor, w: torch.Tensor) -> Any:
    """Matmuls into slots, one of them too early; concatenations of products, pointwise parts and reductions."""
    early = x @ w.cos()
    h = x
    for _ in range(3):
        h = torch.relu(funcol.all_reduce(h @ w, "sum", world()))
    rows = funcol.all_gather_tensor(torch.cat([h @ w, h.softmax(-1), early]), 0, world())
    columns = funcol.all_gather_tensor(torch.cat([x, h.sin(), h[:, 1:]], 1), 0, world())
    both = funcol.all_reduce(torch.cat([x @ w, h, h @ w]), "sum", world())
    return h, rows + 1, columns, both, funcol.all_reduce(early, "sum", world())


def _on_gpus(rank: int, world_size: int, two_shot: bool, dynamic: bool) -> Any:
    """Against eager gloo, launched from Python and from a CUDA graph; what has to be equal on all ranks."""
    if two_shot:
        cost_model._ONE_SHOT_BYTES["cuda"] = -1
    device = torch.device("cuda", torch.cuda.current_device())
    results = []
    with (
        config.patch(template=False, force=True, keep_overlap=False),
        inductor_config.patch(fx_graph_cache=False),
        torch.no_grad(),
    ):
        compiled = torch.compile(products, fullgraph=True, dynamic=dynamic)
        for call, n in enumerate((4, 6, 300) if dynamic else (6, 6)):
            torch.manual_seed(10 * call + rank)
            values = torch.randn(n, 40), torch.randn(40, 40) / 16
            expected = products(*values)
            there = [value.to(device) for value in values]
            got = compiled(*there)
            compare([each.cpu() for each in got], expected, f"call {call}")
            results += [got[0].cpu(), got[3].cpu(), got[4].cpu()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = compiled(*there)
        for call in range(3):
            torch.manual_seed(100 + 10 * call + rank)
            for tensor, value in zip(there, (torch.randn(n, 40), torch.randn(40, 40) / 16)):
                tensor.copy_(value)
            graph.replay()
            compare([each.cpu() for each in got], products(*(tensor.cpu() for tensor in there)), f"replay {call}")
            results += [got[0].cpu(), got[3].cpu()]
    return results


@pytest.mark.gpu
class GpuTest(unittest.TestCase):
    @parameterized.expand([(False, False), (False, True), (True, False), (True, True)])
    def test_products_and_concatenations(self, two_shot: bool, dynamic: bool) -> None:
        for world_size in gpu_world_sizes() or self.skipTest("needs a CUDA GPU"):
            with self.subTest(world_size):
                answers = run_ranks(_on_gpus, world_size, two_shot, dynamic, timeout=280, backend="nccl")
                for tensors in zip(*answers, strict=True):
                    assert_same_on_all_ranks(tensors)
