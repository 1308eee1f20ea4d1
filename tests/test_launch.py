"""Repeated launches get the arguments that a launch of their own would give them; Triton's launcher is replaced."""

from __future__ import annotations

import contextlib
import unittest
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from parameterized import parameterized
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from symmpatterns.triton_kernels import _launch, all_gather_matmul, matmul_all_reduce, matmul_reduce_scatter

WORLD_SIZE = 2
TABLES = {
    "staging_ptrs": torch.zeros(2, WORLD_SIZE, dtype=torch.int64),
    "flag_ptrs": torch.zeros(2, WORLD_SIZE, dtype=torch.int64),
    "state": torch.zeros(16, dtype=torch.int32),
    "rank": 1,
    "world_size": WORLD_SIZE,
    "timeout_s": 1.0,
}
Run = Callable[[_launch.Launcher], None]


class Compiled:
    """Stands for a JITFunction: launching it gives back nothing that Triton made."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: None


def encoded(descriptor: Any) -> tuple[Any, ...]:
    return "map", descriptor.base.data_ptr(), *descriptor.block_shape


def all_reduce(rows: int | None, bias: bool, variant: str = "two_shot") -> tuple[list[Tensor | None], Run]:
    a, b, out = torch.zeros(96, 64), torch.zeros(128, 64).t(), torch.zeros(96, 128)
    z = torch.zeros(128) if bias else None
    plan = matmul_all_reduce.plan(96, 128, 64, a.dtype, WORLD_SIZE, 8, rows=rows, variant=variant)
    return [a, b, z, out], lambda launcher: matmul_all_reduce.launch(
        a, b, z, out, plan=plan, launcher=launcher, **TABLES
    )


def reduce_scatter(rows: int | None, scatter_dim: int) -> tuple[list[Tensor | None], Run]:
    a, b = torch.zeros(96, 64), torch.zeros(64, 128)
    out = torch.zeros(48, 128) if scatter_dim == 0 else torch.zeros(96, 64)
    plan = matmul_reduce_scatter.plan(96, 128, 64, a.dtype, WORLD_SIZE, 8, scatter_dim=scatter_dim, rows=rows)
    return [a, b, None, out], lambda launcher: matmul_reduce_scatter.launch(
        a, b, None, out, plan=plan, launcher=launcher, **TABLES
    )


def all_gather(rows: int | None, gather_dim: int, with_gathered: bool) -> tuple[list[Tensor | None], Run]:
    a = torch.zeros(48, 64)
    whole = (96, 64) if gather_dim == 0 else (48, 128)
    gathered = torch.zeros(whole) if with_gathered else None
    bs = [torch.zeros(whole[1], n) for n in (32, 0, 64)]
    biases = [torch.zeros(32), None, torch.zeros(64)]
    outs = [torch.zeros(whole[0], n) for n in (32, 0, 64)]
    plan = all_gather_matmul.plan(48, 64, 64, a.dtype, WORLD_SIZE, 8, gather_dim=gather_dim, rows=rows)
    return [a, gathered, *bs, *biases, *outs], lambda launcher: all_gather_matmul.launch(
        a, bs, biases, outs, gathered, plan=plan, launcher=launcher, **TABLES
    )


CASES: list[tuple[str, Callable[[], tuple[list[Tensor | None], Run]]]] = [
    ("all_reduce", lambda: all_reduce(None, True)),
    ("all_reduce_one_shot", lambda: all_reduce(None, True, "one_shot")),
    ("all_reduce_in_parts", lambda: all_reduce(32, False)),
    ("reduce_scatter_rows", lambda: reduce_scatter(16, 0)),
    ("reduce_scatter_columns", lambda: reduce_scatter(None, 1)),
    ("all_gather_rows", lambda: all_gather(16, 0, True)),
    ("all_gather_columns", lambda: all_gather(None, 1, True)),
    ("all_gather_matmul_only", lambda: all_gather(None, 0, False)),
]


def pointers_of(operands: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in operands]


class RepeatedLaunchTest(unittest.TestCase):
    @parameterized.expand(
        [(f"{name}_{kind}", make, kind == "packed") for name, make in CASES for kind in ("flat", "packed")]
    )
    def test_arguments(self, _: str, make: Callable[[], tuple[list[Tensor | None], Run]], packed: bool) -> None:
        launched: list[tuple[Any, ...]] = []

        def call_of(compiled: Any, programs: int) -> _launch._Call:
            head = [programs, 1, 1, 0, "head"]
            return _launch._Call(lambda *args: launched.append(args), head, packed, [encoded] * 2, (0, 0))

        def recorded(run: Run, operands: Sequence[Tensor | None]) -> tuple[_launch._Step, ...]:
            recorder = _launch._Recorder(pointers_of(operands))
            run(lambda kernel, *rest: recorder.launch(Compiled(kernel), *rest))
            return recorder.steps

        def launcher(kernel: Any, programs: int, sources: Any, args: Sequence[Any], constants: dict[str, Any]) -> None:
            """What Triton's launcher would get."""
            bound = dict(zip(kernel.arg_names, args)) | constants
            flat: list[Any] = []
            for name in kernel.arg_names:
                value = bound[name]
                if isinstance(value, TensorDescriptor):
                    flat += [encoded(value), *value.shape, *value.strides]
                else:
                    flat.append(value.data_ptr() if isinstance(value, Tensor) else value)
            head = [programs, 1, 1, 77, "head"]
            expected.append((*head, flat) if packed else (*head, *flat))

        expected: list[tuple[Any, ...]] = []
        (operands, run), (others, run_others) = make(), make()
        modules = (matmul_all_reduce, matmul_reduce_scatter, all_gather_matmul)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(_launch, "_call_of", call_of))
            for module in modules:  # whose checks want a GPU
                stack.enter_context(mock.patch.object(module, "check_matmul"))
            steps = recorded(run, operands)
            run_others(launcher)
        self.assertGreater(len(steps), 0)
        for _ in range(2):
            launched.clear()
            for step in steps:
                step(pointers_of(others), torch.device("cpu"), 77)
            self.assertEqual(launched, expected)


if __name__ == "__main__":
    unittest.main()
