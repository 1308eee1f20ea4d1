"""Generated programs, compiled against eager: a few fresh ones, and all that failed once (programs.json)."""

from __future__ import annotations

import dataclasses
import json
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized

from symmpatterns.testing import run_ranks
from tests.programs import Shape, run_seeds

VIEWS = Shape(matmuls=False)  # collectives that only peer views rewrite
KEPT: list[dict[str, Any]] = json.loads((Path(__file__).parent / "programs.json").read_text())


def shape_of(record: dict[str, Any]) -> Shape:
    return Shape(**{**record["shape"], "dtype": getattr(torch, record["shape"].get("dtype", "float32"))})


class ProgramsTest(unittest.TestCase):
    @parameterized.expand(
        [
            ("dynamic", 2, [7], dataclasses.replace(VIEWS, dynamic=True)),
            ("matmuls", 2, [11], Shape()),
            ("gradients", 2, [21], Shape(gradients=True)),
        ]
    )
    def test_program(self, _: str, world_size: int, seeds: list[int], shape: Shape) -> None:
        self.check(world_size, seeds, shape)

    def check(self, world_size: int, seeds: list[int], shape: Shape) -> None:
        rewritten = run_ranks(run_seeds, world_size, seeds, shape, timeout=300)
        self.assertGreater(min(rewritten), len(seeds))

    @parameterized.expand(
        [
            ("float32", 2, [1, 2], VIEWS),
            ("bfloat16", 2, [6], dataclasses.replace(VIEWS, dtype=torch.bfloat16)),
            ("three ranks", 3, [7], dataclasses.replace(VIEWS, dynamic=True)),
            ("matmuls", 2, [12], Shape()),
        ]
    )
    @pytest.mark.slow
    def test_more_programs(self, _: str, world_size: int, seeds: list[int], shape: Shape) -> None:
        self.check(world_size, seeds, shape)

    @parameterized.expand([(str(record), record) for record in KEPT] or [("none", None)])
    def test_that_failed_once(self, _: str, record: dict[str, Any] | None) -> None:
        if record is None:
            self.assertEqual(KEPT, [])
            return
        run_ranks(run_seeds, record["ranks"], [record["seed"]], shape_of(record), timeout=300)

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
