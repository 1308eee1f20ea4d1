"""Every public function with input that it cannot take: the class of the error, and what its text says."""

from __future__ import annotations

import inspect
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parameterized import parameterized

import symmpatterns
from symmpatterns import SymmetricMemoryError, config
from symmpatterns.testing import fake_group, run_ranks

operators: Any = torch.ops.symmpatterns
CPU = torch.device("cpu")
ones = torch.ones
half, double = torch.ones(2, 2).half(), torch.ones(2, 2).double()
meta, sparse = torch.ones(2, 2, device="meta"), torch.eye(2).to_sparse()

require = symmpatterns.requires_symmetric_memory

Case = tuple[str, Callable[[str], Any], type[BaseException], str]  # the function gets the name of a pretended group


def gemm_cases() -> list[Case]:
    """What the three fused operators have in common."""
    calls: dict[str, Callable[..., Any]] = {
        "matmul_all_reduce": lambda a, b, g, bias=None: operators.matmul_all_reduce(a, b, "sum", g, bias=bias),
        "matmul_reduce_scatter": lambda a, b, g, bias=None: operators.matmul_reduce_scatter(
            a, b, "sum", 0, g, bias=bias
        ),
        "all_gather_matmul": lambda a, b, g, bias=None: operators.all_gather_matmul(
            a, [b], 0, g, biases=None if bias is None else [bias]
        ),
    }
    square = ones(2, 2)
    cases: list[Case] = []
    for op, call in calls.items():
        wrong: list[tuple[str, tuple[Any, ...], type[BaseException], str]] = [
            ("no tensor", (None, square), TypeError, f"{op}: operand a is None"),
            ("a list", ([1.0], square), RuntimeError, "Expected a value of type 'Tensor' for argument 'a"),
            ("group 3", (square, square, 3), RuntimeError, "Expected a value of type 'str' for argument 'group_name'"),
            ("no such group", (square, square, "nobody"), SymmetricMemoryError, "no process group named 'nobody'"),
            ("integers", (square.int(), square.int()), TypeError, f"{op}: takes .*bfloat16.*, not torch.int32"),
            ("double", (double, double), TypeError, f"{op}: takes .*, not torch.float64"),
            ("two dtypes", (square, half), TypeError, f"{op}: .* one dtype, not a torch.float32, b torch.float16"),
            ("two devices", (square, meta), ValueError, f"{op}: .* one device, not a on cpu, b on meta"),
            ("a vector", (square[0], square), ValueError, rf"{op}: a.* dimensions, not shape \[2\]"),
            ("b a vector", (square, square[0]), ValueError, rf"{op}: b must have 2 dimensions, not shape \[2\]"),
            ("inner sizes", (square, ones(3, 2)), ValueError, rf"{op}: a.* \[2, 2\] and b \[3, 2\] do not multiply"),
            (
                "bias shape",
                (square, square, None, ones(3)),
                ValueError,
                rf"{op}: bias must have shape \[2\], not \[3\]",
            ),
            ("bias dtype", (square, square, None, half[0]), TypeError, f"{op}: .* and bias torch.float16"),
            ("sparse", (sparse, square), NotImplementedError, "SparseCPU"),
        ]
        for name, (a, b, *rest), error, text in wrong:
            group = rest[0] if rest else None
            bias = rest[1] if len(rest) > 1 else None
            cases.append(
                (
                    f"{op} {name}",
                    lambda g, c=call, a=a, b=b, group=group, bias=bias: c(a, b, g if group is None else group, bias),
                    error,
                    text,
                )
            )
    return cases


