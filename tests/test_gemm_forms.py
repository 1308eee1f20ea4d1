"""Producers and forms of the GEMM families: what is fused, what is declined and why, and the same bits as without."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch import Tensor
from torch._inductor import config as inductor_config

import symmpatterns
from symmpatterns import compat
from symmpatterns.patterns._product import as_matmul
from symmpatterns.testing import compiled_code, fake_group, run_ranks

FLOAT8 = torch.float8_e4m3fn
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def world() -> Any:
    return dist.group.WORLD


def integers(rank: int, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Small integers: their products are exact in any order, and too large for 16 bits without rounding."""
    generator = torch.Generator().manual_seed(101 * rank + sum(n * 7**i for i, n in enumerate(shape)))
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def powers(rank: int, *shape: int) -> Tensor:
    """Powers of two: scaling with them is exact."""
    return 2.0 ** (integers(rank + 50, *shape) % 3 - 1)


def ar(x: Tensor, op: str = "sum") -> Tensor:
    return funcol.all_reduce(x, op, world())


def rs(x: Tensor, dim: int = 0, op: str = "sum") -> Tensor:
    return funcol.reduce_scatter_tensor(x, op, dim, world())


def ag(x: Tensor, dim: int = 0) -> Tensor:
    if x.dtype == FLOAT8:  # gloo does not send it
        return funcol.all_gather_tensor(x.view(torch.uint8), dim, world()).view(FLOAT8)
    return funcol.all_gather_tensor(x, dim, world())


# --- operands, by rank and world size -------------------------------------------------------------------------------

M, N, K = 8, 16, 48


def matrices(dtype: torch.dtype = FP32, times: int = 1) -> Callable[[int, int], list[Tensor]]:
    """x [M, K], w [K * times, N], a bias [N]"""
    return lambda r, W: [
        integers(r, M, K, dtype=dtype),
        integers(r, K * (W if times > 1 else 1), N, dtype=dtype),
        integers(r, N, dtype=dtype),
    ]


def batch(dtype: torch.dtype = FP32) -> Callable[[int, int], list[Tensor]]:
    """x [3, M, K], w [3, K, N], a row for each [3, 1, N]"""
    return lambda r, W: [
        integers(r, 3, M, K, dtype=dtype),
        integers(r, 3, K, N, dtype=dtype),
        integers(r, 3, 1, N, dtype=dtype),
    ]


def float8(rows: bool = False, gathers: bool = False) -> Callable[[int, int], list[Tensor]]:
    """x [M, K] and w [K, N], column by column, in float8; their scales; a bias in bf16"""

    def make(r: int, W: int) -> list[Tensor]:
        x, w = integers(r, M, K).to(FLOAT8), integers(r, N, K).to(FLOAT8).t()
        height = M * W if gathers else M
        # Gathered rows have one scale on every rank.
        scales = (powers(0, height, 1), powers(r, 1, N)) if rows else (powers(0, 1)[0], powers(r, 1)[0])
        return [x, w, *scales, integers(r, N, dtype=BF16)]

    return make


def scaled(x: Tensor, w: Tensor, sx: Tensor, sw: Tensor, bias: Tensor | None = None, out: torch.dtype = BF16) -> Tensor:
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # not all that CPUs have of _scaled_mm is exact
        product = (x.float() @ w.float()) * sx * sw
        return (product if bias is None else product + bias).to(out)
    return torch._scaled_mm(x, w, sx, sw, bias=bias, out_dtype=out)


class Form(NamedTuple):
    """`family`: the one that fuses it; or `code`: why none does."""

    name: str
    fn: Callable[..., Any]
    operands: Callable[[int, int], list[Tensor]]
    family: str | None
    code: str | None = None
    text: str = ""  # in the reason
    runs: str = ""  # "always" or "slow": also between real ranks, compared with eager


AR, RS, AG = "matmul_all_reduce", "matmul_reduce_scatter", "all_gather_matmul"


