"""The examples run, check their own results, and report what they say they do."""

from __future__ import annotations

import subprocess
import sys
import unittest
from pathlib import Path

import pytest

from symmpatterns.cli import launch

ROOT = Path(__file__).resolve().parents[1]


class ExamplesTest(unittest.TestCase):
    def run_command(self, *command: str) -> str:
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
        return done.stdout

    def check(self, script: str, *arguments: str) -> str:
        output = self.run_command(*launch.command(ROOT / "examples" / script, 2, ["--layers", "1", *arguments]))
        self.assertIn("symmpatterns.matmul_all_reduce", output)
        return output

    def test_all_of_them_are_run(self) -> None:
        """Each file is named in this one; llama.py is what two of them import."""
        for path in (ROOT / "examples").glob("*.py"):
            self.assertIn(f'"{path.name}"', Path(__file__).read_text(encoding="utf-8") + '"llama.py"')

    @pytest.mark.slow
    def test_custom_collective(self) -> None:
        output = self.run_command(sys.executable, str(ROOT / "examples" / "custom_collective.py"))
        self.assertIn("custom_collective.sum_ranks", output)
        self.assertIn("rank 1: largest difference from all_reduce ", output)

    @pytest.mark.slow  # `make demo` is the same script
    def test_mlp(self) -> None:
        output = self.check("tp_mlp.py", "--hidden", "64", "--tokens", "4", "--rounds", "1")
        self.assertIn("checked: both compiled models agree with the unsharded model in float64", output)

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