def norm_cases() -> list[Case]:
    """all_reduce_rms_norm; `x` and what follows it, the rest being right."""
    x, op = ones(2, 2), "all_reduce_rms_norm"
    no_tensor = "There were no tensor arguments"  # the dispatcher's own text: there is nothing to dispatch on
    wrong: list[tuple[str, tuple[Any, ...], type[BaseException], str]] = [
        ("no tensor", (None,), NotImplementedError, no_tensor),
        ("a list", ([1.0],), RuntimeError, "Expected a value of type 'Tensor' for argument 'x'"),
        ("a list of residuals", (x, [1.0]), RuntimeError, "'Optional\\[Tensor\\]' for argument 'residual'"),
        ("group 3", (x, None, None, 0.0, "sum", 3), RuntimeError, "type 'str' for argument 'group_name'"),
        (
            "no such group",
            (x, None, None, 0.0, "sum", "nobody"),
            SymmetricMemoryError,
            "no process group named 'nobody'",
        ),
        ("integers", (x.int(),), TypeError, f"{op}: takes .*, not torch.int32"),
        ("double", (double,), TypeError, f"{op}: takes .*, not torch.float64"),
        ("sparse", (sparse,), NotImplementedError, "SparseCPU"),
        ("a number", (ones(()),), ValueError, f"{op}: x must have a dimension to normalise over"),
        ("wide rows", (ones(1, 20000),), ValueError, f"{op}: rows have at most 16384 elements, not 20000"),
        ("residual elsewhere", (x, meta), TypeError, f"{op}: residual must be torch.float32 on cpu, .* on meta"),
        ("residual shape", (x, ones(2)), ValueError, rf"{op}: residual must have the shape of x, \[2, 2\], not \[2\]"),
        ("weight dtype", (x, None, half[0]), TypeError, f"{op}: weight must be torch.float32 on cpu, .* torch.float16"),
        ("weight shape", (x, None, x), ValueError, rf"{op}: weight must have shape \[2\], not \[2, 2\]"),
        ("eps no number", (x, None, None, float("nan")), ValueError, f"{op}: eps is .* not negative, not nan"),
        ("eps negative", (x, None, None, -1.0), ValueError, f"{op}: eps is .* not negative, not -1.0"),
        ("eps a text", (x, None, None, "a"), RuntimeError, "type 'float' for argument 'eps'"),
        ("reduce op", (x, None, None, 0.0, "max"), ValueError, f"{op}: reduce_op is one of sum, avg, not 'max'"),
    ]
    cases: list[Case] = []
    for name, given, error, text in wrong:
        rest = (None, None, 0.0, "sum")[len(given) - 1 :]

        def call(g: str, given: tuple[Any, ...] = given, rest: tuple[Any, ...] = rest) -> Any:
            return operators.all_reduce_rms_norm(*given, *rest, *([] if len(given) == 6 else [g]))

        cases.append((f"{op} {name}", call, error, text))
    return cases