def two_scaled(x: Tensor, w: Tensor, sx: Tensor, sw: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    full = ag(x)
    return scaled(full, w, sx, sw), scaled(full, w, sx, sw * 2, z)


def read_as_bytes(x: Tensor, w: Tensor, sx: Tensor, sw: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    full = funcol.all_gather_tensor(x.view(torch.uint8), 0, world())
    return scaled(full.view(FLOAT8), w, sx, sw), full.to(torch.int32).sum(0)


FORMS = [
    # float8
    Form("fp8", lambda x, w, sx, sw, z: ar(scaled(x, w, sx, sw)), float8(), AR),
    Form("fp8 rows bias", lambda x, w, sx, sw, z: ar(scaled(x, w, sx, sw, z)) + 1, float8(True), AR, runs="slow"),
    Form("fp8 to fp32", lambda x, w, sx, sw, z: ar(scaled(x, w, sx, sw, None, FP32)), float8(), AR, runs="slow"),
    Form("fp8 rs", lambda x, w, sx, sw, z: rs(scaled(x, w, sx, sw, z)), float8(), RS, runs="always"),
    Form(
        "fp8 rs rows 3-D",
        lambda x, w, sx, sw, z: rs(scaled(x, w, sx, sw).view(2, 4, N), 1, "avg"),
        float8(True),
        RS,
        runs="slow",
    ),
    Form("fp8 rs columns", lambda x, w, sx, sw, z: rs(scaled(x, w, sx, sw), 1), float8(True), RS),
    Form("fp8 ag", lambda x, w, sx, sw, z: scaled(ag(x), w, sx, sw) * 2, float8(gathers=True), AG),
    Form("fp8 ag rows", lambda x, w, sx, sw, z: scaled(ag(x), w, sx, sw, z), float8(True, True), AG, runs="always"),
    Form("fp8 ag shared", two_scaled, float8(True, True), AG, runs="slow"),
    Form("fp8 ag and bytes", read_as_bytes, float8(gathers=True), AG, runs="slow"),
    # conversions before the collective
    Form("bf16 to fp32", lambda x, w, z: ar((x @ w).float()) + 1, matrices(BF16), AR, runs="slow"),
    Form("fp32 to bf16", lambda x, w, z: ar((x @ w).bfloat16()), matrices(), AR, runs="always"),
    Form("fp16 bias to fp32 rs", lambda x, w, z: rs(torch.addmm(z, x, w).float()), matrices(FP16), RS, runs="slow"),
    Form("fp32 to fp16 rs 3-D", lambda x, w, z: rs((x @ w).view(2, 4, N).half(), 1), matrices(), RS),
    Form("bf16 to fp16", lambda x, w, z: ar((x @ w).half()), matrices(BF16), None, "dtype", "rounds it twice"),
    # batches
    Form("bmm", lambda x, w, z: ar(torch.bmm(x, w)) * 2, batch(), AR, runs="slow"),
    Form("bmm bf16 to fp32", lambda x, w, z: ar(torch.bmm(x, w).float()), batch(BF16), AR),
    Form("baddbmm", lambda x, w, z: ar(torch.baddbmm(z, x, w)), batch(BF16), AR, runs="always"),
    Form("baddbmm one row", lambda x, w, z: ar(torch.baddbmm(z[0], x, w)), batch(), AR),
    Form(
        "baddbmm full",
        lambda x, w, z: ar(torch.baddbmm(z.expand(3, M, N) + x[..., :1], x, w)),
        batch(),
        None,
        "bias_form",
    ),
    Form("bmm rs", lambda x, w, z: rs(torch.bmm(x, w), 1), batch(), None, "batched", "aten.bmm is a batch"),
    Form("bmm ag", lambda x, w, z: torch.bmm(ag(x, 1), w), batch(), None, "batched", "aten.bmm multiplies a batch"),
    # what stands in the way, operands of every layout
    Form("transposed product", lambda x, w, z: ar((x @ w).t()).relu(), matrices(), AR, runs="slow"),
    Form(
        "permuted product", lambda x, w, z: ar((x @ w).view(2, 4, N).permute(2, 0, 1).contiguous()) + 1, matrices(), AR
    ),
    Form("transposed rs", lambda x, w, z: rs((x @ w).t().contiguous()), matrices(), None, "reshape", "aten.permute"),
    Form("reshaped rs", lambda x, w, z: rs((x @ w).view(4, -1)), matrices(), None, "reshape", "columns are reshaped"),
    Form("strided operands", lambda x, w, z: ar(x[:, ::2] @ w[::2]), matrices(), AR, runs="always"),
    Form("transposed operands", lambda x, w, z: ar(x.t().contiguous().t() @ w.t().contiguous().t()), matrices(), AR),
    Form("strided bias", lambda x, w, z: ar(torch.addmm(w[:N, 0], x, w)), matrices(), AR, runs="slow"),
    # integers
    Form(
        "int8",
        lambda x, w, z: ar(torch._int_mm(x, w)),
        lambda r, W: [integers(r, 32, 32).to(torch.int8), integers(r, 32, 32).to(torch.int8), integers(r, 1)],
        None,
        "dtype",
        "multiplies integers",
    ),
]


class ScalesTest(unittest.TestCase):
    @parameterized.expand(
        [
            ("one", (), (), True),
            ("rows", (M, 1), (1, N), True),
            ("rows and one", (M, 1), (1, 1), True),
            ("blocks of 16", (M, 3), (3, N), False),
            ("blocks of 16 x 16", (M, 3), (3, 1), False),
            ("wrong way round", (1, M), (N, 1), False),
        ]
    )
    def test_scales(self, _: str, scale_a: tuple[int, ...], scale_b: tuple[int, ...], fuses: bool) -> None:
        graph = torch.fx.Graph()

        def node(shape: tuple[int, ...], dtype: torch.dtype) -> torch.fx.Node:
            made = graph.placeholder(f"p{len(graph.nodes)}")
            made.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
            return made

        factors = node((M, K), FLOAT8), node((K, N), FLOAT8), node(scale_a, FP32), node(scale_b, FP32)
        matmul = graph.call_function(torch.ops.aten._scaled_mm.default, factors, {"out_dtype": BF16})
        matmul.meta["val"] = torch.empty(M, N, dtype=BF16, device="meta")
        found = as_matmul(matmul)
        assert found is not None
        problem = found.problem()
        self.assertEqual(problem and problem[0], None if fuses else "scale_form")


def results(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


class FormsTest(unittest.TestCase):
    @parameterized.expand([(form.name, form) for form in FORMS])
    def test_form(self, _: str, form: Form) -> None:
        with fake_group(2), inductor_config.patch(fx_graph_cache=False), torch.no_grad():
            with symmpatterns.config.patch(peer_views=False):
                operands = form.operands(0, 2)
                result, code = compiled_code(form.fn, *operands, fullgraph=True)
                expected = form.fn(*operands)
        for actual, wanted in zip(results(result), results(expected)):
            self.assertEqual((actual.shape, actual.dtype), (wanted.shape, wanted.dtype))
        (record,) = symmpatterns.report().records
        if form.family is None:
            self.assertEqual(record.code, form.code)
            self.assertIn(form.text, str(record.reason))
            self.assertNotIn("torch.ops.symmpatterns", code)
        else:
            self.assertEqual((record.family, record.strategy), (form.family, "template"), record)
            self.assertEqual(code.count(f"torch.ops.symmpatterns.{form.family}.default("), 1)
            self.assertNotIn("_c10d_functional", code)
            self.assertNotIn("extern_kernels.", code)

    def test_dynamic_rows_with_a_scale_each(self) -> None:
        def fn(x: Tensor, w: Tensor, sx: Tensor, sw: Tensor) -> Tensor:
            return ar(scaled(x, w, sx, sw))

        with fake_group(2), inductor_config.patch(fx_graph_cache=False), torch.no_grad():
            compiled = torch.compile(fn, fullgraph=True, dynamic=True)
            w = integers(0, N, K).to(FLOAT8).t()
            for m in (3, 8, 5):
                x = integers(0, m, K).to(FLOAT8)
                args = (x, w, powers(0, m, 1), powers(0, 1, N))
                torch.testing.assert_close(compiled(*args), fn(*args))
        self.assertEqual(len(symmpatterns.report().rewrites), 1)


# --- between real ranks ---------------------------------------------------------------------------------------------


def compiled_forms(rank: int, world_size: int, when: str) -> list[tuple[str, bool, int]]:
    """(name, whether compiled and eager give the same bits, collectives rewritten) of each form that runs then."""
    answers = []
    for form in FORMS:
        if form.runs != when:
            continue
        torch._dynamo.reset()
        symmpatterns.report().clear()
        operands = form.operands(rank, world_size)
        actual = results(torch.compile(form.fn, fullgraph=True)(*operands))
        same = all(torch.equal(x, y) for x, y in zip(actual, results(form.fn(*operands))))
        answers.append((form.name, same, len(symmpatterns.report().rewrites)))
    return answers


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).double()


class Operation(NamedTuple):
    """One way to call the operators: what differs from a plain product of float32 matrices."""

    dtype: torch.dtype = FP32
    partial: torch.dtype | None = None
    out: torch.dtype | None = None
    scales: str = ""  # "one" or "rows"
    bias: bool = False
    batch: int | None = None
    shape: tuple[int, int, int] = (M, N, K)


OPERATIONS = [
    Operation(FLOAT8, scales="one"),
    Operation(FLOAT8, scales="rows", bias=True, shape=(24, 40, 33)),
    Operation(FLOAT8, FP32, scales="rows"),
    Operation(FLOAT8, BF16, FP32, scales="rows", shape=(48, 24, 16)),
    Operation(BF16, out=FP32, bias=True, shape=(48, 24, 70)),
    Operation(FP32, BF16, bias=True),
    Operation(FP16, out=FP32),
    Operation(BF16, FP32),
    Operation(FP32, batch=3),
    Operation(BF16, batch=2, bias=True, shape=(33, 17, 70)),
    Operation(FP16, out=FP32, batch=4, bias=True, shape=(5, 24, 20)),
    Operation(FP32, batch=1),
]


class Inputs:
    """Operands of all ranks for one operation, and the exact partial products."""

    def __init__(self, operation: Operation, world_size: int, device: torch.device) -> None:
        o = operation
        m, n, k = o.shape[0] * (1 if o.batch else world_size), o.shape[1] * world_size, o.shape[2]
        lead = () if o.batch is None else (o.batch,)
        ranks = range(world_size)
        self.a = [integers(r, *lead, m, k).to(device, o.dtype) for r in ranks]
        self.b = [integers(r, *lead, k, n).to(device, o.dtype) for r in ranks]
        if o.scales:  # column by column, as _scaled_mm wants it
            self.b = [b.t().contiguous().t() for b in self.b]
        self.partial = o.partial or (BF16 if o.dtype == FLOAT8 else o.dtype)
        self.out = o.out or self.partial
        count = {"one": (1, 1), "rows": (m, n)}.get(o.scales)
        self.scales: list[tuple[Tensor | None, Tensor | None]] = [
            (powers(r, count[0]).to(device), powers(r, count[1]).to(device)) if count else (None, None) for r in ranks
        ]
        bias_dtype = self.partial if o.dtype == FLOAT8 else o.dtype
        self.bias = [integers(r, *lead, n, dtype=bias_dtype).to(device) if o.bias else None for r in ranks]
        self.exact = [
            self.product(a, b, z, sa, sb) for a, b, z, (sa, sb) in zip(self.a, self.b, self.bias, self.scales)
        ]

    @staticmethod
    def product(a: Tensor, b: Tensor, bias: Tensor | None, scale_a: Tensor | None, scale_b: Tensor | None) -> Tensor:
        exact = a.double() @ b.double()
        if scale_a is not None and scale_b is not None:
            exact = exact * scale_a[:, None] * scale_b
        return exact if bias is None else exact + bias.double().unsqueeze(-2)

    def summed(self) -> Tensor:
        return torch.stack([rounded(exact, self.partial) for exact in self.exact]).sum(0).to(self.out)

    def options(self, rank: int, operation: Operation) -> dict[str, Any]:
        scale_a, scale_b = self.scales[rank]
        return {
            "bias": self.bias[rank], "scale_a": scale_a, "scale_b": scale_b, "partial_dtype": operation.partial,
            "out_dtype": operation.out,
        }  # fmt: skip


def wrong_results(operation: Operation, rank: int, world_size: int, device: torch.device) -> list[str]:
    """What differs from the exact result in what the operators give for `operation`."""
    ops, name = torch.ops.symmpatterns, world().group_name
    x = Inputs(operation, world_size, device)
    total, options = x.summed(), x.options(rank, operation)
    a, b = x.a[rank], x.b[rank]
    pairs = {"all_reduce": (ops.matmul_all_reduce(a, b, "sum", name, **options), total)}
    if operation.batch is None:
        for dim in (0, 1):
            mine = total.chunk(world_size, dim)[rank]
            pairs[f"scatter {dim}"] = ops.matmul_reduce_scatter(a, b, "sum", dim, name, **options), mine
    if operation.batch is None and (operation.dtype == FLOAT8 or operation.partial is None):
        whole, z = torch.cat(x.a), x.bias[rank]
        scale_a, scale_b = x.scales[0][0], x.scales[rank][1]
        if scale_a is not None and len(scale_a) > 1:
            scale_a = torch.cat([s for s, _ in x.scales if s is not None])
        options = {"scale_a": scale_a, "scale_bs": [scale_b], "out_dtype": operation.partial, "biases": [z]}
        full, (product,) = ops.all_gather_matmul(a, [b], 0, name, True, **options)
        pairs["gathered"] = full.float(), whole.float()
        pairs["gather"] = product, x.product(whole, b, z, scale_a, scale_b).to(x.partial)
    return [
        f"{what} {operation}: {got.dtype}, {int((got != want).sum())} of {got.numel()} differ"
        for what, (got, want) in pairs.items()
        if got.dtype != want.dtype or not torch.equal(got, want)
    ]


def operations(rank: int, world_size: int, kernels: str, some: slice = slice(None)) -> list[str]:
    """What went wrong, in every operator, for each operation."""
    with symmpatterns.config.patch(host_kernels=kernels, timeout_s=60):
        return [
            wrong
            for operation in OPERATIONS[some]
            for wrong in wrong_results(operation, rank, world_size, torch.device("cpu"))
        ]


def aten_ranks(rank: int, world_size: int) -> tuple[list[str], list[tuple[str, bool, int]]]:
    wrong = operations(rank, world_size, "aten")
    return wrong, compiled_forms(rank, world_size, "always") if world_size == 2 else []


INTERPRETED = {"TRITON_INTERPRET": "1"}


class RanksTest(unittest.TestCase):
    def check_forms(self, when: str, ranks: list[list[tuple[str, bool, int]]]) -> None:
        for answers in ranks:
            self.assertEqual(answers, [(form.name, True, 1) for form in FORMS if form.runs == when])

    def test_two_ranks(self) -> None:
        """The operators are exact, and compiled forms give the bits of eager."""
        ranks = run_ranks(aten_ranks, 2, timeout=250)
        self.assertEqual([wrong for wrong, _ in ranks], [[], []])
        self.check_forms("always", [answers for _, answers in ranks])

    def test_three_ranks(self) -> None:
        self.assertEqual([wrong for wrong, _ in run_ranks(aten_ranks, 3, timeout=250)], [[]] * 3)

    def test_interpreted_kernels(self) -> None:
        self.assertEqual(run_ranks(operations, 2, "triton", slice(1, None, 3), env=INTERPRETED, timeout=280), [[], []])

    @pytest.mark.slow
    def test_all_compiled_forms(self) -> None:
        self.check_forms("slow", run_ranks(compiled_forms, 2, "slow", timeout=400))

    @pytest.mark.slow
    def test_interpreted_kernels_on_more_ranks(self) -> None:
        for world_size in (2, 3, 4):
            ranks = run_ranks(operations, world_size, "triton", env=INTERPRETED, timeout=500)
            self.assertEqual(ranks, [[]] * world_size)

    @pytest.mark.slow
    def test_eight_ranks(self) -> None:
        self.assertEqual(run_ranks(operations, 8, "aten", timeout=400), [[]] * 8)


# --- bad input ------------------------------------------------------------------------------------------------------

ops = torch.ops.symmpatterns
a8, b8, one = torch.ones(4, 6).to(FLOAT8), torch.ones(6, 2).to(FLOAT8), torch.ones(1)


class BadInputTest(unittest.TestCase):
    @parameterized.expand(
        [
            ("no scales", lambda g: ops.matmul_all_reduce(a8, b8, "sum", g), ValueError, "scale_a is missing"),
            (
                "one scale",
                lambda g: ops.matmul_reduce_scatter(a8, b8, "sum", 0, g, scale_a=one),
                ValueError,
                "scale_b is missing",
            ),
            (
                "scale shape",
                lambda g: ops.matmul_all_reduce(a8, b8, "sum", g, scale_a=torch.ones(3), scale_b=one),
                ValueError,
                r"scale_a must have one element, or 4, one for each of the rows of a; its shape is \[3\]",
            ),
            (
                "scale dtype",
                lambda g: ops.matmul_all_reduce(a8, b8, "sum", g, scale_a=one.double(), scale_b=one),
                TypeError,
                "scale_a must be float32",
            ),
            (
                "scale of the gathered rows",
                lambda g: ops.all_gather_matmul(a8, [b8], 0, g, scale_a=torch.ones(4), scale_bs=[one]),
                ValueError,
                "or 8, one for each",
            ),
            (
                "scales of fp32",
                lambda g: ops.matmul_all_reduce(torch.ones(2, 2), torch.ones(2, 2), "sum", g, scale_a=one, scale_b=one),
                TypeError,
                "scales belong to torch.float8_e4m3fn operands",
            ),
            (
                "scale_bs",
                lambda g: ops.all_gather_matmul(a8, [b8], 0, g, scale_a=one, scale_bs=[one, one]),
                ValueError,
                "2 scale_bs for 1 matrices",
            ),
            (
                "out dtype",
                lambda g: ops.matmul_all_reduce(torch.ones(2, 2), torch.ones(2, 2), "sum", g, out_dtype=BF16),
                TypeError,
                "summed to torch.float32 or torch.float32, not to torch.bfloat16",
            ),
            (
                "partial dtype",
                lambda g: ops.matmul_all_reduce(
                    torch.ones(2, 2), torch.ones(2, 2), "sum", g, partial_dtype=torch.int32
                ),
                TypeError,
                "partial_dtype is one of",
            ),
            (
                "gathered dtype",
                lambda g: ops.all_gather_matmul(torch.ones(2, 2), [torch.ones(2, 2)], 0, g, out_dtype=BF16),
                TypeError,
                "are not rounded to torch.bfloat16",
            ),
            (
                "batches",
                lambda g: ops.matmul_all_reduce(torch.ones(2, 3, 4), torch.ones(3, 4, 5), "sum", g),
                ValueError,
                "a batch of 2 matrices, b of 3",
            ),
            (
                "float8 batch",
                lambda g: ops.matmul_all_reduce(
                    torch.ones(2, 3, 4).to(FLOAT8), torch.ones(2, 4, 5).to(FLOAT8), "sum", g, scale_a=one, scale_b=one
                ),
                ValueError,
                "multiply matrix by matrix",
            ),
        ]
    )
    def test_bad_operands(self, _: str, call: Callable[[str], Any], error: type[Exception], text: str) -> None:
        with fake_group(2) as name, self.assertRaisesRegex(error, text):
            call(name)

    def test_sizes_that_do_not_divide_raise_like_the_functional_collective(self) -> None:
        a, b = torch.ones(3, 4), torch.ones(4, 5)
        with fake_group(2) as name:
            for dim in (0, 1):
                with self.assertRaises(AssertionError):
                    funcol.reduce_scatter_tensor(a @ b, "sum", dim, world())
                with self.assertRaises(AssertionError):
                    ops.matmul_reduce_scatter(a, b, "sum", dim, name)

    @unittest.skipIf(compat.torch_version() < (2, 13), "torch's fake group leaves what it gathers uninitialised")
    def test_opcheck(self) -> None:
        with fake_group(2) as name:
            x, w, z = torch.randn(3, 4, 6), torch.randn(3, 6, 8), torch.randn(3, 8)
            torch.library.opcheck(ops.matmul_all_reduce.default, (x, w, "sum", name), {"bias": z})
            tests = ("test_faketensor", "test_aot_dispatch_dynamic")  # test_schema compares operands, but not in float8
            options = {"scale_a": one, "scale_b": torch.ones(1, 2), "out_dtype": FP32}
            torch.library.opcheck(ops.matmul_all_reduce.default, (a8, b8, "sum", name), options, test_utils=tests)
            torch.library.opcheck(
                ops.matmul_reduce_scatter.default, (a8, b8, "sum", 0, name), options, test_utils=tests
            )
            options = {"scale_a": torch.ones(8, 1), "scale_bs": [one], "out_dtype": FP32}
            torch.library.opcheck(ops.all_gather_matmul.default, (a8, [b8], 0, name, False), options, test_utils=tests)


if __name__ == "__main__":
    unittest.main()
