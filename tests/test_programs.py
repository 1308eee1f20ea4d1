"""Generated programs, compiled against eager: a few fresh ones, and all that failed once (programs.json)."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parameterized import parameterized
from torch._inductor import config as inductor_config

import symmpatterns
from symmpatterns.testing import compiled_code, fake_group, run_ranks
from tests.allocation_operators import relaxed
from tests.families import FAMILIES, that_took
from tests.programs import TAKEN_BY, Program, Shape, draw, kept, operands, record_of, run_programs, run_seeds

VIEWS = Shape(matmuls=False)  # collectives that only peer views rewrite
KEPT: list[dict[str, Any]] = json.loads((Path(__file__).parent / "programs.json").read_text())


def _read_under_way(code: str) -> list[str]:
    """Kernels of generated code that are given a buffer between the start of its collective and its wait."""
    under_way: set[str] = set()
    found = []
    for line in code[code.index("def call(") :].splitlines():
        if match := re.search(r"_c10d_functional\.(\w+)\.default\((\w+)", line):
            name, buffer = match.groups()
            (under_way.discard if name == "wait_tensor" else under_way.add)(buffer)
        elif "cpp_fused" in line and not under_way.isdisjoint(re.findall(r"\w+", line)):
            found.append(line.strip())
    return found


class ProgramsTest(unittest.TestCase):
    @parameterized.expand(
        [
            ("dynamic", 2, [7], dataclasses.replace(VIEWS, dynamic=True)),
            ("as it ships", 2, [1, 2], Shape(ships=True)),
            ("three ranks", 3, [3], Shape(dtype=torch.bfloat16, matmuls=False)),
        ]
    )
    def test_program(self, _: str, world_size: int, seeds: list[int], shape: Shape) -> None:
        self.check(world_size, seeds, shape)

    def test_each_family(self) -> None:
        steps = [("nothing", TAKEN_BY[family], number, 1, 0, False) for number, family in enumerate(FAMILIES)]
        each = Program(steps, range(2, 2 + len(steps)))
        for rewritten in run_ranks(run_programs, 2, [each], Shape(), timeout=300):
            self.assertEqual(that_took(rewritten), set(FAMILIES))

    def check(self, world_size: int, seeds: list[int], shape: Shape) -> None:
        rewritten = run_ranks(run_seeds, world_size, seeds, shape, timeout=300)
        self.assertGreater(min(rewritten), len(seeds))

    @parameterized.expand(
        [
            ("float32", 2, [1, 2], VIEWS),
            ("bfloat16", 2, [6], dataclasses.replace(VIEWS, dtype=torch.bfloat16)),
            ("three ranks", 3, [7], dataclasses.replace(VIEWS, dynamic=True)),
            ("matmuls", 2, [11, 12], Shape()),
            ("gradients", 2, [21], Shape(gradients=True)),
        ]
    )
    @pytest.mark.slow
    def test_more_programs(self, _: str, world_size: int, seeds: list[int], shape: Shape) -> None:
        self.check(world_size, seeds, shape)

    def test_those_that_failed_once(self) -> None:
        for record in KEPT:
            program, shape, ranks = kept(record)
            with self.subTest(str(program)):
                run_ranks(run_programs, ranks, [program], shape, timeout=300)

    def test_nothing_reads_what_a_collective_still_writes(self) -> None:
        """In the generated code of the programs that failed once: one did, when a loop had been computed anew."""
        for record in KEPT:
            program, shape, ranks = kept(record)
            symmpatterns.report().clear()
            torch._dynamo.reset()
            caches = inductor_config.patch(fx_graph_cache=False)
            with self.subTest(str(program)), fake_group(ranks), caches, relaxed():
                groups = [dist.group.WORLD] * 2
                call = functools.partial(program, groups=groups)
                _, code = compiled_code(lambda *given, call=call: call(*given), *operands(shape, 0, ranks, 0))
                self.assertEqual(_read_under_way(code), [])
        self.assertIn("overlapped", {record.code for record in symmpatterns.report().declined})

    def test_what_is_kept_is_the_program(self) -> None:
        shape = Shape(dtype=torch.bfloat16)
        record = json.loads(json.dumps(record_of(draw(3, shape), shape, 2)))
        self.assertEqual(kept(record), (draw(3, shape), shape, 2))

    @parameterized.expand(
        [
            ("plain", Shape()),
            ("float64 dynamic", dataclasses.replace(VIEWS, dtype=torch.float64, dynamic=True)),
            ("dynamic", Shape(dynamic=True)),
            ("gradients", Shape(gradients=True)),
            ("long", Shape(steps=12)),
        ]
    )
    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_many(self, _: str, shape: Shape) -> None:
        run_ranks(run_seeds, 2, range(100, 160), shape, timeout=3500)
