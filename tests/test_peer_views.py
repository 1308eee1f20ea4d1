"""Peer views in one process, with torch's fake group: the generated code, the operators, and what is declined."""

from __future__ import annotations

import math
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
from torch._inductor import config as inductor_config
from torch._subclasses import FakeTensorMode

import symmpatterns
from symmpatterns import config, cost_model
from symmpatterns.patterns import _peer_forms
from symmpatterns.peer_views import Piece, Plan
from symmpatterns.testing import compiled_code, fake_group

warnings.filterwarnings("ignore", category=FutureWarning, module=".*functional_collectives.*")

peer_buffers = torch.ops.symmpatterns.peer_buffers
store_ = torch.ops.symmpatterns.store_
store_parts_ = torch.ops.symmpatterns.store_parts_
barrier_ = torch.ops.symmpatterns.barrier_
reduce_peers = torch.ops.symmpatterns.reduce_peers


def world() -> Any:
    return dist.group.WORLD


def generated(fn: Callable[..., Any], *args: Any, world_size: int = 2, **options: Any) -> tuple[Any, str]:
    with fake_group(world_size), inductor_config.patch(fx_graph_cache=False):
        return compiled_code(fn, *args, **options)


def kernels(code: str) -> list[str]:
    """The generated kernels' texts, in the order of their definition."""
    return re.findall(r"cpp_pybinding\(.*?r'''(.*?)'''\)", code, flags=re.DOTALL)


def calls(code: str) -> list[str]:
    """The kernels and operators that the generated code calls, in order."""
    body = code[code.index("def call(") : code.index("def get_args")]
    found = re.findall(r"\b(cpp_fused_\w*|extern_kernels\.\w+|torch\.ops\.\w+\.\w+\.default|symmpatterns_\w+)\(", body)
    return [name.removesuffix(".default").removeprefix("symmpatterns_").split(".")[-1] for name in found]


def kinds_of(called: list[str]) -> list[str]:
    return ["kernel" if name.startswith("cpp_fused") else name for name in called]