f8 = ones(16, 16).to(torch.float8_e4m3fn)
CASES: list[Case] = [
    # memory
    ("empty int", lambda g: symmpatterns.empty(3), TypeError, r"takes a size such as \(4, 6\), not 3"),
    ("empty text", lambda g: symmpatterns.empty("ab"), TypeError, "not 'ab'"),
    ("empty fraction", lambda g: symmpatterns.empty((1.5,)), TypeError, r"not \(1.5,\)"),
    ("empty negative", lambda g: symmpatterns.empty((2, -1)), ValueError, r"no negative numbers, not \[2, -1\]"),
    ("empty dtype", lambda g: symmpatterns.empty((2,), dtype="int8"), TypeError, "a torch.dtype, not 'int8'"),
    ("empty device 3", lambda g: symmpatterns.empty((2,), device=3), TypeError, "torch.device or its name"),
    ("empty device", lambda g: symmpatterns.empty((2,), device="x"), ValueError, "there is no device 'x'"),
    ("empty meta", lambda g: symmpatterns.empty((2,), device="meta"), SymmetricMemoryError, "not for device meta"),
    ("empty immense", lambda g: symmpatterns.empty((1 << 62, 4)), SymmetricMemoryError, "no address space is so large"),
    ("empty cuda", lambda g: symmpatterns.empty((2,), device="cuda:99"), SymmetricMemoryError, "cannot|no CUDA device"),
    ("empty huge", lambda g: symmpatterns.empty((1 << 50,)), SymmetricMemoryError, "cannot allocate .* bytes"),
    ("is_symmetric", lambda g: symmpatterns.is_symmetric(None), TypeError, "takes a tensor, not NoneType"),
    ("rendezvous", lambda g: symmpatterns.rendezvous(1), TypeError, "takes a tensor, not int"),
    ("rendezvous group", lambda g: symmpatterns.rendezvous(ones(1), 1.5), TypeError, "not float"),
    ("rendezvous fake", lambda g: symmpatterns.rendezvous(ones(1)), SymmetricMemoryError, "fake backend"),
    ("symmetric_memory group", lambda g: symmpatterns.symmetric_memory(3).__enter__(), TypeError, "not int"),
    (
        "symmetric_memory no such group",
        lambda g: symmpatterns.symmetric_memory("nobody").__enter__(),
        SymmetricMemoryError,
        "no process group named 'nobody'",
    ),
    # configuration and report
    ("config name", lambda g: setattr(config, "nonsense", 1), AttributeError, "the options are enabled, force"),
    ("config flag", lambda g: setattr(config, "force", 1), TypeError, r"force takes bool, not int \(1\)"),
    ("config number", lambda g: setattr(config, "timeout_s", True), TypeError, "takes int or float, not bool"),
    *[
        (
            f"config timeout {value}",
            lambda g, v=value: setattr(config, "timeout_s", v),
            ValueError,
            "positive number of seconds",
        )
        for value in (0, -1.0, float("nan"), float("inf"))
    ],
    ("config choice", lambda g: setattr(config, "host_kernels", "x"), ValueError, "'aten' or 'triton', not 'x'"),
    ("config delete", lambda g: delattr(config, "force"), AttributeError, "cannot be deleted; its default is False"),
    (
        "config.patch name",
        lambda g: config.patch(nonsense=1).__enter__(),
        AttributeError,
        "the options are enabled, force",
    ),
    ("config.patch half", lambda g: config.patch(force=True, timeout_s=-1).__enter__(), ValueError, "not -1"),
    ("config.describe name", lambda g: config.describe("x"), AttributeError, "no option 'x'"),
    ("report.save path", lambda g: symmpatterns.report().save(1), TypeError, "int"),
    ("report.save folder", lambda g: symmpatterns.report().save("/no/such/folder"), FileNotFoundError, "No such file"),
    # declarations
    (
        "requires_symmetric_memory 3",
        lambda g: symmpatterns.requires_symmetric_memory(3),
        TypeError,
        "an operator is .*, not 3",
    ),
    (
        "requires_symmetric_memory argument",
        lambda g: symmpatterns.requires_symmetric_memory("aten::mm", "zz"),
        ValueError,
        "aten::mm has no argument 'zz'; its arguments are self, mat2",
    ),
    (
        "requires_symmetric_memory nothing",
        lambda g: symmpatterns.requires_symmetric_memory("aten::mm", []),
        ValueError,
        "at least one",
    ),
    (
        "requires_symmetric_memory fraction",
        lambda g: symmpatterns.requires_symmetric_memory("aten::mm", 1.5),
        TypeError,
        "position or the name of an argument, not 1.5",
    ),
    ("requires_symmetric_memory position", lambda g: require("aten::mm", 9, group=g), IndexError, "arguments 0 to 1"),
    (
        "requires_symmetric_memory number",
        lambda g: require("aten::add.Tensor", "alpha", group=g),
        TypeError,
        "not a tensor",
    ),
    ("requires_symmetric_memory group", lambda g: require("aten::mm"), ValueError, "no argument that names its group"),
    ("requires_symmetric_memory group 3", lambda g: require("aten::mm", group=3), TypeError, "not int"),
    (
        "requires_symmetric_memory overload",
        lambda g: require("aten::mm.zz", group=g),
        ValueError,
        "no overload 'zz'; it has",
    ),
    (
        "specify_symmetric_memory nothing",
        lambda g: symmpatterns.specify_symmetric_memory("aten::mm"),
        ValueError,
        "name the",
    ),
    (
        "specify_symmetric_memory None",
        lambda g: symmpatterns.specify_symmetric_memory(None, "x"),
        TypeError,
        "not None",
    ),
    (
        "specify_symmetric_memory list",
        lambda g: symmpatterns.specify_symmetric_memory("aten::mm", ["self"]),
        TypeError,
        r"position or the name of an argument, not \['self'\]",
    ),
    *[
        (
            f"library.define {name}",
            lambda g, b=lib: symmpatterns.library.define("bad_input::x", "(SymmMemTensor x, str g) -> Tensor", lib=b),
            error,
            text,
        )
        for name, lib, error, text in (
            ("lib 3", 3, TypeError, "lib is a torch.library.Library, not int"),
            ("other lib", torch.library.Library("other", "FRAGMENT"), ValueError, "lib is of namespace 'other'"),
        )
    ],
    ("library.define 3", lambda g: symmpatterns.library.define(3, "(Tensor x) -> Tensor"), TypeError, "texts, not 3"),
    (
        "library.define name",
        lambda g: symmpatterns.library.define("x", "() -> ()"),
        ValueError,
        "write 'namespace::name'",
    ),
    (
        "library.define no input",
        lambda g: symmpatterns.library.define("bad_input::x", "(Tensor x) -> Tensor"),
        ValueError,
        "no argument is a SymmMemTensor",
    ),
    # fused operators, what each asks beside the rest
    (
        "matmul_all_reduce reduce op",
        lambda g: operators.matmul_all_reduce(ones(2, 2), ones(2, 2), "xor", g),
        ValueError,
        "reduce_op is one of sum, avg, not 'xor'",
    ),
    (
        "matmul_reduce_scatter dim",
        lambda g: operators.matmul_reduce_scatter(ones(2, 2), ones(2, 2), "sum", -3, g),
        IndexError,
        "scatter_dim is -3; the tensor has 2 dimensions",
    ),
    (
        "matmul_reduce_scatter size",
        lambda g: operators.matmul_reduce_scatter(ones(3, 2), ones(2, 2), "sum", 0, g),
        AssertionError,
        "dimension 0 of the product has size 3, which must be a multiple of the group's size 2",
    ),
    (
        "all_gather_matmul dim",
        lambda g: operators.all_gather_matmul(ones(2, 2), [ones(2, 2)], 5, g),
        IndexError,
        "gather_dim is 5",
    ),
    (
        "all_gather_matmul nothing",
        lambda g: operators.all_gather_matmul(ones(2, 2), [], 0, g),
        ValueError,
        "bs is empty",
    ),
    (
        "all_gather_matmul biases",
        lambda g: operators.all_gather_matmul(ones(2, 2), [ones(2, 2)], 0, g, biases=[None, None]),
        ValueError,
        "2 biases for 1 matrices",
    ),
    # what rewritten graphs call
    *[
        (f"peer_buffers {plan}", lambda g, p=plan, s=sizes: operators.peer_buffers(p, s, CPU, g), ValueError, text)
        for plan, sizes, text in (
            ("nonsense", [1], "'nonsense' is no piece of a plan"),
            ("shove float32 1", [1], "its kind is one of pull, push"),
            ("pull float33 1", [1], "no piece of a plan.*float33"),
            ("pull float32 1", [1, 2], "has 1 sizes in all, and 2 were given"),
            ("pull float32 1", [-1], "must not be negative"),
            ("gather:3 float32 1", [1], "no dimension 3"),
            ("from:7 float32 1", [1], "the group has no rank 7"),
        )
    ],
    (
        "peer_sources of nothing",
        lambda g: operators.peer_sources([ones(1)], "pull float32 1", [9], 0, g),
        SymmetricMemoryError,
        "no site 0 of 'pull float32 1'",
    ),
    (
        "reduce_peers reduction",
        lambda g: operators.reduce_peers([ones(1)], "xor"),
        ValueError,
        "reduce_op is one of sum",
    ),
    (
        "symmetric_empty group",
        lambda g: operators.symmetric_empty([2], [1], torch.float32, CPU, "nobody"),
        SymmetricMemoryError,
        "no process group named 'nobody'",
    ),
    (
        "symmetric_empty device",
        lambda g: operators.symmetric_empty([2], [1], torch.float32, torch.device("meta"), g),
        SymmetricMemoryError,
        "not for device meta",
    ),
    ("to_symmetric None", lambda g: operators.to_symmetric(None, g), TypeError, "takes a tensor, not None"),
    ("store_ shape", lambda g: operators.store_(ones(2, 2), ones(3)), RuntimeError, "must match the size"),
    (
        "store_in_turn_ slots",
        lambda g: operators.store_in_turn_(ones(1, 2), torch.arange(2), ones(2)),
        ValueError,
        "two slots in dimension 0, not \\[1, 2\\]",
    ),
    (
        "store_in_turn_ shape",
        lambda g: operators.store_in_turn_(ones(2, 2), torch.arange(2), ones(3)),
        RuntimeError,
        "must match",
    ),
    (
        "take_in_turn turns",
        lambda g: operators.take_in_turn(ones(2, 2), ones(2)),
        ValueError,
        "turns are int64 \\[2\\], not torch.float32",
    ),
    (
        "copy_out source",
        lambda g: operators.copy_out([1.0]),
        RuntimeError,
        "type 'Tensor' for argument 'source'",
    ),
    (
        "store_parts_ dim",
        lambda g: operators.store_parts_(ones(2, 2), [ones(2, 2)], 7),
        IndexError,
        "dim is 7; the target has 2",
    ),
    *[
        (
            f"store_parts_ of {count}",
            lambda g, n=count: operators.store_parts_(ones(2, 2), n * [ones(1, 2)], 0),
            ValueError,
            r"do not fill dimension 0 of \[2, 2\]",
        )
        for count in (0, 1, 3)
    ],
    ("barrier_ of nothing", lambda g: operators.barrier_([], g), ValueError, "barrier_: takes at least one tensor"),
    ("barrier_ no such group", lambda g: operators.barrier_([ones(1)], "nobody"), SymmetricMemoryError, "'nobody'"),
    ("peer_sources no gate", lambda g: operators.peer_sources([], "pull float32 1", [1], 0, g), ValueError, "at least"),
    (
        "peer_sources before the first",
        lambda g: (
            operators.peer_buffers("pull float32 1", [1], CPU, g),
            operators.peer_sources([ones(1)], "pull float32 1", [1], -1, g),
        ),
        SymmetricMemoryError,
        "no site -1 of",
    ),
    (
        "peer_buffers device",
        lambda g: operators.peer_buffers("pull float32 1", [1], torch.device("meta"), g),
        SymmetricMemoryError,
        "not for device meta",
    ),
    ("reduce_peers nothing", lambda g: operators.reduce_peers([], "sum"), ValueError, "takes at least one tensor"),
    ("reduce_peers avg", lambda g: operators.reduce_peers([ones(1).int()], "avg"), TypeError, "not defined here for"),
    # fused operators in float8, and other dtypes of sums
    *[
        (
            f"matmul_all_reduce {name}",
            lambda g, o=options: operators.matmul_all_reduce(f8, f8, "sum", g, **o),
            error,
            text,
        )
        for name, options, error, text in (
            ("no scales", {}, ValueError, "need scale_a and scale_b; scale_a is missing"),
            (
                "scale's dtype",
                {"scale_a": half[0, :1], "scale_b": ones(1)},
                TypeError,
                "scale_a must be float32 on cpu",
            ),
            (
                "scales",
                {"scale_a": ones(3), "scale_b": ones(1)},
                ValueError,
                "one element, or 16, one for each of the rows",
            ),
            ("partial_dtype", {"partial_dtype": torch.int8}, TypeError, "partial_dtype is one of .*, not torch.int8"),
            (
                "out_dtype",
                {"out_dtype": torch.float16},
                TypeError,
                "are summed to torch.bfloat16 or torch.float32, not",
            ),
        )
    ],
    (
        "matmul_all_reduce scales of float32",
        lambda g: operators.matmul_all_reduce(ones(2, 2), ones(2, 2), "sum", g, scale_a=ones(1)),
        TypeError,
        "scales belong to torch.float8_e4m3fn operands",
    ),
    (
        "matmul_all_reduce batches",
        lambda g: operators.matmul_all_reduce(ones(2, 2, 2), ones(3, 2, 2), "sum", g),
        ValueError,
        "a has a batch of 2 matrices, b of 3",
    ),
    # names of groups, the pass
    ("register_group_name 3", lambda g: symmpatterns.register_group_name(3, g), TypeError, "name is a text, not int"),
    ("register_group_name group", lambda g: symmpatterns.register_group_name("x", 3), TypeError, "not int"),
    (
        "register_group_name nobody",
        lambda g: symmpatterns.register_group_name("x", "nobody"),
        SymmetricMemoryError,
        "'nobody'",
    ),
    ("post_grad_pass 3", lambda g: symmpatterns.post_grad_pass(3), TypeError, "takes a torch.fx.Graph, not int"),
    *gemm_cases(),
    *norm_cases(),
]


