"""The project around the library: what README promises runs, and says what the code says."""

from __future__ import annotations

import ast
import csv
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import pytest
import torch
from parameterized import parameterized

import symmpatterns
from symmpatterns import config
from symmpatterns.__main__ import parser
from symmpatterns.cli import doctor, launch
from symmpatterns.testing import run_ranks

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md"))))


def run(*command: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command from the project's root; its output is in `.stdout`, errors included."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def python(*arguments: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *arguments, timeout=timeout, **env)


def code_blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


class DocumentsTest(unittest.TestCase):
    @parameterized.expand([(name,) for name in DOCUMENTS])
    def test_make_targets_exist(self, document: str) -> None:
        text = (ROOT / document).read_text(encoding="utf-8")
        targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        named = set(re.findall(r"(?:^ {4}|`|^)make ([a-z][a-z-]*)", text, re.MULTILINE))
        self.assertTrue(named or document.startswith("docs/"), "no make command found")
        self.assertLessEqual(named, targets)

    @parameterized.expand([(name,) for name in DOCUMENTS])
    def test_commands_exist(self, document: str) -> None:
        text = (ROOT / document).read_text(encoding="utf-8")
        for line in re.findall(r"python3? -m symmpatterns ([a-z][\w -]*)", text):
            parser().parse_known_args(line.split())  # exits on a command that does not exist

    @parameterized.expand([(name,) for name in DOCUMENTS])
    def test_links_lead_somewhere(self, document: str) -> None:
        folder = (ROOT / document).parent
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / document).read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                self.assertTrue((folder / target).exists(), f"{document} links to {target}")

    def test_readme_lists_every_option(self) -> None:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE))
        self.assertEqual(rows, {name: repr(value) for name, value in config.options().items()})

    def test_tables_show_what_the_benchmark_rows_say(self) -> None:
        check = python("bench/table.py", "--check")
        self.assertEqual(check.returncode, 0, check.stdout)

    def test_readme_example(self) -> None:
        (example,) = (block for block in code_blocks("README.md", "python") if "init_process_group" in block)
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "example.py"
            script.write_text(example, encoding="utf-8")
            done = run(*launch.command(script, 2, []), **launch.environment(2))
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn("1 collectives rewritten, 0 declined", done.stdout)
        self.assertIn("symmpatterns.matmul_all_reduce", done.stdout)


