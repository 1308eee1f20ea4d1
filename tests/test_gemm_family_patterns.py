"""matmul -> reduce-scatter and all-gather -> matmul: graph forms as torch emits them, matched or declined; one process."""

from __future__ import annotations

import unittest

import torch
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import symmpatterns
from symmpatterns import compat
from symmpatterns.testing import compiled_code, fake_group

F = nn.functional


def reduce_scatter(x: Tensor, dim: int, op: str = "sum") -> Tensor:
    return funcol.reduce_scatter_tensor(x, op, dim, torch.distributed.group.WORLD)


def all_gather(x: Tensor, dim: int) -> Tensor:
    return funcol.all_gather_tensor(x, dim, torch.distributed.group.WORLD)


def rs(dim: int, op: str = "sum", bias: bool = False):
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return reduce_scatter(F.linear(x, w.t(), w[0] if bias else None), dim, op) + 1

    return fn


def ag(dim: int, bias: bool = False):
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(all_gather(x, dim), w.t(), w[0] if bias else None) * 2

    return fn


def ag_two(x: Tensor, w: Tensor) -> Tensor:
    full = all_gather(x, 1)
    return F.silu(full @ w) * (full @ (w + 1))


def ag_read_elsewhere(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    full = all_gather(x, 1)
    return full @ w, full.sum(0)


def ag_weight_gradient(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    full = all_gather(x, 0)
    return full @ w, full.t() @ torch.ones(full.shape[0], 3)


def ag_dependent_weight(x: Tensor, w: Tensor) -> Tensor:
    full = all_gather(x, 0)
    first = full @ w
    return full @ first[: w.shape[0]]


def gather_multiply_scatter(x: Tensor, w: Tensor) -> Tensor:
    return reduce_scatter(all_gather(x, 1) @ w, 1)


def rs_after_activation(x: Tensor, w: Tensor) -> Tensor:
    return reduce_scatter(F.relu(x @ w), 0)


def rs_product_read_elsewhere(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return reduce_scatter(y, 0).sum() + y


def ag_right_operand(x: Tensor, w: Tensor) -> Tensor:
    return w @ all_gather(x, 0).t()


def ag_cut_into_smaller_parts(x: Tensor, w: Tensor) -> Tensor:
    full = all_gather(x, 0)
    return torch.cat(full.split(4), 1) @ w.repeat(full.shape[0] // 4, 1)


def rs_reshaped(x: Tensor, w: Tensor) -> Tensor:
    return reduce_scatter((x.view(-1, x.shape[-1]) @ w).view(-1, 2, w.shape[1]), 0)


class GemmFamilyTest(unittest.TestCase):
    def compile(self, fn, *shapes, world_size=2, dtype=torch.float32, **options):
        with fake_group(world_size), inductor_config.patch(fx_graph_cache=False), torch.no_grad():
            with symmpatterns.config.patch(peer_views=False):
                args = [torch.randn(*s).to(dtype) for s in shapes]
                result, code = compiled_code(fn, *args, fullgraph=True, **options)
                expected = fn(*args)
        flat = lambda r: r if isinstance(r, tuple) else (r,)  # noqa: E731
        for actual, wanted in zip(flat(result), flat(expected)):
            self.assertEqual(actual.shape, wanted.shape)
            self.assertEqual(actual.dtype, wanted.dtype)
        return code, symmpatterns.report()

    @parameterized.expand(
        [
            ("2-D rows", rs(0), (8, 16), 2),
            ("2-D columns", rs(1), (8, 16), 2),
            ("3-D first", rs(0), (4, 8, 16), 2),
            ("3-D sequence", rs(1), (3, 8, 16), 2),
            ("3-D sequence, one batch", rs(1), (1, 8, 16), 2),
            ("3-D columns", rs(2), (3, 8, 16), 2),
            ("4-D", rs(2), (2, 3, 8, 16), 2),
            ("negative dim", rs(-2), (3, 8, 16), 2),
            ("bias", rs(0, bias=True), (8, 16), 2),
            ("average", rs(1, "avg"), (3, 8, 16), 2),
            ("three ranks", rs(1), (2, 9, 16), 3),
            ("four ranks", rs(0), (8, 16), 4),
        ]
    )
    def test_reduce_scatter_matches(self, _: str, fn, shape, world_size: int) -> None:
        code, report = self.compile(fn, shape, (16, 24), world_size=world_size)
        self.assertEqual(code.count("torch.ops.symmpatterns.matmul_reduce_scatter.default("), 1)
        self.assertNotIn("_c10d_functional", code)
        self.assertNotIn("extern_kernels.", code)
        (record,) = report.records
        self.assertEqual(
            (record.family, record.collective, record.strategy), ("matmul_reduce_scatter", "reduce_scatter", "template")
        )

    @parameterized.expand(
        [
            ("2-D rows", ag(0), (8, 16), (16, 24), 2),
            ("3-D first", ag(0), (4, 8, 16), (16, 24), 2),
            ("3-D sequence", ag(1), (3, 8, 16), (16, 24), 2),
            ("3-D sequence, one batch", ag(1), (1, 8, 16), (16, 24), 2),
            ("inner dimension", ag(2), (3, 8, 16), (32, 24), 2),
            ("2-D inner dimension", ag(1), (8, 16), (32, 24), 2),
            ("bias", ag(1, bias=True), (3, 8, 16), (16, 24), 2),
            ("two matmuls", ag_two, (3, 8, 16), (16, 24), 2),
            ("three ranks", ag(1), (2, 9, 16), (16, 24), 3),
        ]
    )
    def test_all_gather_matches(self, _: str, fn, x, w, world_size: int) -> None:
        code, report = self.compile(fn, x, w, world_size=world_size)
        self.assertEqual(code.count("torch.ops.symmpatterns.all_gather_matmul.default("), 1)
        self.assertRegex(code, r", False(, biases=.*)?\)")  # nobody reads the gathered tensor, so it is not kept
        self.assertNotIn("_c10d_functional", code)
        self.assertNotIn("extern_kernels.", code)
        (record,) = report.records
        self.assertEqual(
            (record.family, record.collective, record.strategy), ("all_gather_matmul", "all_gather", "template")
        )

    @parameterized.expand([("sum", ag_read_elsewhere, (3, 8, 16)), ("transpose", ag_weight_gradient, (8, 16))])
    def test_gathered_tensor_is_kept_for_other_readers(self, _: str, fn, x) -> None:
        code, report = self.compile(fn, x, (16, 24))
        self.assertEqual(code.count("torch.ops.symmpatterns.all_gather_matmul.default("), 1)
        self.assertRegex(code, r"all_gather_matmul.default\(.*, True\)")
        self.assertNotIn("_c10d_functional", code)
        self.assertEqual(len(report.rewrites), 1)

    def test_a_matmul_whose_weight_depends_on_the_gather_stays(self) -> None:
        code, report = self.compile(ag_dependent_weight, (8, 16), (16, 24))
        self.assertEqual(code.count("torch.ops.symmpatterns.all_gather_matmul.default("), 1)
        self.assertIn("extern_kernels.mm(", code)
        self.assertEqual(len(report.rewrites), 1)

    @parameterized.expand(
        [
            ("reduce-scatter, no inner dimension", rs(1), (2, 4, 0), (0, 24), {}),
            ("all-gather, no columns", ag(1), (2, 4, 16), (16, 0), {}),
            ("every size symbolic", rs_reshaped, (4, 3, 16), (16, 24), {"dynamic": True}),
        ]
    )
    def test_a_size_that_minus_one_cannot_stand_for(self, _: str, fn, x, w, options) -> None:
        _, report = self.compile(fn, x, w, **options)
        self.assertEqual([r.strategy for r in report.records], ["template"])

    @unittest.skipIf(compat.torch_version() < (2, 13), "torch cannot compute sizes in a graph")
    def test_a_collective_that_is_asked_for_its_size(self) -> None:
        def fn(x: Tensor, w: Tensor) -> Tensor:
            partial = DTensor.from_local(x, mesh, [Partial()], run_check=False)
            weight = DTensor.from_local(w, mesh, [Replicate()], run_check=False)
            return torch.matmul(partial, weight).redistribute(mesh, [Shard(0)]).to_local() + 1

        with fake_group(2), inductor_config.patch(fx_graph_cache=False):
            mesh = init_device_mesh("cpu", (2,))
            compiled_code(fn, torch.randn(8, 6), torch.randn(6, 4), fullgraph=True, dynamic=True)
        self.assertEqual([r.family for r in symmpatterns.report().records], ["matmul_reduce_scatter"])

    def test_gather_multiply_scatter(self) -> None:
        code, report = self.compile(gather_multiply_scatter, (3, 8, 16), (16, 24))
        self.assertIn("matmul_reduce_scatter", code)
        self.assertEqual([r.family for r in report.rewrites], ["matmul_reduce_scatter"])
        self.assertEqual(len(report.declined), 1)

    def test_dynamic_shapes_compile_once(self) -> None:
        for fn, shape in ((rs(1), lambda m: (2, 2 * m, 16)), (ag(1), lambda m: (2, m, 16))):
            torch._dynamo.reset()
            symmpatterns.report().clear()
            with fake_group(2), inductor_config.patch(fx_graph_cache=False), torch.no_grad():
                compiled = torch.compile(fn, fullgraph=True, dynamic=True)
                for m in (3, 8, 5):
                    x, w = torch.randn(*shape(m)), torch.randn(16, 24)
                    self.assertEqual(compiled(x, w).shape, fn(x, w).shape)
            self.assertEqual(len(symmpatterns.report().rewrites), 1)

    @parameterized.expand(
        [
            ("activation", rs_after_activation, "no_pattern"),
            ("other users", rs_product_read_elsewhere, "producer_has_other_users"),
            ("other reduction", rs(0, "max"), "reduce_op"),
            ("right operand", ag_right_operand, "no_pattern"),
            ("other parts than shards", ag_cut_into_smaller_parts, "no_pattern"),
        ]
    )
    def test_declines(self, _: str, fn, code: str) -> None:
        source, report = self.compile(fn, (8, 16), (16, 16))
        self.assertNotIn("torch.ops.symmpatterns", source)
        self.assertEqual([r.code for r in report.declined], [code])

    def test_declines_dtype(self) -> None:
        for fn in (rs(0), ag(0)):
            symmpatterns.report().clear()
            _, report = self.compile(fn, (8, 16), (16, 16), dtype=torch.float64)
            self.assertEqual([r.code for r in report.declined], ["dtype"])