class BadInputTest(unittest.TestCase):
    @parameterized.expand(CASES, name_func=lambda f, n, p: f"{f.__name__}_{n}_{parameterized.to_safe_name(p.args[0])}")
    def test(self, _: str, call: Callable[[str], Any], error: type[BaseException], text: str) -> None:
        before = config.options()
        with fake_group(2) as group, self.assertRaisesRegex(error, text) as caught:
            call(group)
        self.assertIs(type(caught.exception), error)
        self.assertEqual(config.options(), before)

    def test_every_public_function_has_a_row(self) -> None:
        """What takes an argument: the names of the package, those of config, library and reports, and the operators."""
        rows = {name.split()[0] for name, *_ in CASES}
        public = {name: getattr(symmpatterns, name) for name in symmpatterns.__all__}
        named = {
            name
            for name, each in public.items()
            if callable(each)
            and not (isinstance(each, type) and issubclass(each, Exception))
            and inspect.signature(each).parameters
        }
        schemas = (schema.name for schema in torch._C._jit_get_all_schemas())
        named |= {name.partition("::")[2] for name in schemas if name.startswith("symmpatterns::")}
        named |= {"config", "config.patch", "config.describe", "library.define", "report.save"}
        self.assertEqual(named - rows, set())

    def test_without_a_process_group(self) -> None:
        for call in (
            lambda: symmpatterns.rendezvous(ones(1)),
            lambda: operators.matmul_all_reduce(ones(2, 2), ones(2, 2), "sum", "0"),
            lambda: operators.peer_buffers("pull float32 1", [1], CPU, "0"),
            lambda: operators.barrier_([ones(1)], "0"),
            lambda: operators.symmetric_empty([1], [1], torch.float32, CPU, "0"),
        ):
            with self.assertRaisesRegex(SymmetricMemoryError, "no process group: call torch.distributed.init_process"):
                call()

    def test_what_is_no_error(self) -> None:
        self.assertFalse(symmpatterns.is_symmetric(sparse))
        self.assertFalse(symmpatterns.is_symmetric(meta))
        self.assertEqual(symmpatterns.empty((0, 3)).shape, (0, 3))
        self.assertEqual(symmpatterns.empty((2,), device="cpu:0").device, CPU)

    @pytest.mark.slow
    def test_states(self) -> None:
        """A group that was destroyed, a group that this rank is not in, a timeout that is over: real processes."""
        for ended in run_ranks(_states, 2, timeout=60):
            self.assertRegex(ended["destroyed"], "no process group named")
            self.assertRegex(ended["foreign"], "this process is not in that group|no process group named")
            self.assertRegex(ended["channel"], "TypeError: barrier takes the number of a channel, not 'x'")
            self.assertRegex(ended["ordinary tensor"], "is not in symmetric memory: allocate it with")
            self.assertRegex(ended["sources of another call"], "another graph of the group was run in between")
            self.assertRegex(ended["double"], "takes .*, not torch.float64")
            self.assertEqual(ended["afterwards"], "right")