class PlanTest(unittest.TestCase):
    def test_text_and_plan_are_the_same(self) -> None:
        text = "pull float32 2 | gather:1 bfloat16 3, push int64 0 | scatter:0 float16 1 | from:3 bool 2"
        plan = Plan.parse(text)
        self.assertEqual(str(plan), text)
        self.assertEqual(plan.sites[1][0], Piece("gather", torch.bfloat16, 3, 1))
        self.assertEqual([len(site) for site in plan.sites], [1, 2, 1, 1])

    @parameterized.expand(
        [("pull",), ("push",), ("gather:0",), ("gather:1",), ("gather:2",), ("scatter:0",), ("scatter:1",), ("from:2",)]
    )
    def test_every_rank_reads_what_was_meant_for_it(self, kind: str) -> None:
        """The address arithmetic, simulated: one tensor for each rank's memory, each rank stores its own value."""
        world_size, size = 3, [6, 3, 2]
        piece = Piece.parse(f"{kind} float32 3")
        elements = piece.region_elements(size, world_size)
        memory = [torch.full((elements,), -1.0) for _ in range(world_size)]
        inputs = [torch.arange(36.0).view(size) + 100 * rank for rank in range(world_size)]
        views = [piece.views(size, rank, world_size) for rank in range(world_size)]
        for (targets, sources), value in zip(views, inputs):
            self.assertEqual(len(targets), piece.num_targets(world_size))
            self.assertEqual(len(sources), piece.num_sources(world_size))
            for view in targets:
                memory[view.peer].as_strided(view.size, view.stride, view.offset).copy_(value)
        for rank, (_, sources) in enumerate(views):
            got = [memory[v.peer].as_strided(v.size, v.stride, v.offset) for v in sources]
            name, _, argument = kind.partition(":")
            if name in ("pull", "push"):
                expected = inputs
            elif name == "gather":
                expected = [torch.cat(inputs, int(argument))]
            elif name == "scatter":
                expected = [value.chunk(world_size, int(argument))[rank] for value in inputs]
            else:
                expected = [inputs[int(argument)]]
            for one, other in zip(got, expected, strict=True):
                self.assertTrue(torch.equal(one, other))

    @parameterized.expand([(size,) for size in ([], [1], [5, 3], [4, 4], [0, 3], [1000])])
    def test_shards_cover_a_tensor_of_any_size(self, size: list[int]) -> None:
        for world_size, dtype in ((2, torch.float32), (3, torch.bfloat16), (4, torch.bool)):
            piece = Piece("shard", dtype, len(size), use="sum")
            self.assertEqual(Piece.parse(str(piece)), piece)
            region = piece.region_elements(size, world_size)
            self.assertGreaterEqual(region, math.prod(size))
            self.assertLess(region - math.prod(size), world_size * 16)
            for rank in range(world_size):
                (target,), sources = piece.views(size, rank, world_size)
                self.assertEqual((target.peer, list(target.size), target.offset), (rank, size, 0))
                self.assertEqual([view.peer for view in sources], list(range(world_size)))
                self.assertEqual(
                    {(view.size, view.offset) for view in sources},
                    {((region // world_size,), rank * region // world_size)},
                )
                self.assertEqual(sources[0].offset * dtype.itemsize % 16, 0)

    def test_pieces_of_a_site_do_not_overlap(self) -> None:
        plan = Plan.parse("pull int8 1, push float64 2, gather:0 bfloat16 1 | pull float32 1")
        offsets, largest = plan.offsets([[5, 3, 3, 7, 1000]], 4)
        self.assertEqual(offsets, [[0, 256, 768], [0]])
        self.assertEqual(largest, 4096)

    def test_exchanged_rows_lie_where_their_sender_says(self) -> None:
        world_size, rows = 3, [[2, 0, 1], [0, 0, 4], [3, 1, 0]]  # from the row's rank to the column's
        piece = Piece.parse("exchange:3 float32 2 concatenation")
        sizes = [[sum(rows[r]), 2, *rows[r], *(rows[p][r] for p in range(world_size))] for r in range(world_size)]
        self.assertEqual({len(size) for size in sizes}, {piece.num_sizes})
        self.assertIsNone(piece.problem(sizes))
        inputs = [torch.arange(2.0 * sum(rows[r])).view(-1, 2) + 100 * r for r in range(world_size)]
        for rank in range(world_size):
            targets, sources = piece.views(sizes[rank], rank, world_size, sizes)
            self.assertEqual([(t.peer, t.size, t.offset) for t in targets], [(rank, (sum(rows[rank]), 2), 0)])
            got = [inputs[v.peer].as_strided(v.size, v.stride, v.offset) for v in sources]
            expected = [inputs[peer].split(rows[peer])[rank] for peer in range(world_size)]
            for one, other in zip(got, expected, strict=True):
                self.assertTrue(torch.equal(one, other))
        _, bytes_of_slot = Plan(((piece,),)).offsets(sizes, world_size)
        self.assertEqual(bytes_of_slot, 256)
        sizes[1][4] = 3
        self.assertEqual(piece.problem(sizes), "rank 1 sends [0, 0, 3] rows of 4")
        sizes[1][0] = 3
        self.assertEqual(piece.problem(sizes), "rank 2 expects 4 rows from rank 1, which sends it 3")

    def test_wrong_sizes_are_named(self) -> None:
        with self.assertRaisesRegex(ValueError, "has 2 sizes in all, and 3 were given"):
            Plan.parse("pull float32 2").split_sizes([1, 2, 3])


class StrategyTest(unittest.TestCase):
    @parameterized.expand(
        [
            (2, 1 << 30, False, True),
            (4, 1 << 19, False, True),
            (4, 1 << 20, True, True),
            (8, 8 << 20, True, True),
            (8, 1 << 15, False, True),
            (8, 1 << 28, True, False),
        ]
    )
    def test_two_shot_is_for_more_than_two_ranks_and_large_tensors(
        self, world_size: int, size: int, two_shot: bool, fuse: bool
    ) -> None:
        gpu = torch.device("cuda", 0)
        self.assertEqual(cost_model.all_reduce_is_two_shot(size, world_size, gpu), two_shot)
        with mock.patch.object(cost_model, "_nearest", return_value=None):  # nothing was measured
            self.assertEqual(cost_model.peer_views("all_reduce", size, world_size, gpu).fuse, fuse)
        self.assertFalse(cost_model.all_reduce_is_two_shot(size, world_size, torch.device("cpu")))

    def test_a_size_that_is_not_known_is_taken_for_large(self) -> None:
        for world_size, two_shot in ((2, False), (3, True), (8, True)):
            for device, expected in (("cuda", two_shot), ("cpu", False)):
                found = cost_model.all_reduce_is_two_shot(math.inf, world_size, torch.device(device))
                self.assertEqual(found, expected, (world_size, device))


class GeneratedCodeTest(unittest.TestCase):
    def test_all_reduce_add_rms_norm_is_two_kernels_and_a_barrier(self) -> None:
        def fn(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
            h = funcol.all_reduce(torch.nn.functional.gelu(x), "sum", world()) + residual
            return torch.nn.functional.rms_norm(h, (64,), weight), h

        x, weight = torch.randn(8, 64), torch.randn(64)
        with config.patch(template=False):
            (norm, h), code = generated(fn, x, x, weight, world_size=3)
        called = calls(code)
        self.assertEqual(called[0], "peer_buffers")
        self.assertEqual(kinds_of(called), ["peer_buffers", "kernel", "barrier_", "peer_sources", "kernel"])
        self.assertNotIn("_c10d_functional", code)
        store, consume = kernels(code)
        self.assertIn("erf", store)
        self.assertEqual(store.count(".store("), 1)
        self.assertNotIn("erf", consume)
        self.assertEqual(len(re.findall(r"loadu\(in_ptr[012] ", consume)), 3)
        # Torch's fake backend has no peers: everybody is taken to hold the same data.
        torch.testing.assert_close(h, 3 * torch.nn.functional.gelu(x) + x)
        torch.testing.assert_close(norm, torch.nn.functional.rms_norm(h, (64,), weight))
        (record,) = symmpatterns.report().rewrites
        self.assertEqual((record.family, record.strategy, record.op), ("peer_all_reduce", "peer_views", "sum"))
        self.assertEqual((record.shape, record.world_size), ((8, 64), 3))

    @parameterized.expand([(2,), (4,)])
    def test_norm_all_gather_is_one_kernel_with_a_store_for_each_rank(self, world_size: int) -> None:
        def fn(x: torch.Tensor, weight: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
            y = torch.nn.functional.rms_norm(x, (64,), weight)
            return funcol.all_gather_tensor(y, 0, world()) @ w2

        x, weight, w2 = torch.randn(8, 64), torch.randn(64), torch.randn(64, 16)
        with config.patch(template=False):
            out, code = generated(fn, x, weight, w2, world_size=world_size)
        called = calls(code)
        self.assertEqual(kinds_of(called), ["peer_buffers", "kernel", "barrier_", "peer_sources", "mm"])
        (kernel,) = kernels(code)
        self.assertEqual(len(set(re.findall(r"\.store\((out_ptr\d+)", kernel))), world_size)
        self.assertEqual(kernel.count("std::sqrt"), 1)
        expected = torch.nn.functional.rms_norm(x, (64,), weight).repeat(world_size, 1) @ w2
        torch.testing.assert_close(out, expected)

    @parameterized.expand([(False,), (True,)])
    def test_gathering_and_scattering_along_another_dimension_copies_nothing(self, dynamic: bool) -> None:
        """The stores and reads go to where the parts belong; the split and cat of functional collectives are gone."""

        def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            y = funcol.all_gather_tensor(x.sin(), 2, world()) @ w
            return funcol.reduce_scatter_tensor(y.tanh(), "sum", 1, world()) + 1

        x, w = torch.randn(3, 8, 32), torch.randn(64, 16)
        with config.patch(template=False):
            out, code = generated(fn, x, w, dynamic=dynamic)
        site = ["kernel", "barrier_", "peer_sources"]
        called = kinds_of(calls(code))
        self.assertEqual(called, ["peer_buffers", *site, "mm", *site, "kernel"])
        self.assertNotIn("cat", "".join(calls(code)))
        self.assertEqual([r.detail for r in symmpatterns.report().rewrites], ["gather:2", "scatter:1"])
        expected = 2 * (x.sin().repeat(1, 1, 2) @ w).tanh()[:, :4] + 1
        torch.testing.assert_close(out, expected)

    def test_parts_that_somebody_else_reads_stay(self) -> None:
        def fn(x: torch.Tensor) -> Any:
            rows = funcol.all_gather_tensor(x.sin(), 0, world())
            parts = rows.chunk(2)
            columns, reverse = torch.cat(parts, 1), torch.cat(parts[::-1], 1)
            cut = torch.cat(columns.chunk(4, 1), 0)
            return columns, reverse, funcol.reduce_scatter_tensor(cut, "sum", 0, world())

        x = torch.randn(4, 8)
        with config.patch(keep_overlap=False):
            (columns, reverse, scattered), _ = generated(fn, x)
        self.assertEqual([r.detail for r in symmpatterns.report().rewrites], ["gather:0", "scatter:0"])
        torch.testing.assert_close(columns, x.sin().repeat(1, 2))
        torch.testing.assert_close(reverse, x.sin().repeat(1, 2))
        torch.testing.assert_close(scattered, 2 * torch.cat(x.sin().repeat(1, 2).chunk(4, 1), 0)[:8])

    def test_given_splits(self) -> None:
        def fn(x: torch.Tensor) -> torch.Tensor:
            return funcol.all_to_all_single(x.sin(), [2, 3], [4, 0], world()) + 1

        out, code = generated(fn, torch.randn(4, 8))
        self.assertEqual(kinds_of(calls(code)), ["peer_buffers", "kernel", "barrier_", "peer_sources", "kernel"])
        self.assertEqual(out.shape, (5, 8))
        self.assertEqual([r.detail for r in symmpatterns.report().rewrites], ["exchange:2"])

    def test_chain_of_collectives_fuses_the_consumer_of_one_with_the_store_of_the_next(self) -> None:
        def fn(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            y = torch.softmax(funcol.all_reduce(x * 2, "sum", world()) + residual, -1)
            return funcol.reduce_scatter_tensor(y * residual, "sum", 0, world()) + 1

        _, code = generated(fn, torch.randn(8, 64), torch.randn(8, 64))
        called = calls(code)
        site = ["kernel", "barrier_", "peer_sources"]
        self.assertEqual(kinds_of(called), ["peer_buffers", *site, *site, "kernel"])

    def test_only_results_that_leave_the_graph_are_copied(self) -> None:
        def fn(x: torch.Tensor) -> Any:
            full = funcol.all_gather_tensor(x + 1, 0, world())
            return full if keep else full.sum()

        for keep in (False, True):
            (out, code) = generated(fn, torch.randn(8, 64))
            body = code[code.index("def call(") :]
            (returned,) = re.findall(r"return \((\w+), \)", body)
            self.assertRegex(body, rf"{returned} = empty_strided_cpu")
            self.assertEqual(out.shape, (16, 64) if keep else ())

    def test_branches_of_a_condition(self) -> None:
        def fn(x: torch.Tensor) -> torch.Tensor:
            def larger(x: torch.Tensor) -> torch.Tensor:
                return funcol.wait_tensor(funcol.all_reduce(x * 2, "sum", world())) + 1

            def smaller(x: torch.Tensor) -> torch.Tensor:
                return funcol.wait_tensor(funcol.broadcast(x.sin(), 1, world())) - 1

            return torch.cond(x.sum() > 0, larger, smaller, (x,))

        out, code = generated(fn, torch.ones(8, 64))
        self.assertEqual(code.count("symmpatterns_barrier_("), 2)
        torch.testing.assert_close(out, torch.full((8, 64), 5.0))  # two ranks that hold the same

    def test_slots_are_never_scratch_memory(self) -> None:
        def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = funcol.all_reduce(torch.softmax(x, -1), "sum", world())
                x = torch.relu(x @ w).sum(-1, keepdim=True) + x
            return x

        with config.patch(template=False):
            _, code = generated(fn, torch.randn(8, 64), torch.randn(64, 64))
        body = code[code.index("def call(") :]
        slots = set(re.findall(r"(buf\d+) = buf\d+\[\d+\]", body))
        self.assertTrue(slots)
        for new, old in re.findall(r"(buf\d+) = (buf\d+); *del \2 *# reuse", body):
            self.assertNotIn(old, slots, f"{new} reuses a slot")

    def test_bfloat16_is_summed_in_float32_and_rounded_once(self) -> None:
        parts = [torch.tensor([1.0], dtype=torch.bfloat16), *[torch.tensor([2.0**-9], dtype=torch.bfloat16)] * 4]
        self.assertEqual(reduce_peers(parts, "sum").item(), 1 + 2.0**-7)
        naive = parts[0] + parts[1] + parts[2] + parts[3] + parts[4]
        self.assertEqual(naive.item(), 1)


class DeclineTest(unittest.TestCase):
    def declined(self, fn: Callable[..., Any], *args: Any, **options: Any) -> str | None:
        out, code = generated(fn, *args, **options)
        self.assertNotIn("peer_buffers", code)
        (record,) = symmpatterns.report().declined
        self.assertTrue(record.reason)
        return record.code

    def test_switched_off(self) -> None:
        with config.patch(peer_views=False):
            code = self.declined(lambda x: funcol.all_reduce(x * 2, "sum", world()) + 1, torch.randn(4, 4))
        self.assertEqual(code, "no_pattern")

    def test_gather_of_a_graph_input(self) -> None:
        def fn(x: torch.Tensor) -> torch.Tensor:
            return funcol.all_gather_tensor(x.to(torch.bfloat16), 0, world()).sum()

        def padded(x: torch.Tensor) -> torch.Tensor:
            return fn(torch.nn.functional.pad(x, (0, 0, 0, 1)))  # which only some ranks do where sizes do not divide

        for each in (fn, padded):
            self.assertEqual(self.declined(each, torch.randn(4, 4)), "graph_input")
            symmpatterns.report().clear()
        with config.patch(force=True):
            self.assertIn("peer_buffers", generated(fn, torch.randn(4, 4))[1])

    def test_hidden_behind_other_work(self) -> None:
        def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
            start = torch.ops._c10d_functional.all_reduce(x * 2, "sum", world().group_name)
            y = w @ w
            return torch.ops._c10d_functional.wait_tensor(start) + y, y

        with config.patch(force=True), inductor_config.patch(reorder_for_locality=False):
            self.assertEqual(self.declined(fn, torch.randn(16, 16), torch.randn(16, 16)), "overlapped")

    @parameterized.expand(
        [
            ("reduction", lambda x: funcol.all_reduce((x * 2).int(), "bor", world()) + 1, "reduce_op"),
            ("integer mean", lambda x: funcol.all_reduce((x * 2).int(), "avg", world()) + 1, "dtype"),
        ]
    )
    def test_what_cannot_be_done(self, _: str, fn: Callable[..., Any], code: str) -> None:
        self.assertEqual(self.declined(fn, torch.randn(4, 4)), code)

    def test_given_splits_on_a_gpu(self) -> None:
        """They are decided on without one: a GPU's host does not know in time what the peers' splits are."""

        def problem(device: str, to_each: list[int], from_each: list[int]) -> Any:
            graph = torch.fx.Graph()
            with FakeTensorMode():
                source = graph.placeholder("x")
                source.meta["val"] = torch.empty(sum(to_each), 4, device=device)
                start = graph.call_function(
                    torch.ops._c10d_functional.all_to_all_single.default, (source, from_each, to_each, "0")
                )
                start.meta["val"] = torch.empty(sum(from_each), 4, device=device)
                graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (start,))
            form = _peer_forms.recognise(start)
            assert form is not None
            return _peer_forms.shape_problem(form, 2)

        self.assertIsNone(problem("cpu", [3, 1], [3, 2]))
        self.assertIsNone(problem("cuda", [3, 3], [3, 3]))
        self.assertEqual(problem("cuda", [3, 1], [3, 2])[0], "uneven")
        self.assertEqual(problem("cpu", [3, 1, 1], [3, 2])[0], "uneven")

    def test_cpp_wrapper(self) -> None:
        with inductor_config.patch(cpp_wrapper=True):
            _, code = generated(lambda x: funcol.all_reduce(x * 2, "sum", world()) + 1, torch.randn(4, 4))
        self.assertNotIn("peer_buffers", code)
        (record,) = symmpatterns.report().declined
        self.assertEqual(record.code, "cpp_wrapper")


class OperatorTest(unittest.TestCase):
    def test_opcheck(self) -> None:
        parts = [torch.randn(3, 4) for _ in range(3)]
        torch.library.opcheck(reduce_peers.default, (parts, "sum"))
        torch.library.opcheck(reduce_peers.default, ([part.t() for part in parts], "sum"))
        torch.library.opcheck(torch.ops.symmpatterns.copy_out.default, (parts[0],))
        torch.library.opcheck(store_.default, (torch.empty(3, 4), parts[0]))
        torch.library.opcheck(store_parts_.default, (torch.empty(3, 12), parts, 1))
        with fake_group(2) as name:
            torch.library.opcheck(barrier_.default, ([torch.empty(3)], name))
            arguments = ("pull float32 2 | gather:0 float32 1", [3, 4, 5], torch.device("cpu"), name)
            torch.library.opcheck(peer_buffers.default, arguments, test_utils=("test_schema", "test_faketensor"))

    @parameterized.expand(
        [
            ("sum", torch.bool, [True, False], True),
            ("product", torch.bool, [True, False], False),
            ("max", torch.int32, [3, 5], 5),
            ("min", torch.int64, [3, 5], 3),
            ("product", torch.int16, [3, 5], 15),
            ("avg", torch.float16, [3, 6], 4.5),
            ("sum", torch.uint8, [200, 100], 44),
        ]
    )
    def test_reductions(self, op: str, dtype: torch.dtype, values: list, expected: Any) -> None:
        parts = [torch.tensor([value], dtype=dtype) for value in values]
        self.assertEqual(reduce_peers(parts, op).item(), expected)

    def test_bad_arguments_are_named(self) -> None:
        with self.assertRaisesRegex(ValueError, "not 'xor'"):
            reduce_peers([torch.ones(2)], "xor")
        with self.assertRaisesRegex(TypeError, "not defined here for torch.int32"):
            reduce_peers([torch.ones(2, dtype=torch.int32)], "avg")
        with fake_group(2) as name:
            with self.assertRaisesRegex(ValueError, "must not be negative"):
                peer_buffers("pull float32 1", [-1], torch.device("cpu"), name)
            with self.assertRaisesRegex(ValueError, "2 were given"):
                peer_buffers("pull float32 1", [1, 2], torch.device("cpu"), name)
        with self.assertRaisesRegex(symmpatterns.SymmetricMemoryError, "init_process_group"):
            peer_buffers("pull float32 1", [1], torch.device("cpu"), "0")