def codes_in_sources() -> set[str]:
    """Every code with which symmpatterns/patterns declines a collective, found in the syntax trees.

    That is the first short constant among the arguments of ``decline(...)``, a keyword ``code=``, and the first element
    of a (code, reason) that a guard returns or a table holds.
    """
    found = set()

    def short(node: ast.expr) -> list[str]:
        value = getattr(node, "value", None)
        return [value] if isinstance(value, str) and re.fullmatch(r"[a-z]+(_[a-z]+)*", value) else []

    sources = ROOT / "symmpatterns"
    for path in [sources / "functions.py", *sorted((sources / "patterns").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name == "decline":
                    found |= set([code for argument in node.args for code in short(argument)][:1])
                found |= {code for keyword in node.keywords if keyword.arg == "code" for code in short(keyword.value)}
            values = node.values if isinstance(node, ast.Dict) else [getattr(node, "value", None)]
            for pair in values if isinstance(node, (ast.Dict, ast.Return)) else []:
                if isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
                    first, second = pair.elts
                    if isinstance(second, (ast.Constant, ast.JoinedStr)):
                        found |= set(short(first))
    return found


class CodesTest(unittest.TestCase):
    def test_every_code_is_explained(self) -> None:
        text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
        explained = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
        self.assertEqual(explained, sorted(set(explained)), "the table is sorted, each code once")
        self.assertEqual(set(explained), codes_in_sources())


class PackageTest(unittest.TestCase):
    def test_package_data_covers_the_native_sources(self) -> None:
        # Python 3.10 has no reader for TOML; this one line has the form of a Python list.
        listed = re.search(r"package-data\]\nsymmpatterns = (\[.*\])", (ROOT / "pyproject.toml").read_text())
        assert listed is not None
        patterns = ast.literal_eval(listed[1])
        package = ROOT / "symmpatterns"
        shipped = {path for pattern in patterns for path in package.glob(pattern)}
        # Untracked leftovers of other tools do not matter, so only kinds of files that the library reads are asked for.
        needed = {p for p in package.rglob("*") if p.suffix in (".cpp", ".h", ".json") or p.name == "py.typed"}
        self.assertEqual(needed - shipped, set())
        self.assertTrue(any(path.suffix == ".cpp" for path in shipped))

    def test_import_needs_no_installation_step(self) -> None:
        done = python("-c", "import symmpatterns; print(symmpatterns.__version__)")
        self.assertEqual(done.stdout.strip(), symmpatterns.__version__)


class DemoTest(unittest.TestCase):
    @pytest.mark.slow
    def test_demo_rewrites_checks_and_times(self) -> None:
        arguments = ("--hidden", "64", "--layers", "1", "--tokens", "4", "--rounds", "2")
        done = python("-m", "symmpatterns", "demo", *arguments)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn("checked: both compiled models agree", done.stdout)
        self.assertIn("1 collectives rewritten, 0 declined", done.stdout)
        self.assertRegex(done.stdout, r"(?m)^ +4 +\d+ us +\d+ us +\d+\.\d\dx$")
        removed = re.findall(r"^  - (.*)$", done.stdout, re.MULTILINE)
        added = re.findall(r"^  \+ (.*)$", done.stdout, re.MULTILINE)
        self.assertEqual(sum("_c10d_functional.all_reduce" in line for line in removed), 1, removed)
        self.assertEqual(sum("torch.ops.symmpatterns.matmul_all_reduce" in line for line in added), 1, added)
        self.assertFalse(any("all_reduce_" in line or "wait_tensor" in line for line in added), added)

    def test_example_without_ranks_says_how_to_start_it(self) -> None:
        env = {name: value for name, value in os.environ.items() if name != "RANK"}
        alone = subprocess.run(
            [sys.executable, "examples/tp_mlp.py"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
        )
        self.assertEqual(alone.returncode, 1)
        self.assertIn("torchrun --standalone --nproc-per-node 2 examples/tp_mlp.py", alone.stderr)

    def test_bad_arguments(self) -> None:
        self.assertEqual(launch.run("examples/missing.py", 2, []), 2)
        self.assertEqual(launch.run("examples/tp_mlp.py", 0, []), 2)
        unknown = python("-m", "symmpatterns", "doctor", "--quick")
        self.assertEqual(unknown.returncode, 2)
        self.assertIn("unknown arguments: --quick", unknown.stdout)


class DoctorTest(unittest.TestCase):
    @pytest.mark.slow
    def test_reports_a_working_backend(self) -> None:
        done = python("-m", "symmpatterns", "doctor")
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn("works: aten.mm -> all_reduce became symmpatterns.matmul_all_reduce, result exact", done.stdout)
        self.assertIn("Usable here: host", done.stdout)

    @unittest.skipIf(torch.cuda.device_count() >= 2, "with two GPUs there is a backend without a compiler")
    @pytest.mark.slow
    def test_fails_where_nothing_would_work(self) -> None:
        done = python("-m", "symmpatterns", "doctor", CXX="/nonexistent/compiler")
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("Nothing would be fused on this machine", done.stdout)
        self.assertIn("CXX='/nonexistent/compiler' is not an executable", done.stdout)

    def test_names_a_problem_and_its_remedy(self) -> None:
        text = "set SYMMPATTERNS_CACHE_DIR to a directory that can"
        self.check_problem({"SYMMPATTERNS_CACHE_DIR": "/proc/no/cache"}, text)

    @parameterized.expand(
        [
            ({"SYMMPATTERNS": "0"}, "SYMMPATTERNS=0 in the environment"),
            ({"SYMMPATTERNS_ENABLED": "0"}, "config.enabled is False"),
            ({"SYMMPATTERNS_HOST_KERNELS": "triton"}, "needs TRITON_INTERPRET=1"),
        ]
    )
    @pytest.mark.slow
    def test_names_other_problems(self, env: dict[str, str], text: str) -> None:
        self.check_problem(env, text)

    def check_problem(self, env: dict[str, str], text: str) -> None:
        done = python("-m", "symmpatterns", "doctor", "--no-trial", **env)
        self.assertIn(text, done.stdout)
        self.assertIn("1 problem:", done.stdout)

    def test_verdict(self) -> None:
        self.assertEqual(doctor.verdict(["host"], []), "Usable here: host. No problems found.")
        self.assertIn("2 problems:\n  * one\n  * two", doctor.verdict([], ["one", "two"]))


def _measure_with_an_impostor(rank: int, world_size: int) -> tuple[bool, list[str], str]:
    """Rows of a case in which one implementation forgets the other ranks, and one differs between ranks."""
    sys.path.insert(0, str(ROOT / "bench"))
    import contextlib
    import io

    import _common
    import bench_matmul_all_reduce as bench

    ranks = _common.Ranks(rank, world_size, torch.device("cpu"))
    case = bench.make_case(ranks, 8, 16, 32, torch.float32, interpreter=False)
    right = case.implementations[0].run
    case.implementations += [
        _common.Implementation("forgets the others", lambda: case.reference / 2),
        _common.Implementation("differs between ranks", lambda: right() * (1 + 2.0**-23 * (rank == 1))),
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        rows, all_correct = _common.rows_of(ranks, "test", case, ["eager"], rounds=2)
    return all_correct, [row.implementation for row in rows], printed.getvalue()


class BenchmarkTest(unittest.TestCase):
    def test_wrong_results_get_no_time(self) -> None:
        answers = run_ranks(_measure_with_an_impostor, 2)
        for all_correct, names, printed in answers:
            self.assertFalse(all_correct)
            self.assertEqual(names, ["fused", "mm + gloo", "mm alone"])
            self.assertRegex(printed, r"WRONG on rank \d: forgets the others 8x16x32: error .* is over the budget")
        self.assertTrue(any("differs between ranks" in printed for _, _, printed in answers))

    @pytest.mark.slow
    def test_script(self) -> None:
        done = python("-m", "symmpatterns", "bench", "--shapes", "3x64x32", "--rounds", "2", "--no-save")
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertRegex(done.stdout, r"3x64x32 +float32 +eager +fused [\d.]+ us  mm \+ gloo [\d.]+ us")
        self.assertRegex(done.stdout, r"3x64x32 +bfloat16 ")

    @pytest.mark.slow
    def test_models_are_measured_piece_by_piece(self) -> None:
        with tempfile.TemporaryDirectory() as folder:

            def measure(*arguments: str) -> tuple[str, list[list[str]]]:
                options = ["--models", "tiny", "--rounds", "2", "--folder", folder, *arguments]
                command = launch.command(ROOT / "bench" / "bench_llama.py", 2, options)
                done = run(*command, **launch.environment(2))
                self.assertEqual(done.returncode, 0, done.stdout)
                with (Path(folder) / "llama-cpu-w2.csv").open(newline="") as file:
                    return done.stdout, [[row["job"], row["implementation"]] for row in csv.DictReader(file)]

            rows = [[job, name] for job in ("decode-2", "prefill-32") for name in ("symmpatterns", "gloo")]
            self.assertEqual(measure("--jobs", "decode-2")[1], rows[:2])
            self.assertEqual(measure("--jobs", "prefill-32")[1], rows)
            output, kept = measure("--jobs", "decode-2", "train-32", "--seconds", "0")
            self.assertIn("tiny train-32: not begun", output)
            self.assertEqual(kept, rows)

    @pytest.mark.slow
    def test_bad_shape(self) -> None:
        done = python("-m", "symmpatterns", "bench", "--ranks", "1", "--shapes", "3x64")
        self.assertEqual(done.returncode, 1)
        self.assertIn("--shapes takes MxNxK such as 64x1024x1024, not '3x64'", done.stdout)


if __name__ == "__main__":
    unittest.main()
