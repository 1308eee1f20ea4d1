"""Declarations: every spelling, what is refused, and what a compiled function records of them."""

from __future__ import annotations

import contextlib
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch.fx import Graph

import symmpatterns
from symmpatterns import compat, declare, library
from symmpatterns.declare import Requirement, requirement_of, requires_symmetric_memory, specify_symmetric_memory
from symmpatterns.patterns._declared import call_of, is_marker

_lib = torch.library.Library("declare_test", "DEF")
_lib.define("collective(Tensor x, str group_name) -> Tensor")
_lib.define("collective.out(Tensor x, str group_name, *, Tensor(a!) out) -> Tensor(a!)")
_lib.define("many(Tensor[] xs, Tensor? y, int n, str group='0') -> Tensor")
_lib.define("no_group(Tensor x, Tensor y) -> Tensor")
_lib.define("odd(Tensor x, str where, int n) -> Tensor")
ops: Any = torch.ops.declare_test


@torch.library.custom_op("declare_test::custom", mutates_args=())
def custom(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return x * 2


@custom.register_fake
def _(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return torch.empty_like(x)


custom.register_autograd(lambda ctx, gradient: (gradient * 2, None))
# The Dynamo of torch 2.11 takes an operator or its name for a constant, and not the object that custom_op returns.
in_graphs: Any = custom if compat.torch_version() >= (2, 13) else ops.custom


@pytest.fixture(autouse=True)
def no_declarations() -> Iterator[None]:
    with fresh():
        yield


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    before = dict(declare._declarations)
    declare._declarations.clear()
    declare._contradictions.clear()
    declare._resolved.clear()
    yield
    declare._declarations.clear()
    declare._contradictions.clear()
    declare._declarations.update(before)
    declare._resolved.clear()


class SpellingTest(unittest.TestCase):
    @parameterized.expand(
        [
            ("overload", lambda: ops.collective.default),
            ("packet", lambda: ops.collective),
            ("name", lambda: "declare_test::collective"),
            ("name of an overload", lambda: "declare_test::collective.default"),
        ]
    )
    def test_operator(self, _: str, op: Any) -> None:
        for given in (0, "x", ["x"], (0,)):
            with fresh():
                requires_symmetric_memory(op(), given)
                self.assertEqual(requirement_of(ops.collective.default), Requirement(("x",), "group_name", None))
                self.assertIsNone(requirement_of(ops.no_group.default))

    def test_custom_op_object(self) -> None:
        requires_symmetric_memory(custom)
        self.assertEqual(requirement_of(ops.custom.default), Requirement(("x",), "group_name", None))

    def test_all_overloads_of_a_packet_and_one_of_an_overload(self) -> None:
        declaration = requires_symmetric_memory(ops.collective)
        self.assertIsNotNone(requirement_of(ops.collective.out))
        declaration.remove()
        requires_symmetric_memory(ops.collective.default)
        self.assertIsNone(requirement_of(ops.collective.out))

    def test_an_argument_that_only_one_overload_has(self) -> None:
        requires_symmetric_memory(ops.collective, "out")
        self.assertIsNone(requirement_of(ops.collective.default))
        self.assertEqual(requirement_of(ops.collective.out), Requirement(("out",), "group_name", None))

    def test_lists_optional_tensors_and_several_inputs(self) -> None:
        requires_symmetric_memory(ops.many, ["xs", 1])
        self.assertEqual(requirement_of(ops.many.default), Requirement(("xs", "y"), "group", None))

    def test_group_given(self) -> None:
        requires_symmetric_memory(ops.odd, group="where")
        self.assertEqual(requirement_of(ops.odd.default), Requirement(("x",), "where", None))
        requires_symmetric_memory(ops.no_group, ("x", "y"), group="7")
        self.assertEqual(requirement_of(ops.no_group.default), Requirement(("x", "y"), None, "7"))

    def test_a_name_that_is_defined_later(self) -> None:
        requires_symmetric_memory("declare_test::later", "x")
        requires_symmetric_memory("declare_test::later_and_wrong", "y")
        lib = torch.library.Library("declare_test", "FRAGMENT")
        lib.define("later(Tensor x, str group_name) -> Tensor")
        lib.define("later_and_wrong(Tensor x, str group_name) -> Tensor")
        self.assertEqual(requirement_of(ops.later.default), Requirement(("x",), "group_name", None))
        with self.assertRaisesRegex(ValueError, "later_and_wrong has no argument 'y'; its arguments are x, group_name"):
            requirement_of(ops.later_and_wrong.default)
        lib._destroy()

    def test_specify_at_once(self) -> None:
        specify_symmetric_memory(ops.collective, "x")
        self.assertIsNotNone(requirement_of(ops.collective.default))

    def test_a_block_leaves_no_declaration(self) -> None:
        with specify_symmetric_memory(ops.collective, "x"):
            self.assertIsNone(requirement_of(ops.collective.default))
        self.assertIsNone(requirement_of(ops.collective.default))
        requires_symmetric_memory(ops.collective, "x")
        with specify_symmetric_memory(ops.collective, "x"):
            pass
        self.assertIsNotNone(requirement_of(ops.collective.default))

    @unittest.skipUnless(hasattr(torch.library.Library, "register_symm_mem_args"), "torch 2.13 and newer")
    def test_declarations_of_torch(self) -> None:
        before = declare.fingerprint()
        lib = torch.library.Library("declare_test", "FRAGMENT")
        lib.define("torchs(Tensor x, str group_name) -> Tensor")
        lib.define("torchs_without(Tensor x) -> Tensor")
        lib.register_symm_mem_args("torchs", ["x"])
        lib.register_symm_mem_args("torchs_without", ["x"])
        self.assertEqual(requirement_of(ops.torchs.default), Requirement(("x",), "group_name", None))
        self.assertIsNone(requirement_of(ops.torchs_without.default))
        self.assertNotEqual(declare.fingerprint(), before)
        lib._destroy()
        self.assertEqual(declare.fingerprint(), before)


class RefusalTest(unittest.TestCase):
    @parameterized.expand(
        [
            (lambda: ops.collective, "z", ValueError, "has no argument 'z'; its arguments are x, group_name"),
            (
                lambda: ops.collective,
                3,
                IndexError,
                r"input 3 does not exist: declare_test::collective\(x, group_name\)",
            ),
            (lambda: ops.collective, -1, IndexError, "input -1 does not exist"),
            (lambda: ops.collective, "group_name", TypeError, "argument 'group_name' .* is a str, not a tensor"),
            (lambda: ops.many, 2, TypeError, "argument 'n' .* is a int, not a tensor"),
            (lambda: ops.collective, (), ValueError, "name at least one"),
            (lambda: ops.collective, 1.5, TypeError, "not 1.5"),
            (lambda: ops.collective, True, TypeError, "not True"),
            (lambda: ops.no_group, 0, ValueError, "no argument that names its group .* pass group="),
            (lambda: "collective", 0, ValueError, "write 'namespace::name'"),
            (lambda: "a::b::c", 0, ValueError, "write 'namespace::name'"),
            (lambda: "declare_test::collective.none", 0, ValueError, "no overload 'none'; it has default, out"),
            (lambda: torch.sin, 0, TypeError, "an operator is an OpOverload"),
            (lambda: None, 0, TypeError, "an operator is an OpOverload"),
        ]
    )
    def test_clear_errors(self, op: Any, given: Any, error: type[Exception], text: str) -> None:
        with self.assertRaisesRegex(error, text):
            requires_symmetric_memory(op(), given)
        self.assertEqual(declare._declarations, {})

    def test_group_of_a_wrong_type(self) -> None:
        with self.assertRaisesRegex(TypeError, "not int"):
            requires_symmetric_memory(ops.collective, group=3)  # type: ignore[arg-type]

    def test_the_same_again_changes_nothing(self) -> None:
        first = requires_symmetric_memory(ops.collective)
        for op, given in ((ops.collective, "x"), (ops.collective.default, 0), ("declare_test::collective", ["x"])):
            requires_symmetric_memory(op, given)
        self.assertIs(requires_symmetric_memory(ops.collective, 0), first)

    @parameterized.expand([(lambda: ops.many,), (lambda: ops.many.default,), (lambda: "declare_test::many",)])
    def test_a_contradiction_names_the_first_declaration(self, op: Any) -> None:
        requires_symmetric_memory(ops.many, "y")
        with self.assertRaisesRegex(ValueError, r"contradicts the declaration of .*'y' at .*test_declare\.py:\d+"):
            requires_symmetric_memory(op(), "xs")
        with self.assertRaisesRegex(ValueError, "contradicts"):
            specify_symmetric_memory(op(), "xs", group="7")
        with self.assertRaisesRegex(ValueError, "contradicts"):
            requires_symmetric_memory(op(), "y", group="7")

    def test_a_contradiction_that_no_block_follows(self) -> None:
        first = requires_symmetric_memory(ops.many, "y")
        specify_symmetric_memory(ops.many, "xs")
        for _ in range(2):
            with self.assertRaisesRegex(ValueError, r"contradicts the declaration of .*'y' at .*test_declare\.py:\d+"):
                requirement_of(ops.many.default)
        self.assertIsNone(requirement_of(ops.collective.default))
        first.remove()
        self.assertIsNone(requirement_of(ops.many.default))

    def test_specify_needs_an_argument(self) -> None:
        with self.assertRaisesRegex(ValueError, "name the argument"):
            specify_symmetric_memory(ops.collective)


class LibraryTest(unittest.TestCase):
    @parameterized.expand(
        [
            ("a", "(SymmMemTensor x, str group_name) -> Tensor", None, ("x",)),
            ("b", "(Tensor x, str group_name) -> Tensor", "x", ("x",)),
            ("c", "(Tensor x, Tensor y, str group_name) -> Tensor", (0, "y"), ("x", "y")),
            (
                "d",
                "(SymmMemTensor(a!) x, SymmMemTensor[] ys, SymmMemTensor?[] zs, SymmMemTensor? u, str group) -> ()",
                None,
                ("x", "ys", "zs", "u"),
            ),
        ]
    )
    def test_define(self, name: str, schema: str, hint: Any, inputs: tuple[str, ...]) -> None:
        library.define(f"declare_test::defined_{name}", schema, symm_mem_hint=hint)
        overload = getattr(ops, f"defined_{name}").default
        self.assertNotIn("SymmMemTensor", str(overload._schema))
        requirement = requirement_of(overload)
        assert requirement is not None
        self.assertEqual(requirement.inputs, inputs)

    @parameterized.expand(
        [
            ("(Tensor x, str group_name) -> Tensor", None, "no symm_mem_hint"),
            ("(SymmMemTensor x, str group_name) -> Tensor", "x", "not both"),
            ("(Tensor x, str group_name) -> SymmMemTensor", "x", "said of arguments"),
            ("(Tensor x, str group_name) -> Tensor", "y", "no argument 'y'"),
            ("(SymmMemTensor x) -> Tensor", None, "no argument that names its group"),
            ("(SymmMemTensor x, str group_name)", None, "write a schema without a name, such as"),
            ("refused(SymmMemTensor x, str group_name) -> Tensor", None, "write a schema without a name, such as"),
        ]
    )
    def test_refused_definitions_leave_nothing_behind(self, schema: str, hint: Any, text: str) -> None:
        with self.assertRaisesRegex(ValueError, text):
            library.define("declare_test::refused", schema, symm_mem_hint=hint)
        library.define("declare_test::refused", "(SymmMemTensor x, str group_name) -> Tensor")
        library._kept.pop()._destroy()

    def test_one_library_for_several_operators(self) -> None:
        lib = torch.library.Library("declare_test", "FRAGMENT")
        for name in ("first", "second"):
            library.define(f"declare_test::{name}", "(SymmMemTensor x, str group_name) -> Tensor", lib=lib)
        for overload in (ops.first.default, ops.second.default):
            self.assertEqual(requirement_of(overload), Requirement(("x",), "group_name", None))


class TorchsOwnTest(unittest.TestCase):
    def test_arguments_exist_and_are_tensors(self) -> None:
        """For the operators that this torch has; of the others nothing is asked."""
        known = 0
        for name, inputs in declare._TORCHS.items():
            packet = getattr(torch.ops.symm_mem, name.removeprefix("symm_mem::"), None)
            if packet is None:
                continue
            known += 1
            requirement = requirement_of(packet.default)
            self.assertEqual(requirement, Requirement(inputs, "group_name", None))
            requires_symmetric_memory(packet, inputs).remove()  # checks the names
        self.assertGreater(known, 10)

    @unittest.skipUnless(compat.torch_version() == (2, 13), "other versions have other operators")
    def test_no_operator_was_forgotten(self) -> None:
        """Those with a group either are declared or bring memory of their own."""
        own = ("symm_mem::fused_", "symm_mem::_low_contention_", "symm_mem::_rendezvous")
        for schema in torch._C._jit_get_all_schemas():
            if schema.name.startswith("symm_mem::") and "group_name" in {a.name for a in schema.arguments}:
                self.assertTrue(schema.name in declare._TORCHS or schema.name.startswith(own), schema)


class FingerprintTest(unittest.TestCase):
    def test_the_pass_is_another_with_other_declarations(self) -> None:
        before = symmpatterns.post_grad_pass.uuid()
        declaration = requires_symmetric_memory(ops.collective)
        self.assertNotEqual(symmpatterns.post_grad_pass.uuid(), before)
        declaration.remove()
        self.assertEqual(symmpatterns.post_grad_pass.uuid(), before)


class _Graphs:
    """A backend that keeps the graphs it is given, and runs them."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []

    def __call__(self, module: Any, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func
        from torch._functorch.aot_autograd import aot_module_simplified

        def keep(graph_module: Any, inputs: Any) -> Any:
            self.graphs.append(graph_module.graph)
            return make_boxed_func(graph_module)

        return aot_module_simplified(module, inputs, fw_compiler=keep)

    def calls(self) -> list[tuple[str, bool]]:
        """(operator, is its input marked) of each call in the forward graph."""
        found = []
        for node in self.graphs[0].nodes:
            if node.target in (ops.collective.default, ops.custom.default):
                marked = node.args[0].target is torch.ops.symmpatterns.to_symmetric.default
                found.append((str(node.target).split(".")[1], marked))
        return found


_lib.define("pair(Tensor x, Tensor y, str group_name) -> Tensor")
_lib.impl("pair", lambda x, y, group_name: x + y, "CompositeExplicitAutograd")
_lib.impl("collective", lambda x, group_name: x * 2, "CompositeExplicitAutograd")


class BlockTest(unittest.TestCase):
    def trace(self, function: Any) -> tuple[_Graphs, torch.Tensor]:
        graphs = _Graphs()
        x = torch.linspace(-1, 1, 8, requires_grad=True)
        torch.compile(function, backend=graphs, fullgraph=True)(x).sum().backward()
        expected = torch.linspace(-1, 1, 8, requires_grad=True)
        function(expected).sum().backward()
        torch.testing.assert_close(x.grad, expected.grad)
        return graphs, x

    def test_just_the_calls_inside(self) -> None:
        def function(x: torch.Tensor) -> torch.Tensor:
            a = ops.custom(x.sin(), "0")
            with specify_symmetric_memory(ops.custom, "x"):
                b = ops.custom(x.cos(), "0")
                b = b + ops.custom.default(x=b.relu(), group_name="0")
                b = custom(b.tanh(), "0")
                c = ops.collective(b.detach(), "0")
            return a + custom(b, "0") + c

        graphs, _ = self.trace(function)
        marks = [("custom", False), ("custom", True), ("custom", True), ("custom", True), ("collective", False)]
        self.assertEqual(graphs.calls(), [*marks, ("custom", False)])
        self.assertIsNone(requirement_of(ops.custom.default))

    def test_blocks_nest(self) -> None:
        def function(x: torch.Tensor) -> torch.Tensor:
            with specify_symmetric_memory(in_graphs, "x"):
                with specify_symmetric_memory("declare_test::collective", 0):
                    x = custom(x.sin(), "0") + ops.collective(x.detach().cos(), "0")
                return custom(x, "0") + ops.collective(x.detach().exp(), "0")

        graphs, _ = self.trace(function)
        self.assertEqual(graphs.calls().count(("custom", True)), 2)
        self.assertEqual(sorted(graphs.calls())[:2], [("collective", False), ("collective", True)])

    def test_a_block_adds_to_a_declaration(self) -> None:
        requires_symmetric_memory(ops.pair, "x")

        def function(x: torch.Tensor) -> torch.Tensor:
            with specify_symmetric_memory(ops.pair, "y"):
                z = ops.pair(x.sin(), x.cos(), "0")
            return z + ops.pair(x.exp(), x, "0")

        graphs = _Graphs()
        x = torch.ones(3)
        torch.testing.assert_close(torch.compile(function, backend=graphs, fullgraph=True)(x), function(x))
        calls = [call_of(node) for node in graphs.graphs[0].nodes if node.target == ops.pair.default]
        named = [[each.node.args[0] if is_marker(each.node) else each.node for each in call.inputs] for call in calls]
        self.assertEqual([[str(node) for node in nodes] for nodes in named], [["sin", "cos"], ["exp"]])

    def test_at_once_in_a_compiled_function(self) -> None:
        def function(x: torch.Tensor) -> torch.Tensor:
            specify_symmetric_memory(in_graphs, "x")
            return custom(x.sin(), "0")

        torch.compile(function, backend="aot_eager", fullgraph=True)(torch.ones(3))
        self.assertIsNotNone(requirement_of(ops.custom.default))

    def test_around_a_compiled_function(self) -> None:
        with specify_symmetric_memory(custom, "x"):
            graphs, _ = self.trace(lambda x: custom(x.sin(), "0"))
        self.assertEqual(graphs.calls(), [("custom", True)])

    def test_an_error_inside_ends_the_block(self) -> None:
        with self.assertRaises(ZeroDivisionError), specify_symmetric_memory(custom, "x"):
            _ = 1 / 0
        graphs, _ = self.trace(lambda x: custom(x.sin(), "0"))
        self.assertEqual(graphs.calls(), [("custom", False)])

    def test_a_wrong_name_in_a_compiled_function(self) -> None:
        def function(x: torch.Tensor) -> torch.Tensor:
            with specify_symmetric_memory(in_graphs, "y"):
                return custom(x.sin(), "0")

        with self.assertRaisesRegex(Exception, "has no argument 'y'"):
            torch.compile(function, backend="aot_eager", fullgraph=True)(torch.ones(3))


class MarkerTest(unittest.TestCase):
    def test_operators_pass_opcheck(self) -> None:
        x = torch.randn(4, 5, requires_grad=True)
        for sample in (x, x.detach().t(), torch.randn(3, 8)[:, ::2]):
            for contiguous in (False, True):
                torch.library.opcheck(torch.ops.symmpatterns.to_symmetric.default, (sample, "0", contiguous))
        with torch._subclasses.FakeTensorMode():
            fake = torch.ops.symmpatterns.symmetric_empty([4, 3], [3, 1], torch.bfloat16, torch.device("cpu"), "0")
        self.assertEqual((tuple(fake.shape), fake.dtype), ((4, 3), torch.bfloat16))


if __name__ == "__main__":
    unittest.main()
