"""The examples run, check their own results, and report what they say they do."""

from __future__ import annotations

import subprocess
import unittest
from pathlib import Path

import pytest

from symmpatterns.cli import launch

ROOT = Path(__file__).resolve().parents[1]


class ExamplesTest(unittest.TestCase):
    def check(self, script: str, *arguments: str) -> str:
        command = launch.command(ROOT / "examples" / script, 2, ["--layers", "1", *arguments])
        done = subprocess.run(
            command,
            env={**launch.environment(2), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn("0 declined", done.stdout)
        self.assertIn("symmpatterns.matmul_all_reduce", done.stdout)
        return done.stdout

    @pytest.mark.slow
    def test_decode_loop(self) -> None:
        output = self.check("decode_loop.py", "--new", "3", "--rounds", "2")
        self.assertIn("checked: 3 tokens of 2 texts equal the unsplit model's", output)
        self.assertRegex(output, r"token: with symmpatterns \d+ us")

    @pytest.mark.slow
    def test_training_step(self) -> None:
        output = self.check("llama_training_step.py", "--steps", "2", "--rounds", "1", "--compare")
        self.assertIn("checked: 2 losses equal the unsplit model's", output)
        self.assertRegex(output, r"step: with symmpatterns \d+ us, without symmpatterns \d+ us")
