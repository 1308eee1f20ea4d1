"""Graphs as vLLM compiles them: its own collectives, its own names of groups, and its own way of taking a pass.

vLLM itself is not needed: operators of the same schemas are registered here.
"""

from __future__ import annotations

import re
import sys
import types
import unittest
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass

import symmpatterns
from symmpatterns.groups import resolve_name
from symmpatterns.testing import compiled_code, fake_group, run_ranks

_library = torch.library.Library("vllm", "FRAGMENT")
_groups: dict[str, Any] = {}  # what vLLM keeps in vllm.distributed.parallel_state


def all_reduce(tensor: Tensor, group_name: str) -> Tensor:
    return funcol.all_reduce(tensor, "sum", _groups[group_name]).clone()


def reduce_scatter(tensor: Tensor, dim: int, world_size: int, group_name: str) -> Tensor:
    return funcol.reduce_scatter_tensor(tensor, "sum", dim % tensor.ndim, _groups[group_name]).clone()


def all_gather(tensor: Tensor, dim: int, world_size: int, group_name: str) -> Tensor:
    return funcol.all_gather_tensor(tensor, dim % tensor.ndim, _groups[group_name]).clone()


def _resized(tensor: Tensor, dim: int, size: Any) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.new_empty(shape)


def _register() -> None:
    if hasattr(torch.ops.vllm, "all_reduce"):  # vLLM is installed and was imported by somebody
        return
    _library.define("all_reduce(Tensor tensor, str group_name) -> Tensor")
    for name in ("reduce_scatter", "all_gather"):
        _library.define(f"{name}(Tensor tensor, int dim, int world_size, str group_name) -> Tensor")
    for implementation in (all_reduce, reduce_scatter, all_gather):
        _library.impl(implementation.__name__, implementation, "CompositeExplicitAutograd")
    fake = torch.library.register_fake
    fake("vllm::all_reduce", lambda tensor, group_name: torch.empty_like(tensor), lib=_library)
    fake("vllm::reduce_scatter", lambda x, dim, w, name: _resized(x, dim, x.shape[dim] // w), lib=_library)
    fake("vllm::all_gather", lambda x, dim, w, name: _resized(x, dim, x.shape[dim] * w), lib=_library)


_register()
vllm = torch.ops.vllm
_norms = torch.library.Library("vllm_ir", "FRAGMENT")


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    row = x.float()[..., :variance_size]
    norm = x.float() * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + epsilon)
    return (norm if weight is None else norm * weight).to(x.dtype)


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    return rms_norm(x + x_residual, weight, epsilon, variance_size), x + x_residual


def _register_norms() -> None:
    if hasattr(torch.ops.vllm_ir, "rms_norm"):
        return
    options = "Tensor? weight, float epsilon, int? variance_size=None"
    two = f"(Tensor x, Tensor x_residual, {options}) -> (Tensor, Tensor)"
    _norms.define(f"rms_norm(Tensor x, {options}) -> Tensor")
    _norms.define(f"fused_add_rms_norm{two}")
    _norms.define(f"fused_add_rms_norm.maybe_inplace{two}")
    for implementation in (rms_norm, fused_add_rms_norm):
        _norms.impl(implementation.__name__, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake("vllm_ir::rms_norm", lambda x, *_: torch.empty_like(x), lib=_norms)
    fake = torch.library.register_fake
    fake("vllm_ir::fused_add_rms_norm", lambda x, *_: (torch.empty_like(x), torch.empty_like(x)), lib=_norms)


_register_norms()
ir = torch.ops.vllm_ir


def layer(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Attention-like and MLP-like halves, the first with an all-reduce, the second sequence-parallel."""
    x = x + vllm.all_reduce(torch.tanh(x @ w1) @ w1.t(), "tp:0")
    part = vllm.reduce_scatter(x @ w2, 0, 2, "tp:0")
    return vllm.all_gather(torch.nn.functional.rms_norm(part, (part.shape[-1],)), 0, 2, "tp:0") @ w2.t()


def other_forms(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (
        vllm.all_reduce(torch.relu(x), "tp:0") + 1,
        vllm.reduce_scatter(x @ w, -1, 2, "tp:0") * 2,
        vllm.all_gather(torch.exp(x), -1, 2, "tp:0"),
        vllm.all_gather(x + 1, 1, 2, "tp:0") @ torch.cat([w, w]),
    )


def _run(rank: int, world_size: int) -> dict[str, Any]:
    group = dist.new_group([0, 1])
    _groups["tp:0"] = group
    symmpatterns.register_group_name("tp:0", group)
    torch.manual_seed(rank)
    x, w1, w2 = torch.randn(8, 16), torch.randn(16, 16), torch.randn(16, 16)
    answer: dict[str, Any] = {"group": group.group_name}
    for name, fn, arguments in (("layer", layer, (x, w1, w2)), ("other forms", other_forms, (x, w1))):
        symmpatterns.report().clear()
        compiled = torch.compile(fn, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(*arguments), fn(*arguments), rtol=1e-4, atol=1e-4)
        report = symmpatterns.report()
        answer[name] = sorted((r.collective, r.family, r.group_name) for r in report.rewrites)
        answer[f"{name} declined"] = [str(r) for r in report.declined]
    return answer


class VllmOperatorsTest(unittest.TestCase):
    @pytest.mark.slow
    def test_ranks(self) -> None:
        for result in run_ranks(_run, 2):
            group = result["group"]
            wanted = [
                ("all_gather", "all_gather_matmul", group),
                ("all_reduce", "matmul_all_reduce", group),
                ("reduce_scatter", "matmul_reduce_scatter", group),
            ]
            self.assertEqual(result["layer"], wanted)
            self.assertEqual(result["layer declined"], [])
            wanted = [
                ("all_gather", "all_gather_matmul", group),
                ("all_gather", "peer_all_gather", group),
                ("all_reduce", "peer_all_reduce", group),
                ("reduce_scatter", "matmul_reduce_scatter", group),
            ]
            self.assertEqual(result["other forms"], wanted)
            self.assertEqual(result["other forms declined"], [])

    def compile(self, fn: Any, *arguments: Tensor) -> str:
        with torch._inductor.config.patch(fx_graph_cache=False):
            return compiled_code(fn, *arguments)[1]

    def test_what_is_declined_is_put_back(self) -> None:
        def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            return (
                vllm.all_reduce(x @ w, group_name),
                vllm.reduce_scatter(x @ w, 1, 2, group_name),
                vllm.all_gather(x * 2, 1, 2, group_name),
            )

        with fake_group(2) as group_name, symmpatterns.config.patch(template=False, peer_views=False):
            _groups[group_name] = dist.group.WORLD
            code = self.compile(fn, torch.randn(8, 16), torch.randn(16, 16))
        for name in ("all_reduce", "reduce_scatter", "all_gather"):
            self.assertEqual(code.count(f"torch.ops.vllm.{name}.default("), 1, code)
        self.assertNotIn("_c10d_functional", code)
        self.assertEqual([r.code for r in symmpatterns.report().declined], ["no_pattern"] * 3)

    def test_a_name_that_nobody_explained_is_left_alone(self) -> None:
        with fake_group(2):
            _groups["ep:0"] = dist.group.WORLD
            code = self.compile(lambda x, w: vllm.all_reduce(x @ w, "ep:0"), torch.randn(8, 16), torch.randn(16, 16))
        self.assertIn("torch.ops.vllm.all_reduce.default(", code)
        (record,) = symmpatterns.report().declined
        self.assertEqual((record.code, record.collective, record.group_name), ("unknown_group", "all_reduce", "ep:0"))
        self.assertIn("symmpatterns.register_group_name('ep:0', group)", record.reason)

    def test_bad_names(self) -> None:
        with fake_group(2):
            with self.assertRaisesRegex(TypeError, "a group's name is a text, not int"):
                symmpatterns.register_group_name(3, dist.group.WORLD)  # type: ignore[arg-type]
            with self.assertRaisesRegex(symmpatterns.SymmetricMemoryError, "no process group named 'nobody'"):
                symmpatterns.register_group_name("tp:7", "nobody")


def added_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return ir.fused_add_rms_norm(vllm.all_reduce(x.tanh(), "tp:0"), residual, w, 1e-5)


def plain_norms(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = vllm.all_reduce(x.tanh(), "tp:0")
    return ir.rms_norm(total, w, 1e-5), ir.rms_norm(total, None, 1e-6), total


def norm_only(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    return ir.fused_add_rms_norm(vllm.all_reduce(x.tanh(), "tp:0"), residual, None, 1e-5)[0]


def of_a_part(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return ir.fused_add_rms_norm(vllm.all_reduce(x.tanh(), "tp:0"), residual, w, 1e-5, 8)


def of_itself(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = vllm.all_reduce(x.tanh(), "tp:0")
    return ir.fused_add_rms_norm(total, total, w, 1e-5)


def of_another_dtype(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    return ir.rms_norm(vllm.all_reduce(x.tanh(), "tp:0"), w.double(), 1e-5)


class VllmNormsTest(unittest.TestCase):
    """Norms are operators of vLLM's where our pass sees them."""

    def compile(self, fn: Any) -> str:
        with fake_group(2), torch._inductor.config.patch(fx_graph_cache=False):
            _groups["tp:0"] = dist.group.WORLD
            symmpatterns.register_group_name("tp:0", dist.group.WORLD)
            return compiled_code(fn, torch.randn(4, 16), torch.randn(4, 16), torch.randn(16))[1]

    @parameterized.expand([(fn.__name__, fn) for fn in (added_norm, plain_norms, norm_only)])
    def test_is_fused_with_the_all_reduce(self, _: str, fn: Any) -> None:
        code = self.compile(fn)
        (record,) = symmpatterns.report().rewrites
        self.assertEqual((record.family, record.strategy), ("all_reduce_rms_norm", "template"))
        self.assertEqual(code.count("torch.ops.symmpatterns.all_reduce_rms_norm.default("), 1)
        self.assertEqual(code.count("= torch.ops.vllm_ir."), fn is plain_norms)  # one kernel has one norm

    @parameterized.expand([(fn.__name__, fn) for fn in (of_a_part, of_itself, of_another_dtype)])
    def test_stays_an_operator(self, _: str, fn: Any) -> None:
        code = self.compile(fn)
        (record,) = symmpatterns.report().rewrites
        self.assertEqual(record.family, "peer_all_reduce")
        self.assertEqual(code.count("= torch.ops.vllm_ir."), 1)

    def test_what_vllm_may_overwrite_is_no_slot(self) -> None:
        """It chooses implementations behind our pass, and some write to their inputs."""

        def in_place(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            return ir.fused_add_rms_norm(vllm.all_gather(x.tanh(), 0, 2, "tp:0"), torch.cat([x, x]), w, 1e-5)

        def anew(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
            return ir.rms_norm(vllm.all_gather(x.tanh(), 0, 2, "tp:0"), w, 1e-5)

        read = r"vllm_ir\.\w+\.default\((\w+),"
        for fn, is_copied in ((in_place, True), (anew, False)):
            code = self.compile(fn)
            (argument,) = re.findall(read, code)
            self.assertEqual(f"{argument} = empty_strided_cpu(" in code, is_copied)


class VllmHostTest(unittest.TestCase):
    """What vLLM does with ``inductor_passes={"post_grad_custom_post_pass": "symmpatterns.post_grad_pass"}``."""

    def setUp(self) -> None:
        for name in ("vllm", "vllm.distributed", "vllm.compilation"):
            self.put(name)

    def put(self, name: str, **contents: Any) -> None:
        module = types.ModuleType(name)
        vars(module).update(contents)
        before = sys.modules.get(name)
        sys.modules[name] = module
        self.addCleanup(lambda: sys.modules.pop(name) if before is None else sys.modules.update({name: before}))

    def test_names_of_a_loaded_vllm_are_known(self) -> None:
        coordinator = types.SimpleNamespace()
        registered = {"tp:0": lambda: coordinator, "gone:0": lambda: None}
        self.put("vllm.distributed.parallel_state", _groups=registered)
        with fake_group(2) as name:
            coordinator.device_group = dist.group.WORLD
            before = symmpatterns.post_grad_pass.uuid()
            self.assertEqual(resolve_name("tp:0"), name)
            with self.assertRaisesRegex(symmpatterns.SymmetricMemoryError, "register_group_name"):
                resolve_name("gone:0")
            registered["other:0"] = lambda: coordinator
            self.assertNotEqual(before, symmpatterns.post_grad_pass.uuid())

    def test_the_pass_is_taken_with_its_own_identity(self) -> None:
        class InductorPass(CustomGraphPass):
            pass

        self.put("vllm.compilation.inductor_pass", InductorPass=InductorPass)
        by_name = __import__("symmpatterns").__dict__["post_grad_pass"]
        self.assertIsInstance(by_name, InductorPass)
        self.assertTrue(by_name.is_applicable_for_range(range(1, 8)))
