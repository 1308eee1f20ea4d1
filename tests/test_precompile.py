"""What a graph's operators will launch is compiled in a thread before they are called: the same kernels, and no others.

Without a GPU Triton compiles for a pretended one, and launches are replaced; operands are CPU tensors, which the kernels'
checks are kept from refusing.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch import Tensor
from torch.fx import Graph, Node

import symmpatterns
from symmpatterns import compat
from symmpatterns.testing import run_ranks

OPS = torch.ops.symmpatterns
GROUP = "the group's name"  # replaced by it
BF16, FP16, FLOAT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
COPIES = {"variant": "copy_engine", "options": {"parts": 2}}
# `library` 0: the products, too, are block sums.
COPIES_AND_PRODUCTS = {"variant": "copy_engine", "options": {"parts": 3, "tail": 64, "library": 0}}


def zeros(*size: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(size, dtype=dtype)


def all_reduce(M: int, N: int, K: int, **options: Any) -> tuple[Any, ...]:
    return OPS.matmul_all_reduce.default, (zeros(M, K), zeros(N, K).t(), "sum", GROUP), options


def float8_all_reduce() -> tuple[Any, ...]:
    a, b = zeros(64, 128, dtype=FLOAT8), zeros(64, 128, dtype=FLOAT8).t()
    scales = {"scale_a": torch.ones(64, 1), "scale_b": torch.ones(())}
    return OPS.matmul_all_reduce.default, (a, b, "sum", GROUP), scales


def reduce_scatter(dim: int, *size: int, **options: Any) -> tuple[Any, ...]:
    a = zeros(*size, dtype=options.pop("dtype", BF16))
    b = zeros(size[-1], 64, dtype=a.dtype)
    return OPS.matmul_reduce_scatter.default, (a, b, "avg", dim, GROUP), options


def all_gather(dim: int, M: int, K: int, **options: Any) -> tuple[Any, ...]:
    inner = K if dim == 0 else 2 * K
    bs = [zeros(inner, 48), zeros(72 * inner + 1)[1:].view(72, inner).t()]  # the second begins within its storage
    return OPS.all_gather_matmul.default, (zeros(M, K), bs, dim, GROUP, True), options


def norm(columns: int, with_residual: bool) -> tuple[Any, ...]:
    x, residual = zeros(columns, 6).t(), zeros(6, columns)  # not contiguous: the operator copies it
    return OPS.all_reduce_rms_norm.default, (x, residual if with_residual else None, None, 1e-5, "sum", GROUP), {}


def batch() -> tuple[Any, ...]:
    return OPS.matmul_all_reduce.default, (zeros(3, 48, 64), zeros(3, 64, 32), "sum", GROUP), {"bias": zeros(32)}


def barrier(in_turn: bool) -> tuple[Any, ...]:
    plan = "in turn: pull bfloat16 1 sum" if in_turn else "pull bfloat16 1 sum | pull bfloat16 1 sum"
    return OPS.peer_buffers.default, (plan, [8], torch.device("cpu"), GROUP), {}


CASES: list[tuple[str, Callable[[], tuple[Any, ...]], dict[str, Any] | None, set[str]]] = [
    ("one_shot", lambda: all_reduce(64, 64, 128), None, {"one_shot_kernel"}),
    ("unaligned", lambda: all_reduce(33, 40, 27, bias=zeros(40)), None, {"one_shot_kernel"}),
    ("float8", float8_all_reduce, None, {"one_shot_kernel"}),
    ("batch", batch, None, {"one_shot_kernel"}),
    ("two_shot_tma", lambda: all_reduce(8192, 512, 64), None, {"two_shot_tma_kernel"}),
    ("scattered_rows", lambda: reduce_scatter(1, 6, 16, 32, dtype=FP16), None, {"reduce_scatter_kernel"}),
    ("gathered_rows", lambda: all_gather(0, 64, 64, biases=[zeros(48), None]), None, {"gather_rows_kernel"}),
    ("gathered_columns", lambda: all_gather(1, 32, 64), None, {"gather_columns_kernel"}),
    ("norm", lambda: norm(1024, False), None, {"all_reduce_rms_norm_kernel"}),
    ("norm_with_residual", lambda: norm(520, True), None, {"all_reduce_rms_norm_kernel"}),
    ("barrier", lambda: barrier(False), None, {"barrier_kernel"}),
    ("barrier_in_turn", lambda: barrier(True), None, {"barrier_kernel"}),
    ("copied_all_reduce", lambda: all_reduce(385, 64, 64), COPIES, {"barrier_kernel", "block_sum_kernel"}),
    (
        "copied_scatter",
        lambda: reduce_scatter(1, 256, 64, bias=zeros(64)),
        COPIES_AND_PRODUCTS,
        {"barrier_kernel", "block_sum_kernel"},
    ),
    ("copied_gather", lambda: all_gather(0, 64, 64), COPIES, {"barrier_kernel"}),
]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


# --- in a rank's process ----------------------------------------------------------------------------------------------


def graph_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Any) -> Graph:
    """A graph that calls an operator twice on inputs like the tensors among its arguments."""
    from torch.utils._pytree import tree_map_only

    graph = Graph()

    def input_like(tensor: Tensor) -> Node:
        node = graph.placeholder(f"input{len(graph.nodes)}")
        node.meta["val"] = mode.from_tensor(tensor)
        return node

    args, kwargs = tree_map_only(Tensor, input_like, (args, kwargs))
    for _ in range(2):
        graph.call_function(target, args, kwargs)
    return graph


def named(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dist.group.WORLD.group_name if each is GROUP else each for each in args)


@contextlib.contextmanager
def as_on_a_gpu(launched: list[Any]) -> Iterator[None]:
    """CPU tensors are taken for a GPU's; what is launched goes to the list."""
    from triton.compiler import CompiledKernel

    from symmpatterns import compat, early_launch
    from symmpatterns.copy_engine import relay
    from symmpatterns.operators import _kernels, all_reduce_rms_norm, precompile
    from symmpatterns.triton_kernels import _launch
    from tests.pretended_gpu import pretended_gpu

    def implementation_of(op: str, kernels: str, tensor: Tensor) -> Any:
        return importlib.import_module(f"symmpatterns.triton_kernels.{op}").run

    def memory(workspace: Any, what: str, size: int) -> Any:
        return SimpleNamespace(buffers=[torch.zeros(size, dtype=torch.uint8) for _ in range(workspace.world_size)])

    def run(compiled: Any) -> Any:
        return lambda *args: launched.append((compiled.name, compiled.hash))

    replaced: list[tuple[Any, str, Any]] = [
        (precompile, "_DEVICE", "cpu"),
        (precompile, "_can_compile", lambda: True),
        (_kernels, "implementation_of", implementation_of),
        (all_reduce_rms_norm, "implementation_of", implementation_of),
        (compat, "current_cuda_device", lambda: -1),
        (torch.cuda, "set_device", lambda device: None),
        (early_launch, "pays", lambda num_bytes, device: num_bytes <= 4096),
        (relay, "allocate", memory),
        (_launch, "_call_of", lambda compiled, programs: None),
        (CompiledKernel, "run", property(run)),
        (CompiledKernel, "launch_metadata", lambda *args: None),
    ]
    families_of_kernels = ("matmul_all_reduce", "matmul_reduce_scatter", "all_gather_matmul", "block_sum")
    for name in families_of_kernels:
        module = importlib.import_module(f"symmpatterns.triton_kernels.{name}")
        replaced += [(module, "check_matmul", lambda *args, **kwargs: None), (module, "num_sms", lambda tensor: 132)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(pretended_gpu())
        stack.enter_context(symmpatterns.config.patch(host_kernels="triton"))
        for where, what, value in replaced:
            stack.enter_context(mock.patch.object(where, what, value))
        yield


def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The operator itself, on a workspace that launches."""
    from symmpatterns import compat
    from symmpatterns.groups import get_group
    from symmpatterns.operators import precompile
    from symmpatterns.triton_kernels import barrier

    workspace = precompile.CompilingWorkspace(
        get_group(dist.group.WORLD.group_name), compat.WithoutMemory(torch.device("cpu"))
    )
    workspace.site = 7  # not the one of the stand-in
    workspace.staging_ptrs, workspace.flag_ptrs = torch.zeros(2, 2, 2, dtype=torch.int64)
    workspace.state = torch.zeros(16, dtype=torch.int32)
    workspace.launches = {}
    if target is OPS.peer_buffers.default:
        barrier.run(workspace, turns=[torch.zeros(2, dtype=torch.int64)] if args[0].startswith("in turn") else [])
    else:
        operator, _ = precompile._OPERATORS[target.name()]
        with mock.patch("symmpatterns.operators.all_reduce_rms_norm.reserve", lambda w, n: w.staging_ptrs):
            operator(*args, **kwargs, workspace=workspace)


# Where graphs may be compiled: how operators come to a dispatch mode there.
CONTEXTS: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "below autograd": compat.below_autograd,
}


def rank_calls(
    rank: int, world_size: int, case: int, fails: bool = False, context: str = "plain"
) -> dict[str, Any] | None:
    """What was compiled in which thread, and launched; rank 1 has gone home, so nothing can be collective."""
    if rank > 0:
        return None
    import triton
    from torch._subclasses import FakeTensorMode

    from symmpatterns.operators import precompile
    from symmpatterns.triton_kernels import _background
    from tests.test_copy_engine import write_table

    compiled: list[tuple[bool, str]] = []
    launched: list[tuple[str, str]] = []

    def listen(src: Any, metadata: dict[str, Any], **rest: Any) -> None:
        compiled.append((threading.current_thread() is threading.main_thread(), metadata["hash"]))

    _, make, choice, _ = CASES[case]
    target, args, kwargs = make()
    args = named(args)
    with tempfile.TemporaryDirectory() as folder, as_on_a_gpu(launched), contextlib.ExitStack() as stack:
        if choice is not None:
            stack.enter_context(symmpatterns.config.patch(tuning_table=write_table(folder, "cpu", choice)))
        stack.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder))
        stack.enter_context(mock.patch.object(triton.knobs.compilation, "listener", listen))
        logged = stack.enter_context(mock.patch.object(precompile._log, "debug"))
        if fails:
            stack.enter_context(mock.patch.object(triton.JITFunction, "warmup", side_effect=RuntimeError))
        graph = graph_of(target, args, kwargs, FakeTensorMode())
        with CONTEXTS[context]():
            precompile.begin(graph)
        wait_until(lambda: _background._thread is None)  # a launch would not wait for what has not begun
        call(target, args, kwargs)
        errors = [str(each) for each in logged.call_args_list]
    return {"compiled": compiled, "launched": launched, "begun": len(precompile._begun), "errors": errors}


def rank_begins(rank: int, world_size: int) -> dict[str, Any] | None:
    """What is submitted for graphs for which nothing should be."""
    if rank > 0:
        return None
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from symmpatterns.groups import get_group
    from symmpatterns.operators import precompile

    target, args, kwargs = all_reduce(64, 64, 128)
    args = named(args)
    static = graph_of(target, args, kwargs, FakeTensorMode())
    with mock.patch.object(precompile._log, "debug") as logged:
        with mock.patch.object(precompile, "_can_compile", side_effect=AssertionError("it is on CPU")):
            precompile.begin(static)
        imported = [name for name in sys.modules if name.startswith("symmpatterns.triton_kernels")]
        with as_on_a_gpu([]), mock.patch("symmpatterns.triton_kernels._launch.submit") as submit:
            precompile.begin(graph_of(target, args, kwargs, FakeTensorMode(shape_env=ShapeEnv())))
            symbolic = submit.call_count
            with mock.patch.object(precompile, "_can_compile", lambda: False):
                precompile.begin(static)
            for name, value in (("is_fake", True), ("world_size", 1)):
                with mock.patch.object(get_group(args[-1]), name, value):
                    precompile.begin(static)
            impossible = submit.call_count
            for _ in range(2):
                precompile.begin(static)
            twice = submit.call_count
    return {
        "imported": imported, "symbolic": symbolic, "impossible": impossible, "twice": twice,
        "errors": [str(each) for each in logged.call_args_list],
    }  # fmt: skip


def rank_program(rank: int, world_size: int) -> tuple[list[str], list[tuple[Any, ...]]]:
    """What the pass would have compiled for a program, in Inductor's hands: errors, and kernels with sizes of operands."""
    from symmpatterns.operators import precompile

    begin, submitted = precompile.begin, []

    def note(kernel: Any, task: Any) -> None:
        _, _, _, args, _ = task.args
        submitted.append((kernel.fn.__name__, [tuple(each.shape) for each in args if isinstance(each, Tensor)][:3]))

    def begin_as_on_a_gpu(graph: Graph) -> None:
        with as_on_a_gpu([]), mock.patch("symmpatterns.triton_kernels._launch.submit", note):
            begin(graph)

    def program(x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
        hidden = funcol.all_reduce(x @ w, "sum", dist.group.WORLD) + residual
        return funcol.all_reduce(hidden.tanh(), "sum", dist.group.WORLD) * 2

    operands = zeros(64, 27), zeros(27, 33), zeros(64, 33)
    with (
        mock.patch.object(precompile, "begin", begin_as_on_a_gpu),
        mock.patch.object(precompile._log, "debug") as logged,
        symmpatterns.config.patch(force=True),
    ):
        with torch.inference_mode(), torch._inductor.config.patch(force_disable_caches=True):
            torch.compile(program)(*operands)
    return [str(each) for each in logged.call_args_list], submitted


# --- the tests --------------------------------------------------------------------------------------------------------


class ForeseenKernelsTest(unittest.TestCase):
    @parameterized.expand([(name, case) for case, (name, *_) in enumerate(CASES)])
    def test_launches_find_their_kernels(self, _: str, case: int) -> None:
        self.check(case, "plain")

    @parameterized.expand([(name, context) for name in ("norm", "scattered_rows") for context in list(CONTEXTS)[1:]])
    def test_copies_that_an_operator_makes_are_none_anywhere(self, name: str, context: str) -> None:
        self.check([name for name, *_ in CASES].index(name), context)

    def check(self, case: int, context: str) -> None:
        answer, _ = run_ranks(rank_calls, 2, case, False, context, timeout=120)
        self.assertEqual(answer["errors"], [])
        self.assertEqual({name for name, _ in answer["launched"]}, CASES[case][-1])
        self.assertEqual([hash for in_main, hash in answer["compiled"] if in_main], [])
        in_thread = [hash for _, hash in answer["compiled"]]
        self.assertEqual(len(set(in_thread)), len(in_thread))
        self.assertEqual(set(in_thread), {hash for _, hash in answer["launched"]})
        self.assertEqual(answer["begun"], 1)  # the graph has the call twice

    def test_in_a_compilation(self) -> None:
        for errors, submitted in run_ranks(rank_program, 2, timeout=120):
            self.assertEqual(errors, [])
            of_each = [
                ("barrier_kernel", [(2, 2), (16,), (2, 2)]),
                ("one_shot_kernel", [(64, 27), (27, 33), (64, 33)]),
            ]
            self.assertEqual(submitted, of_each)

    def test_an_error_in_the_thread(self) -> None:
        answer, _ = run_ranks(rank_calls, 2, 0, True, timeout=120)
        self.assertEqual({name for name, _ in answer["launched"]}, CASES[0][-1])
        self.assertEqual([in_main for in_main, _ in answer["compiled"]], [True])
        self.assertEqual(len(answer["errors"]), 1)

    def test_where_nothing_is_foreseen(self) -> None:
        answer, _ = run_ranks(rank_begins, 2, timeout=120)
        self.assertEqual(answer, {"imported": [], "symbolic": 0, "impossible": 0, "twice": 1, "errors": []})


class Kernel:
    """Stands for a JITFunction."""

    def __init__(self) -> None:
        self.launches = 0
        self.compilations = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: object, **constants: object) -> None:
        self.launches += 1

    def warmup(self, *args: object, **constants: object) -> None:
        self.compilations += 1


class ThreadTest(unittest.TestCase):
    def test_a_launch_waits_for_the_compilation_of_its_kernel_that_is_running(self) -> None:
        from symmpatterns.triton_kernels import _background, _launch

        kernel, other, go_on = Kernel(), Kernel(), threading.Event()
        self.addCleanup(go_on.set)
        _background.submit(kernel, go_on.wait)
        wait_until(lambda: _background._is_taken(kernel))
        _background.submit(kernel, lambda: None)
        _background.submit(other, lambda: None)
        _launch.launch_kernel(other, 1, {}, (), {})  # its task is waiting: it is not waited for
        self.assertEqual((other.compilations, other.launches), (1, 1))
        with mock.patch.object(_launch, "_call_of", lambda compiled, programs: None):
            threads = [
                threading.Thread(target=launch, args=(kernel, 1, {}, (), {}), daemon=True)
                for launch in (_launch.launch_kernel, _launch._Recorder([]).launch)
            ]
            for thread in threads:
                thread.start()
                thread.join(0.2)
                self.assertTrue(thread.is_alive())
            self.assertEqual((kernel.compilations, kernel.launches), (0, 0))
            go_on.set()
            for thread in threads:
                thread.join(10)
        self.assertEqual(kernel.launches, 2)
        wait_until(lambda: not _background.is_expected(kernel))
        _launch.launch_kernel(kernel, 1, {}, (), {})
        self.assertLessEqual(kernel.compilations, 2)  # none by the last launch, which nobody could disturb
        self.assertEqual(kernel.launches, 3)

    def test_the_thread_does_not_compile_what_a_launch_compiles(self) -> None:
        from symmpatterns.triton_kernels import _background

        kernel, done = Kernel(), []
        with _background.exclusive(kernel):
            _background.submit(kernel, lambda: done.append(1))
            time.sleep(0.2)
            self.assertEqual(done, [])
        wait_until(lambda: bool(done))
        self.assertEqual(done, [1])

    def test_the_thread_survives_errors_and_ends(self) -> None:
        from symmpatterns.triton_kernels import _background

        done: list[int] = []
        with self.assertLogs("symmpatterns", logging.DEBUG) as logged:
            _background.submit(self, lambda: 1 / 0)
            _background.submit(self, lambda: done.append(1))
            wait_until(lambda: not _background.is_expected(self))
        self.assertEqual(done, [1])
        self.assertIn("ZeroDivisionError", logged.output[0])
        wait_until(lambda: _background._thread is None)
        self.assertIsNone(_background._thread)
        _background.submit(self, lambda: done.append(2))
        wait_until(lambda: not _background.is_expected(self))
        self.assertEqual(done, [1, 2])

    def test_filters_of_warnings_are_left_alone(self) -> None:
        from symmpatterns.triton_kernels import _background, _launch

        seen = _launch._Warnings()
        filters: list[bool] = []

        def task() -> None:
            before = list(warnings.filters)
            with seen.catch_warnings():
                seen.simplefilter("ignore")
                filters.append(list(warnings.filters) == before)

        _background.submit(self, task)
        wait_until(lambda: not _background.is_expected(self))
        task()
        self.assertEqual(filters, [True, False])
        self.assertIs(seen.warn, warnings.warn)

    def test_a_process_that_ends_or_forks(self) -> None:
        """It waits for the task that is running; a child has none to wait for, and can begin anew."""
        code = """
import os, threading, time
from symmpatterns.triton_kernels import _background
begun = threading.Event()
def slow(): begun.set(); time.sleep(0.5); print("slow", flush=True)
_background.submit("kernel", slow)
for _ in range(9): _background.submit("kernel", lambda: (time.sleep(5), print("late")))
begun.wait()
if child := os.fork():
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    assert not _background.is_expected("kernel")
    _background.submit("kernel", lambda: print("anew", flush=True))
    while _background.is_expected("kernel"): time.sleep(0.01)
    os._exit(7)
"""
        began = time.monotonic()
        run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
        self.assertEqual((run.returncode, run.stdout, run.stderr), (0, "anew\nchild 7\nslow\n", ""))
        self.assertLess(time.monotonic() - began, 30)


def rank_compiles_on_gpu(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Which kernels of ours were compiled in which thread, by a program whose caches are empty."""
    import triton

    os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / str(rank))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / f"inductor-{rank}")
    compiled: list[tuple[str, bool]] = []

    def listen(src: Any, metadata: dict[str, Any], **rest: Any) -> None:
        if src.fn.__module__.startswith("symmpatterns."):
            compiled.append((metadata["name"], threading.current_thread() is threading.main_thread()))

    triton.knobs.compilation.listener = listen

    def program(x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
        hidden = funcol.all_reduce(x @ w, "sum", dist.group.WORLD) + residual
        return funcol.all_reduce(hidden.tanh(), "sum", dist.group.WORLD) * 2

    generator = torch.Generator().manual_seed(rank)
    x, w = (torch.randn(*size, generator=generator) for size in ((64, 1024), (1024, 512)))
    residual = torch.ones(64, 512)
    with symmpatterns.config.patch(force=True, timeout_s=60), torch.no_grad():
        cuda = [t.cuda().bfloat16() for t in (x, w / 32, residual)]
        result = torch.compile(program, fullgraph=True)(*cuda)
        expected = program(*(t.cpu().float() for t in cuda)).cuda()
        error = float((result - expected).norm() / expected.norm())
    return {"compiled": compiled, "error": error}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class GpuTest(unittest.TestCase):
    def test_no_kernel_of_ours_is_compiled_at_its_launch(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for answer in run_ranks(rank_compiles_on_gpu, 2, folder, backend="nccl", timeout=200):
                self.assertLess(answer["error"], 2e-2)
                self.assertEqual([name for name, in_main in answer["compiled"] if in_main], [])
                self.assertEqual({name for name, _ in answer["compiled"]}, {"one_shot_kernel", "barrier_kernel"})


if __name__ == "__main__":
    unittest.main()