def _states(rank: int, world_size: int) -> dict[str, str]:
    ended = {}
    group = dist.new_group([0, 1])
    name = group.group_name
    operators.matmul_all_reduce(ones(2, 2), ones(2, 2), "sum", name)
    dist.destroy_process_group(group)
    lonely = [dist.new_group([r]) for r in range(2)][1 - rank]
    default = dist.group.WORLD.group_name
    operators.peer_buffers("pull float32 1", [4], CPU, default)
    for case, call in {
        "destroyed": lambda: operators.matmul_all_reduce(ones(2, 2), ones(2, 2), "sum", name),
        "foreign": lambda: symmpatterns.rendezvous(symmpatterns.empty((2,)), lonely),
        "channel": lambda: symmpatterns.rendezvous(symmpatterns.empty((2,))).barrier("x"),  # type: ignore[arg-type]
        "ordinary tensor": lambda: symmpatterns.rendezvous(ones(2)),
        "sources of another call": lambda: operators.peer_sources([ones(1)], "pull float32 1", [5], 0, default),
        "double": lambda: operators.matmul_all_reduce(double, double, "sum", default),
    }.items():
        try:
            call()
            ended[case] = "no error"
        except Exception as error:
            ended[case] = f"{type(error).__name__}: {error}"
    out = operators.matmul_all_reduce(ones(2, 2), ones(2, 2), "sum", default)  # none of them used an epoch
    ended["afterwards"] = "right" if bool((out == 4).all()) else "wrong"
    return ended
