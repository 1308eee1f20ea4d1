"""matmul -> all-reduce: which graphs are rewritten and which are declined, and with what reason; traced in one process."""

from __future__ import annotations

import os
import unittest
from unittest import mock

import torch
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import symmpatterns
from symmpatterns import patterns
from symmpatterns.patterns._vocabulary import hidden_work
from symmpatterns.testing import compiled_code, fake_group

OPERATOR = "torch.ops.symmpatterns.matmul_all_reduce.default("
F = nn.functional


def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    return funcol.all_reduce(x, op, torch.distributed.group.WORLD)


def mm(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(x @ w) + 1


def linear(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(F.linear(x, w.t().contiguous())) * 2


def linear_bias(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(F.linear(x, w.t(), w[0]))


def transposed_weight(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(x @ w.t().clone().t())


def flattened_result(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce((x @ w).reshape(-1)).relu()


def several_readers(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = all_reduce(x @ w)
    return y + 1, y.sum(-1)


def result_is_output(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(x @ w)


def twice(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(all_reduce(x @ w) @ w.t())


def other_reduction(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(x @ w, "max")


def average(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(x @ w, "avg")


def product_read_elsewhere(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return all_reduce(y) + y


def activation_between(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(F.relu(x @ w))


def chunks(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(torch.cat(torch.split(x @ w, 8, 1)))


def integers(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(torch._int_mm(x.to(torch.int8), w.to(torch.int8))) + 1


def graph_input(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(x)


def scaled_bias(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(torch.addmm(w[0], x, w, beta=0.5))


def matrix_bias(x: Tensor, w: Tensor) -> Tensor:
    return all_reduce(torch.addmm(x @ w * 2, x, w))


def work_before_the_wait(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    name = torch.distributed.group.WORLD.group_name
    start = torch.ops._c10d_functional.all_reduce(x @ w, "sum", name)
    hidden = torch.relu(x + 1) @ w
    return torch.ops._c10d_functional.wait_tensor(start).relu(), hidden


class MatmulAllReducePatternTest(unittest.TestCase):
    def compile(self, fn, *shapes, dtype=torch.float32, world_size=2, **options):
        with fake_group(world_size), inductor_config.patch(fx_graph_cache=False), torch.no_grad():
            # Without peer views a graph that the template declines stays as it was.
            with symmpatterns.config.patch(peer_views=False):
                args = [torch.randn(*s).to(dtype) for s in shapes]
                result, code = compiled_code(fn, *args, fullgraph=True, **options)
                expected = fn(*args)
        flat = lambda r: r if isinstance(r, tuple) else (r,)  # noqa: E731
        for actual, wanted in zip(flat(result), flat(expected)):
            torch.testing.assert_close(actual, wanted)
        return code, symmpatterns.report()

    @parameterized.expand(
        [
            ("mm", mm, (8, 16), (16, 24)),
            ("linear 2-D", linear, (8, 16), (16, 24)),
            ("linear 3-D", linear, (2, 4, 16), (16, 24)),
            ("linear 4-D", linear, (2, 2, 3, 16), (16, 24)),
            ("bias", linear_bias, (8, 16), (16, 16)),
            ("bias 3-D", linear_bias, (2, 8, 16), (16, 16)),
            ("transposed weight", transposed_weight, (8, 16), (16, 24)),
            ("reshaped result", flattened_result, (8, 16), (16, 24)),
            ("several readers", several_readers, (8, 16), (16, 24)),
            ("result leaves the graph", result_is_output, (8, 16), (16, 24)),
            ("one row", mm, (1, 16), (16, 24)),
            ("ragged", mm, (7, 13), (13, 5)),
        ]
    )
    def test_matches(self, _: str, fn, *shapes) -> None:
        code, report = self.compile(fn, *shapes)
        self.assertEqual(code.count(OPERATOR), 1)
        self.assertNotIn("_c10d_functional.all_reduce", code)
        self.assertNotIn("extern_kernels.", code)
        self.assertEqual(len(report.declined), 0)
        (record,) = report.rewrites
        self.assertEqual(
            (record.family, record.collective, record.strategy, record.op, record.world_size, record.code),
            ("matmul_all_reduce", "all_reduce", "template", "sum", 2, None),
        )
        self.assertEqual(record.dtype, torch.float32)
        self.assertEqual(record.replacement, "symmpatterns.matmul_all_reduce")

    @parameterized.expand([(torch.bfloat16,), (torch.float16,)])
    def test_matches_dtype(self, dtype: torch.dtype) -> None:
        code, report = self.compile(mm, (8, 16), (16, 24), dtype=dtype)
        self.assertEqual(code.count(OPERATOR), 1)
        self.assertEqual(report.rewrites[0].dtype, dtype)

    def test_matches_two_in_a_row(self) -> None:
        code, report = self.compile(twice, (8, 16), (16, 24))
        self.assertEqual(code.count(OPERATOR), 2)
        self.assertEqual([r.shape for r in report.rewrites], [(8, 24), (8, 16)])

    def test_matches_the_in_place_collective(self) -> None:
        # Functionalisation refuses it in a traced program, but other passes put it into graphs.
        class InPlace(CustomGraphPass):
            def __call__(self, graph: torch.fx.Graph) -> None:
                for node in graph.nodes:
                    if node.target is torch.ops._c10d_functional.all_reduce.default:
                        node.target = torch.ops._c10d_functional.all_reduce_.default

            def uuid(self) -> str:
                return "in-place"

        symmpatterns.uninstall()
        with inductor_config.patch(post_grad_custom_post_pass=InPlace()):
            symmpatterns.install()
            code, report = self.compile(mm, (8, 16), (16, 24))
        self.assertEqual(code.count(OPERATOR), 1)
        self.assertNotIn("all_reduce_", code)
        self.assertEqual(len(report.rewrites), 1)

    def test_matches_dynamic_shapes(self) -> None:
        with fake_group(2), inductor_config.patch(fx_graph_cache=False), torch.no_grad():
            compiled = torch.compile(linear, fullgraph=True, dynamic=True)
            for m in (3, 8, 5):
                x, w = torch.randn(2, m, 16), torch.randn(16, 24)
                torch.testing.assert_close(compiled(x, w), linear(x, w))
        (record,) = symmpatterns.report().rewrites  # one compilation for every size
        self.assertTrue(any(isinstance(s, str) for s in record.shape), record.shape)

    @parameterized.expand(
        [
            ("max", other_reduction, "reduce_op", '"sum" or "avg", not with "max"'),
            ("other users", product_read_elsewhere, "producer_has_other_users", "mm is read by all_reduce, add"),
            ("activation", activation_between, "no_pattern", "after aten.relu"),
            ("graph input", graph_input, "no_pattern", "after graph input"),
            ("scaled bias", scaled_bias, "scaled_addmm", "alpha or beta"),
            ("matrix bias", matrix_bias, "bias_form", "bias of one row"),
            ("chunks", chunks, "chunks", "cut into chunks and put together again"),
        ]
    )
    def test_declines(self, _: str, fn, code: str, reason: str) -> None:
        source, report = self.compile(fn, (8, 16), (16, 16))
        self.assertNotIn("symmpatterns.matmul_all_reduce", source)
        self.assertIn("_c10d_functional.all_reduce", source)
        self.assertEqual(report.rewrites, [])
        (record,) = report.declined
        self.assertEqual(record.code, code)
        self.assertIn(reason, record.reason)
        self.assertIn(code, str(report))

    def test_matches_an_average(self) -> None:
        code, report = self.compile(average, (8, 16), (16, 24))
        self.assertEqual(code.count(OPERATOR), 1)
        self.assertIn("'avg'", code)
        self.assertEqual(report.rewrites[0].op, "avg")

    def test_the_matmul_is_the_producer_whatever_stands_behind_it(self) -> None:
        _, report = self.compile(lambda x, w: all_reduce((x @ w).t().contiguous()), (8, 16), (16, 24))
        self.assertEqual(report.rewrites[0].producer, "aten.mm")

    def test_no_pattern_names_the_switches_that_are_off(self) -> None:
        _, report = self.compile(activation_between, (8, 16), (16, 16))
        self.assertIn("after aten.relu; switched off: config.peer_views", report.declined[0].reason)
        report.clear()
        with symmpatterns.config.patch(template=False, allocation=False):
            _, report = self.compile(mm, (8, 16), (16, 16))
        self.assertIn("switched off: config.template, config.peer_views, config.allocation", report.declined[0].reason)

    def test_what_kept_a_template_from_it_is_a_detail_of_peer_views(self) -> None:
        with fake_group(2), inductor_config.patch(fx_graph_cache=False), torch.no_grad():
            with symmpatterns.config.patch(force=True):
                compiled_code(integers, torch.ones(32, 32), torch.ones(32, 32))
        (record,) = symmpatterns.report().rewrites
        self.assertEqual(record.strategy, "peer_views")
        self.assertRegex(record.detail, "^pu(sh|ll); no template: dtype: aten._int_mm multiplies integers")

    def test_the_last_reason_decides_and_the_others_are_told(self) -> None:
        with fake_group(2), inductor_config.patch(fx_graph_cache=False, cpp_wrapper=True), torch.no_grad():
            compiled_code(other_reduction, torch.ones(8, 16), torch.ones(16, 16))
        (record,) = symmpatterns.report().declined
        self.assertEqual((record.family, record.code), ("peer_all_reduce", "cpp_wrapper"))
        self.assertRegex(record.reason, "without Python.*; matmul_all_reduce: reduce_op: the kernel reduces with")

    @parameterized.expand([("several hosts", False, "several_hosts"), ("nobody says", None, "unknown_topology")])
    def test_declines_by_topology(self, _: str, one_host: bool | None, code: str) -> None:
        with mock.patch("symmpatterns.patterns._rewriting.shares_one_host", return_value=one_host):
            _, report = self.compile(mm, (8, 16), (16, 16))
        self.assertEqual([r.code for r in report.declined], [code])

    def test_declines_an_overlapped_collective(self) -> None:
        # Inference graphs are reordered so that a wait follows its start; then there is nothing to keep.
        with inductor_config.patch(reorder_for_locality=False):
            source, report = self.compile(work_before_the_wait, (8, 16), (16, 16))
            self.assertNotIn("symmpatterns", source)
            self.assertEqual(report.declined[0].code, "overlapped")
            self.assertIn("aten.mm", report.declined[0].reason)
            symmpatterns.report().clear()
            with symmpatterns.config.patch(keep_overlap=False):
                source, report = self.compile(work_before_the_wait, (8, 16), (16, 16))
        self.assertEqual(len(report.rewrites), 1)

    def test_declines_dtype(self) -> None:
        source, report = self.compile(mm, (8, 16), (16, 16), dtype=torch.float64)
        self.assertNotIn("symmpatterns", source)
        self.assertEqual(report.declined[0].code, "dtype")

    def test_declines_a_group_of_one(self) -> None:
        _, report = self.compile(mm, (8, 16), (16, 16), world_size=1)
        self.assertEqual([r.code for r in report.declined], ["single_rank"])

    def test_declines_by_cost_unless_forced(self) -> None:
        from symmpatterns import cost_model

        slow = mock.patch.object(
            cost_model, "matmul_collective", lambda *a: cost_model.Verdict(False, "slower on this machine")
        )
        with slow:
            _, report = self.compile(mm, (8, 16), (16, 16))
            self.assertEqual(
                (report.declined[0].code, report.declined[0].reason), ("cost_model", "slower on this machine")
            )
            symmpatterns.report().clear()
            with symmpatterns.config.patch(force=True):
                code, report = self.compile(mm, (8, 16), (16, 16))
        self.assertIn(OPERATOR, code)
        self.assertEqual(len(report.rewrites), 1)

    def test_switched_off(self) -> None:
        with symmpatterns.config.patch(template=False):
            code, report = self.compile(mm, (8, 16), (16, 16))
        self.assertNotIn("symmpatterns", code)
        self.assertEqual(len(report.declined), 1)

    @parameterized.expand(
        [
            ("two nodes", {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}, False),
            ("one node", {"LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}, True),
            ("loopback", {"LOCAL_WORLD_SIZE": "", "MASTER_ADDR": "127.0.0.1"}, True),
            ("nobody says", {"LOCAL_WORLD_SIZE": "", "MASTER_ADDR": "192.0.2.1"}, None),
        ]
    )
    def test_who_shares_a_host(self, _: str, env: dict, expected: bool | None) -> None:
        from symmpatterns import groups

        with fake_group(4), mock.patch.dict(os.environ, env):
            group = groups.get_group(None)
            group.is_fake = False
            self.assertEqual(groups.shares_one_host(group), expected)

    def test_report_clears_and_reads_well(self) -> None:
        _, report = self.compile(mm, (8, 16), (16, 16))
        text = str(report)
        self.assertIn("1 collectives rewritten, 0 declined", text)
        self.assertIn("8x16", text)
        report.clear()
        self.assertEqual(symmpatterns.report().records, [])

    def test_counters(self) -> None:
        torch._dynamo.utils.counters.clear()
        self.compile(mm, (8, 16), (16, 16))
        counters = torch._dynamo.utils.counters["symmpatterns"]
        self.assertEqual(counters["rewritten"], 1)
        self.assertEqual(counters["template.matmul_all_reduce"], 1)


c10d = torch.ops._c10d_functional


class GraphsOfOtherPassesTest(unittest.TestCase):
    """Graphs that no program is traced to, written by hand: what another pass may leave."""

    def code(self, build, device: str = "cpu", inner: torch.nn.Module | None = None) -> str | None:
        """The code with which the one collective of ``build(graph, x)`` is declined; x is a matrix."""
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        with FakeTensorMode(), symmpatterns.config.patch(force=True), fake_group(2):
            x.meta["val"] = torch.empty(8, 8, device=device)
            graph.output(build(graph, x))
            # As after tracing: each node has its value, unless `build` has put something in its place.
            for node in graph.nodes:
                if node.op == "call_function" and "val" not in node.meta:
                    node.meta["val"] = torch.empty(8, 8, device=device)
            module = torch.fx.GraphModule({}, graph)
            if inner is not None:
                module.add_module("inner", inner)
            patterns.rewrite(module.graph)
        (record,) = symmpatterns.report().records
        self.assertEqual(record.code is None, not record.reason)
        return record.code

    def reduced(self, graph, x, target=c10d.all_reduce.default, group="0"):
        start = graph.call_function(target, (x, "sum", group))
        return graph.call_function(c10d.wait_tensor.default, (start,))

    def test_no_metadata(self) -> None:
        def build(graph, x):
            y = graph.call_function(torch.ops.aten.relu.default, (x,))
            y.meta["val"] = None
            return self.reduced(graph, y)

        self.assertEqual(self.code(build), "no_metadata")

    def test_collective_has_other_users(self) -> None:
        def build(graph, x):
            wait = self.reduced(graph, graph.call_function(torch.ops.aten.mm.default, (x, x)))
            return wait, wait.args[0]

        self.assertEqual(self.code(build), "collective_has_other_users")

    def test_gathers_in_code_that_python_does_not_call(self) -> None:
        def build(graph, x):
            start = graph.call_function(c10d.all_gather_into_tensor.default, (x, 2, "0"))
            whole = graph.call_function(c10d.wait_tensor.default, (start,))
            for node in (start, whole):
                node.meta["val"] = torch.empty(16, 8)
            product = graph.call_function(torch.ops.aten.mm.default, (whole, x))
            product.meta["val"] = torch.empty(16, 8)
            return product

        self.assertIsNone(self.code(build))
        symmpatterns.report().clear()
        with inductor_config.patch(cpp_wrapper=True):
            self.assertEqual(self.code(build), "cpp_wrapper")
            symmpatterns.report().clear()
            with V.set_aot_compilation(True):
                self.assertIsNone(self.code(build))

    def test_group_not_a_name(self) -> None:
        self.assertEqual(self.code(lambda graph, x: self.reduced(graph, x, group=7)), "group_not_a_name")

    def test_unsupported_form(self) -> None:
        self.assertEqual(self.code(lambda g, x: self.reduced(g, x, c10d.all_reduce_.default)), "unsupported_form")

    def test_no_peer_access(self) -> None:
        with mock.patch("symmpatterns.patterns._rewriting._all_peers_accessible", return_value=False):
            self.assertEqual(self.code(self.reduced, device="cuda"), "no_peer_access")

    def test_nested_graph(self) -> None:
        inner = torch.fx.Graph()
        barrier = torch.ops.symmpatterns.barrier_.default
        inner.output(inner.call_function(barrier, ([inner.placeholder("x")], "0")))
        self.assertEqual(self.code(self.reduced, inner=torch.fx.GraphModule({}, inner)), "nested_graph")

    def test_unbacked_shape(self) -> None:
        def build(graph, x):
            shapes = ShapeEnv()
            y = graph.call_function(torch.ops.aten.relu.default, (x,))
            with FakeTensorMode(shape_env=shapes):
                y.meta["val"] = torch.empty(shapes.create_unbacked_symint(), 8)
            return self.reduced(graph, y)

        self.assertEqual(self.code(build), "unbacked_shape")

    def test_only_a_matmul_hides_a_collective_of_whatever_size(self) -> None:
        """Ranks may have other work of different sizes, and have to decide alike."""

        def between(work: torch._ops.OpOverload) -> str | None:
            graph = torch.fx.Graph()
            x = graph.placeholder("x")
            start = graph.call_function(c10d.all_reduce.default, (x, "sum", "0"))
            node = graph.call_function(work, (x, x))
            wait = graph.call_function(c10d.wait_tensor.default, (start,))
            for each, size in ((x, 8), (start, 8), (node, 8192), (wait, 8)):
                each.meta["val"] = torch.empty(size, 8, device="meta")
            return hidden_work(start, wait)

        self.assertIsNone(between(torch.ops.aten.mul.Tensor))
        self.assertIsNone(between(torch.ops.aten.sort.default))
        self.assertEqual(between(torch.ops.aten.mm.default), "aten.mm (mm_default)")
