"""The Triton code that Inductor generates around peer views, read without a GPU: its Triton backend, for CPU tensors."""

from __future__ import annotations

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
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering

from symmpatterns import compat, config, cost_model
from tests.pretended_gpu import pretended_gpu
from tests.test_peer_views import generated
from tests.test_peer_views_turns import PROGRAMS, gather_columns, norm_gather, shared, two_sites

warnings.filterwarnings("ignore", category=FutureWarning)


class _Stop(Exception):
    pass


def triton_code(fn: Callable[..., Any], *args: Any, world_size: int) -> str:
    codes = []
    codegen = GraphLowering.codegen

    def stop(graph: Any) -> None:
        codes.append(codegen(graph)[0].value)
        raise _Stop

    with (
        pretended_gpu(),
        inductor_config.patch(cpu_backend="triton"),
        mock.patch.object(GraphLowering, "codegen", stop),
    ):
        try:
            generated(fn, *args, world_size=world_size)
        except Exception as error:
            if _Stop.__name__ not in repr(error):  # Inductor puts it into an error of its own
                raise
    (code,) = codes
    return str(code)


def kernels(code: str) -> list[str]:
    return re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", code, flags=re.DOTALL)


def restored(code: str) -> list[str]:
    """What the autotuner would save before it tries a kernel, and put back after."""
    return re.findall(r"'mutated_arg_names': (\[.*?\])", code)


def gather_columns_twice(x: Tensor, weight: Tensor) -> Tensor:
    """Not in turn: the places of a rank are columns of everybody's slot, with those of others between them."""
    return gather_columns(gather_columns(x, weight) + 1, weight)


class TritonCodeTest(unittest.TestCase):
    def setUp(self) -> None:
        self.enterContext(mock.patch.dict(cost_model.TAKES_TURNS, cpu=True))
        self.enterContext(config.patch(template=False, keep_overlap=False))
        self.x, self.weight = torch.randn(8, 64), torch.randn(64)

    @parameterized.expand([(fn, rows) for fn in PROGRAMS for rows in (4, 64)])
    def test_loops_find_the_slot(self, fn: Callable[..., Any], rows: int) -> None:
        """Two kernels, also for few bytes, for which Inductor is reluctant to fuse what stores to several buffers."""
        code = triton_code(fn, torch.randn(rows, 64), self.weight, world_size=4)
        found = kernels(code)
        # Two results of different sizes are two loops.
        self.assertEqual(len(found), 3 if fn is shared else 2, [kernel.split("def ")[-1][:80] for kernel in found])
        store, read = found[:2]
        self.assertRegex(store, r"tl\.load\(in_ptr\d+ \+ \(0\)\)")
        self.assertRegex(read, r"tl\.load\(in_ptr\d+ \+ \(1\)\)")
        self.assertRegex(store, r"tl\.store\(out_ptr\d+ \+ \(.*\d+\*tmp\d+")
        self.assertRegex(read, r"tl\.load\(in_ptr\d+ \+ \(.*\d+\*tmp\d+")

    @parameterized.expand([(fn,) for fn in (*PROGRAMS, two_sites, gather_columns_twice)])
    def test_nobody_saves_and_restores_the_peers_memory(self, fn: Callable[..., Any]) -> None:
        """Between the parts that a kernel stores lies what peers store: put back, it would be lost."""
        code = triton_code(fn, self.x, self.weight, world_size=2)
        self.assertGreaterEqual(len(restored(code)), 2)
        # A temporary that a kernel reads and overwrites is an in_out_ptr, and restored; the peers' memory is an out_ptr.
        self.assertNotIn("'out_ptr", "".join(restored(code)))

    @parameterized.expand([(norm_gather,), (gather_columns_twice,)])
    def test_inductor_by_itself_would(self, fn: Callable[..., Any]) -> None:
        with mock.patch.object(compat, "_peers_buffers", lambda graph: set()):
            code = triton_code(fn, self.x, self.weight, world_size=2)
        self.assertIn("'out_ptr", "".join(restored(code)))

    def test_what_is_not_the_peers_is_restored(self) -> None:
        def fn(x: Tensor, weight: Tensor) -> Tensor:
            y = funcol.all_reduce(x.sin(), "sum", dist.group.WORLD) + 1
            x.add_(weight)
            return y

        code = triton_code(fn, self.x, self.weight, world_size=2)
        self.assertIn("ptr", "".join(restored(code)))


if __name__ == "__main__":
    unittest.main()
