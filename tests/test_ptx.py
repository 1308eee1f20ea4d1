"""Reads what the kernels compile to for sm_90: the order of stores, barriers and flags that no interpreter can check.

Needs no GPU. A path through the code is followed instruction by instruction, so that the order of basic blocks in the
text does not matter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pretended_gpu import Driver
from tests.ptx_lint import (
    BARRIER,
    DATA_STORE,
    FLAG_READ,
    FLAG_WRITE,
    HEAD_READ,
    KERNEL_LAUNCH,
    KERNEL_WAIT,
    Code,
    lint,
    lint_norm,
    lint_order_of_kernels,
    without,
)

# --- compiling, in a process of its own (this one may have loaded triton for its interpreter) -------------------------

# kernel, dtype of the operands, (BM, BN, BK, num_warps, num_stages), descriptor of a, of b, world size
LARGE, MEDIUM, SMALL, FLOAT = (128, 256, 64, 8, 4), (128, 128, 64, 4, 4), (16, 64, 256, 4, 4), (64, 64, 32, 4, 3)
PAIRED, LARGE_BY_TMA = (128, 128, 64, 4, 3), (128, 256, 64, 8, 3)
LARGE8, PAIRED8, SMALL8 = (128, 256, 128, 8, 4), (128, 128, 128, 4, 3), (16, 64, 512, 4, 4)  # float8
DEEP8 = (64, 128, 256, 4, 4)
OPERAND_IN_REGISTERS = r"wgmma\.mma_async[^;{]*\{[^}]*\},\s*\{"  # the sum, then a
# Every kernel, and every way to move data and to multiply.
VARIANTS = [
    ("one_shot_kernel", "bf16", SMALL, "rows", "columns", 2),
    ("one_shot_kernel", "fp32", FLOAT, "", "rows", 2),
    ("two_shot_kernel", "bf16", LARGE, "rows", "columns", 2),
    ("two_shot_kernel", "bf16", PAIRED, "rows", "columns", 2),
    ("two_shot_tma_kernel", "fp16", MEDIUM, "columns", "rows", 2),
    ("reduce_scatter_kernel", "bf16", SMALL, "", "", 8),
    ("reduce_scatter_tma_kernel", "bf16", LARGE_BY_TMA, "rows", "columns", 2),
    ("gather_rows_kernel", "bf16", LARGE, "rows", "columns", 2),
    ("gather_columns_kernel", "bf16", SMALL, "", "", 8),
    ("two_shot_kernel", "fp8e4nv", PAIRED8, "", "columns", 2),
]
MORE_VARIANTS = [
    ("two_shot_kernel", "fp8e4nv", PAIRED8, "rows", "columns", 2),
    ("one_shot_kernel", "fp16", SMALL, "", "", 8),
    ("two_shot_kernel", "bf16", LARGE, "columns", "rows", 8),
    ("two_shot_kernel", "bf16", MEDIUM, "", "", 4),
    ("two_shot_kernel", "fp32", FLOAT, "", "", 2),
    ("two_shot_tma_kernel", "bf16", LARGE_BY_TMA, "rows", "columns", 2),
    ("two_shot_tma_kernel", "bf16", MEDIUM, "", "", 2),
    ("reduce_scatter_kernel", "bf16", LARGE, "rows", "columns", 2),
    ("reduce_scatter_kernel", "fp32", FLOAT, "rows", "rows", 4),
    ("gather_rows_kernel", "fp16", MEDIUM, "", "", 8),
    ("gather_rows_kernel", "fp32", FLOAT, "", "", 2),
    ("gather_columns_kernel", "bf16", LARGE, "", "columns", 2),
    ("one_shot_kernel", "fp8e4nv", SMALL8, "", "columns", 2),
    ("gather_rows_kernel", "fp8e4nv", LARGE8, "rows", "columns", 2),
    ("gather_rows_kernel", "fp8e4nv", DEEP8, "rows", "columns", 2),
    ("gather_columns_kernel", "fp8e4nv", LARGE8, "", "columns", 2),
]
# What a launch can switch off or on; compiled, and read for what it has.
SWITCHED: list[tuple[Any, ...]] = [
    ("one_shot_kernel", "bf16", SMALL, "rows", "columns", 2, {"AVERAGE": True, "bias": None}),
    ("two_shot_kernel", "bf16", PAIRED, "", "", 2, {"BATCHED": True, "batch": "i32"}),
    ("gather_columns_kernel", "bf16", MEDIUM, "", "", 4, {"EXCHANGE": False, "gathered": None, "SENDERS": 0}),
]
MORE_SWITCHED: list[tuple[Any, ...]] = [
    ("two_shot_kernel", "bf16", LARGE, "rows", "columns", 4, {"AVERAGE": True, "PARTIAL": "bf16", "out": "*fp32"}),
    ("gather_rows_kernel", "bf16", LARGE, "rows", "columns", 2, {"bias": None, "gathered": None}),
    ("gather_rows_kernel", "bf16", LARGE, "rows", "columns", 2, {"EXCHANGE": False, "gathered": None, "SENDERS": 0}),
]
BARRIERS = [(2, False), (3, True), (8, True)]
BLOCK_SUM = ("bf16", MEDIUM, "rows", "columns", 2, {"staged": "*bf16", "AVERAGE": False})
NORMS = [("bf16", 2, 8192), ("fp32", 4, 1024)]
_POINTERS = {"staging_ptrs": "*i64", "flag_ptrs": "*i64", "state_ptr": "*i32"}
_ALIGNED = {
    "N",
    "K",
    "row_elements",
    "block_n",
    "step_n",
    "step_o",
    "step_g",
    "stride_am",
    "stride_bn",
    "stride_om",
    "stride_gm",
    "stride_az",
    "stride_bz",
    "stride_oz",
}
_ONE = {"stride_ak", "stride_bk", "stride_on", "stride_gk", "stride_sa", "stride_sb"}


def compile_variant(
    kernel: Any,
    dtype: str,
    tile: tuple[int, ...],
    a_desc: str,
    b_desc: str,
    world_size: int,
    switches: dict[str, Any] | None = None,
) -> Any:
    """The compiled kernel, as a launch with aligned, contiguous operands (b of `linear`'s layout) would get it."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    BM, BN, BK, num_warps, num_stages = tile
    is_float8 = dtype == "fp8e4nv"
    sent = "bf16" if is_float8 else dtype
    types = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    switches = {"BATCHED": False, "PARTIAL": sent, "AVERAGE": False, **(switches or {})}
    switches["PARTIAL"] = types[switches["PARTIAL"]]
    given = {name: switches.pop(name) for name in ("out", "batch", "staged") if name in switches}  # types of arguments
    if "batch" not in given:
        switches["batch"] = 1
    if not is_float8:
        switches |= {"scale_a": None, "scale_b": None}
    constants: dict[str, Any] = {
        "WORLD_SIZE": world_size, "BM": BM, "BN": BN, "BK": BK, "GROUP_M": 8, "A_DESC": a_desc, "B_DESC": b_desc,
        "PIECES": 2, "SENDERS": 16 if tile == LARGE else 0, "EXCHANGE": True, "STAGGER": 350,
        **switches,
    }  # fmt: skip

    def operand(desc: str, rows: int, columns: int) -> str:
        shape = {"rows": f"[{rows}, {columns}]", "columns": f"[{columns}, {rows}]"}.get(desc)
        return f"*{dtype}" if shape is None else f"tensordesc<{dtype}{shape}>"

    names = kernel.arg_names
    gathers = "a_desc" in names
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    for name in names:
        if name in constants or name in _ONE:
            signature[name], values[name] = "constexpr", constants.get(name, 1)
        elif name == "a_desc" or (name == "a" and not gathers):
            signature[name] = operand(a_desc, BM, BK)
        elif name == "b":
            signature[name] = operand(b_desc, BK, BN)
        elif name in given:
            signature[name] = given[name]
        elif name in ("a", "gathered"):
            signature[name] = f"*{dtype}"
        elif name in ("bias", "out"):
            signature[name] = f"*{sent}"
        elif name in ("scale_a", "scale_b"):
            signature[name] = "*fp32"
        elif name in _POINTERS:
            signature[name] = _POINTERS[name]
        else:
            signature[name] = "i64" if name in ("timeout_ns", "step_o", "step_g") else "i32"
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in _ALIGNED]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_simple(kernel: Any, types: dict[str, str], values: dict[str, Any], num_warps: int) -> str:
    """The PTX of a kernel whose arguments, but for `types`, are 32-bit integers or the constants `values`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(values, "constexpr") | _POINTERS | {"timeout_ns": "i64"} | types
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "")[:1] == "*"},
    )
    options = {"num_warps": num_warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def compile_barrier(world_size: int, takes_turns: bool) -> str:
    import triton

    from symmpatterns.triton_kernels.barrier import barrier_kernel

    values = {"WORLD_SIZE": world_size, "LANES": triton.next_power_of_2(world_size), "TAKES_TURNS": takes_turns}
    return compile_simple(barrier_kernel, {"turns_ptr": "*i64"}, values, 1)


def compile_norm(dtype: str, world_size: int, columns: int) -> str:
    from symmpatterns.triton_kernels.all_reduce_rms_norm import all_reduce_rms_norm_kernel

    operands = ("x_ptr", "residual_ptr", "weight_ptr", "norm_ptr", "total_ptr")
    types = dict.fromkeys(operands, f"*{dtype}") | {"sentinel_ptrs": "*i64", "eps": "fp32"}
    values = {"WORLD_SIZE": world_size, "BLOCK": columns, "HAS_RESIDUAL": True, "HAS_WEIGHT": True, "AVERAGE": False}
    values |= {"columns": columns, "place": columns}
    return compile_simple(all_reduce_rms_norm_kernel, types, values, max(1, columns // 512))


def compile_all(folder: Path, variants: list[tuple[Any, ...]]) -> None:
    import triton

    from symmpatterns.triton_kernels import all_gather_matmul, block_sum, matmul_all_reduce, matmul_reduce_scatter

    triton.runtime.driver.set_active(Driver())
    modules = (matmul_all_reduce, matmul_reduce_scatter, all_gather_matmul)
    functions = [item for module in modules for item in vars(module).items()]
    kernels = {name: fn for name, fn in functions if name.endswith("_kernel") and hasattr(fn, "arg_names")}
    missing = kernels.keys() - {variant[0] for variant in VARIANTS}
    if missing:
        raise AssertionError(f"no variant compiles {missing}")
    shared = {}
    for index, (name, *variant) in enumerate(variants):
        compiled = compile_variant(kernels[name], *variant)
        (folder / f"{index}.ptx").write_text(compiled.asm["ptx"])
        shared[index] = compiled.metadata.shared
    (folder / "shared.json").write_text(json.dumps(shared))
    (folder / "block-sum.ptx").write_text(compile_variant(block_sum.block_sum_kernel, *BLOCK_SUM).asm["ptx"])
    for world_size, takes_turns in BARRIERS:
        (folder / f"barrier-{world_size}-{takes_turns}.ptx").write_text(compile_barrier(world_size, takes_turns))
    for norm in NORMS:
        (folder / f"norm-{norm}.ptx").write_text(compile_norm(*norm))


class CompiledKernelsTest(unittest.TestCase):
    variants: list[tuple[Any, ...]] = VARIANTS
    switched = SWITCHED
    ptx: dict[int, str]
    shared: dict[str, int]
    barriers: list[str]
    norms: list[str]
    block_sum: str

    @classmethod
    def setUpClass(cls) -> None:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        root = str(Path(__file__).parent.parent)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, folder, cls.__name__]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
            if done.returncode:
                raise AssertionError(f"the kernels do not compile for sm_90:\n{done.stdout}\n{done.stderr}")
            cls.ptx = {i: Path(folder, f"{i}.ptx").read_text() for i in range(len(cls.variants) + len(cls.switched))}
            cls.shared = json.loads(Path(folder, "shared.json").read_text())
            cls.barriers = [Path(folder, f"barrier-{w}-{turns}.ptx").read_text() for w, turns in BARRIERS]
            cls.block_sum = Path(folder, "block-sum.ptx").read_text()
            cls.norms = [Path(folder, f"norm-{norm}.ptx").read_text() for norm in NORMS]

    def each(self) -> list[tuple[int, tuple[Any, ...], str]]:
        return [(index, variant, self.ptx[index]) for index, variant in enumerate(self.variants)]

    def test_stores_barriers_and_flags_are_in_order(self) -> None:
        for index, variant, ptx in self.each():
            with self.subTest(variant):
                self.assertEqual(lint(ptx), [], index)

    def test_switched_variants(self) -> None:
        for index, (name, *_, switches) in enumerate(self.switched, start=len(self.variants)):
            with self.subTest(name, **switches):
                self.assertLessEqual(self.shared[str(index)], 227 << 10)
                if switches.get("EXCHANGE", True):
                    self.assertEqual(lint(self.ptx[index]), [])
                else:  # it only reads what an earlier kernel has received
                    self.assertFalse(re.search(FLAG_WRITE + "|" + FLAG_READ, self.ptx[index]))

    def test_kernels_take_effect_one_after_the_other(self) -> None:
        """Also those that are launched while the one before runs, which any of them may be."""
        for ptx in (*self.ptx.values(), *self.barriers, *self.norms, self.block_sum):
            with self.subTest(ptx[ptx.index(".entry") :][:60]):
                self.assertEqual(lint_order_of_kernels(ptx), [])
                early = re.sub(KERNEL_WAIT + r".*", "", ptx)
                self.assertTrue(any("memory is touched" in problem for problem in lint_order_of_kernels(early)))
                self.assertTrue(any("the one before this" in problem for problem in lint_order_of_kernels(early)))
                self.assertTrue(
                    any("never launched" in problem for problem in lint_order_of_kernels(without(KERNEL_LAUNCH, ptx)))
                )

    def test_a_barrier_tells_and_asks_all_peers_at_once(self) -> None:
        """One instruction for all flags, with a lane of the warp for each; and a wait that ends."""
        for ptx, (_, takes_turns) in zip(self.barriers, BARRIERS, strict=True):
            code = Code(ptx)
            (flag,) = code.find(FLAG_WRITE)
            self.assertRegex(code.lines[flag], r"\.sys\.release")
            self.assertRegex(code.lines[flag], r"^@%p\d+ ")
            first, again = code.find(FLAG_READ)
            for read in (first, again):
                self.assertRegex(code.lines[read], r"\.sys\.acquire")
            self.assertTrue(code.find(r"^trap;"))
            # The flag of this call is written whatever the wait finds.
            self.assertIsNone(code.reaches(first, code.before, r"^ld\.param", re.escape(code.lines[flag])))
            self.assertEqual(len(code.find(r"st\.global\.b64")), 3 if takes_turns else 1)

    def test_data_that_is_its_own_flag(self) -> None:
        for norm, ptx in zip(NORMS, self.norms, strict=True):
            with self.subTest(norm):
                self.assertEqual(lint_norm(ptx), [])
            breaks = {
                "no head": without(HEAD_READ, ptx),
                "no barrier": without(BARRIER, ptx),
                "no sentinel": without(r"st\.global\.v\d", ptx),
                "not loaded anew": ptx.replace("ld.volatile", "ld"),
                "not bounded": without(r"^\s*trap;", ptx),
            }
            for problem, broken in breaks.items():
                with self.subTest(norm, problem=problem):
                    self.assertTrue(any(problem in found for found in lint_norm(broken)), lint_norm(broken))

    def test_lint_finds_each_broken_rule(self) -> None:
        breaks: dict[str, Callable[[str], str]] = {
            "no barrier between": lambda ptx: without(BARRIER, ptx),
            "without release": lambda ptx: re.sub(r"\.release(\S*\.exch)", r".relaxed\1", ptx),
            "at scope sys": lambda ptx: re.sub(r"\.sys(\S*\.exch)", r".gpu\1", ptx),
            "ever acquired": lambda ptx: re.sub(
                r"\.sys(\.acquire)", r".gpu\1", re.sub(r"\.acquire\.sys", ".acquire", ptx)
            ),
            "orders nothing": lambda ptx: re.sub(r"(\b(?:ld|atom)\S*)\.acquire", r"\1.relaxed", ptx, count=1),
            "the count of": lambda ptx: without(BARRIER, ptx),
            "warp-specialised": lambda ptx: ptx.replace("ret;", "setmaxnreg.dec.sync.aligned.u32 24;\nret;"),
            "not bounded": lambda ptx: without(r"^\s*trap;", ptx),
        }
        for _, variant, ptx in self.each():
            for problem, break_ in breaks.items():
                with self.subTest(variant=variant, problem=problem):
                    self.assertTrue(any(problem in found for found in lint(break_(ptx))), lint(break_(ptx)))

    def test_lint_finds_a_tma_store_that_is_not_awaited(self) -> None:
        """What Triton makes of a TMA store by itself: the flag would be written while the tile is on its way."""
        tested = 0
        for _, variant, ptx in self.each():
            if variant[0] == "two_shot_tma_kernel":
                tested += 1
                broken = re.sub(r"(cp\.async\.bulk\.wait_group)(?=\s)", r"\1.read", ptx)
                with self.subTest(variant):
                    self.assertTrue(any("a TMA store" in problem for problem in lint(broken)), lint(broken))
                    unmet = without(BARRIER, ptx)
                    self.assertTrue(any("the arrival of a TMA store" in problem for problem in lint(unmet)))
        self.assertTrue(tested)

    def test_one_missing_barrier_is_found(self) -> None:
        """The race of Triton 3.6, as it looks in the code: only the barriers right before a flag are gone."""
        lines = self.ptx[0].splitlines()
        flag = next(i for i, line in enumerate(lines) if re.search(FLAG_WRITE, line))
        store = max(i for i in range(flag) if re.search(DATA_STORE, lines[i]))
        between = [line for line in lines[store:flag] if not re.search(BARRIER, line)]
        self.assertLess(len(between), flag - store)
        broken = "\n".join(lines[:store] + between + lines[flag:])
        self.assertTrue(any("no barrier between the store" in problem for problem in lint(broken)))

    def test_data_moves_in_vectors_and_through_the_tensor_cores(self) -> None:
        for index, (_, dtype, tile, a_desc, _, _), ptx in self.each():
            with self.subTest(index):
                self.assertTrue("st.global.v4" in ptx)
                self.assertEqual(re.findall(r"st\.global\S*16\b", ptx), [], "elements are stored one by one")
                if tile in (LARGE8, PAIRED8, DEEP8):
                    self.assertTrue(re.search(r"wgmma\.mma_async\S*e4m3", ptx))
                elif tile in (LARGE, MEDIUM, PAIRED, LARGE_BY_TMA):
                    self.assertTrue("wgmma.mma_async" in ptx)
                elif dtype != "fp32":
                    self.assertTrue("mma.sync" in ptx)
                else:  # IEEE float32: tensor cores would cut it to tf32
                    self.assertFalse("mma" in re.sub(r"//.*", "", ptx))
                if a_desc:
                    self.assertTrue("cp.async.bulk.tensor" in ptx)

    def test_an_operand_in_registers_is_found(self) -> None:
        product = "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%f1, %f2, %f3, %f4}, "
        self.assertTrue(re.search(OPERAND_IN_REGISTERS, product + "{%r1, %r2, %r3, %r4}, %rd1, 1, 1, 1;"))
        self.assertFalse(re.search(OPERAND_IN_REGISTERS, product + "%rd2, %rd1, 1, 1, 1;"))

    def test_products_are_read_from_shared_memory(self) -> None:
        """Operands in registers are overwritten while three products still read them: Triton 3.6 waits for no more."""
        for index, _, ptx in self.each():
            with self.subTest(index):
                self.assertIsNone(re.search(OPERAND_IN_REGISTERS, ptx))

    def test_the_loop_over_k_stays_pipelined(self) -> None:
        """All stages in shared memory, which must hold them: flags in the epilogue have cost the pipelining before."""
        for index, (_, _, tile, _, _, _), _ in self.each():
            self.assertLessEqual(self.shared[str(index)], 227 << 10)
            if tile in (LARGE, PAIRED, LARGE_BY_TMA, LARGE8, PAIRED8, DEEP8):
                BM, BN, BK, _, num_stages = tile
                item = 1 if tile in (LARGE8, PAIRED8, DEEP8) else 2
                self.assertGreaterEqual(self.shared[str(index)], num_stages * (BM + BN) * BK * item)
            if tile in (PAIRED, PAIRED8):  # two programs a multiprocessor, each with 1 KiB of the system's
                self.assertLessEqual(2 * (self.shared[str(index)] + 1024), 228 << 10)


@pytest.mark.slow
class MoreCompiledKernelsTest(CompiledKernelsTest):
    variants: list[tuple[Any, ...]] = MORE_VARIANTS
    switched = MORE_SWITCHED


if __name__ == "__main__":
    chosen = globals()[sys.argv[2]]
    compile_all(Path(sys.argv[1]), [*chosen.variants, *chosen.switched])
