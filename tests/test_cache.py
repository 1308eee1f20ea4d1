"""Inductor's FX-graph cache: a warm second process gets the rewritten graph, runs it, and reports it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch import Tensor

import symmpatterns
from symmpatterns.testing import compiled_code, run_ranks


def _compile(
    rank: int,
    world_size: int,
    caches: list[str],
    options: dict,
    aot_cache: bool,
    artifacts: list[bytes | None] | None = None,
) -> dict[str, object]:
    """Compiles one rewritten and one declined collective with the cache in ``caches[rank]``.

    With `artifacts` the rank first loads its own, and returns what it would save.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches[rank]
    if artifacts is not None and (mine := artifacts[rank]) is not None:
        assert torch.compiler.load_cache_artifacts(mine) is not None
    counters = torch._dynamo.utils.counters

    # Nothing for which Inductor would generate C++: with an empty cache its headers are built first, half a minute long.
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        largest = funcol.all_reduce(x @ w.t(), "max", dist.group.WORLD)
        return funcol.all_reduce(x @ w, "sum", dist.group.WORLD), largest

    x, w = torch.randn(8, 16), torch.randn(16, 16)
    with (
        symmpatterns.config.patch(**{"peer_views": False, "timeout_s": 60, **options}),
        torch._functorch.config.patch(enable_autograd_cache=aot_cache),
    ):
        actual, code = compiled_code(fn, x, w, fullgraph=True)
    expected = fn(x, w)
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other)
    report = symmpatterns.report()
    aot = counters["aot_autograd"]
    return {
        "hit": aot["autograd_cache_hit"] if aot_cache else counters["inductor"]["fxgraph_cache_hit"],
        "miss": counters["inductor"]["fxgraph_cache_miss"],
        "bypass": counters["inductor"]["fxgraph_cache_bypass"] + (aot["autograd_cache_bypass"] if aot_cache else 0),
        "rewritten": "torch.ops.symmpatterns.matmul_all_reduce.default(" in code,
        "records": [(r.strategy, r.code, r.op, r.shape, r.dtype) for r in report.records],
        "from cache": [r.from_cache for r in report.records],
        "artifacts": None if artifacts is None else torch.compiler.save_cache_artifacts()[0],  # type: ignore[index]
    }


RECORDS = [(None, "reduce_op", "max", (8, 16), torch.float32), ("template", None, "sum", (8, 16), torch.float32)]


COMPILE_ONCE = """
import torch, torch.distributed as dist, torch.distributed._functional_collectives as funcol
import symmpatterns
from symmpatterns.testing import fake_group

assert symmpatterns.__file__.startswith({root!r})
with fake_group(2):
    torch.compile(lambda x: funcol.all_reduce(x @ x, "sum", dist.group.WORLD))(torch.randn(8, 8))
counters = torch._dynamo.utils.counters["inductor"]
print(counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"], sep=",")
"""


class CacheTest(unittest.TestCase):
    def setUp(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.addCleanup(self._directory.cleanup)

    def run_with(self, names: list[str], aot_cache: bool = False, **options) -> list[dict]:
        caches = [str(Path(self._directory.name) / name) for name in names]
        return run_ranks(_compile, len(names), caches, options, aot_cache, timeout=180)

    @parameterized.expand([("fx", False), ("aot", True)])
    def test_a_warm_process_gets_the_rewritten_graph(self, _: str, aot_cache: bool) -> None:
        for cold in self.run_with(["a", "b"], aot_cache):
            self.assertEqual((cold["hit"], cold["bypass"], cold["rewritten"]), (0, 0, True))
            self.assertEqual(cold["records"], RECORDS)
            self.assertEqual(cold["from cache"], [False, False])
        for warm in self.run_with(["a", "b"], aot_cache):
            self.assertEqual((warm["hit"], warm["miss"], warm["bypass"], warm["rewritten"]), (1, 0, 0, True))
            self.assertEqual(warm["records"], RECORDS)
            self.assertEqual(warm["from cache"], [True, True])

    def test_saved_artifacts_warm_another_machine(self) -> None:
        caches = [str(Path(self._directory.name) / name) for name in "abcd"]
        cold = run_ranks(_compile, 2, caches[:2], {}, True, [None, None], timeout=180)
        saved = [result["artifacts"] for result in cold]
        for warm in run_ranks(_compile, 2, caches[2:], {}, True, saved, timeout=180):
            self.assertEqual((warm["hit"], warm["miss"], warm["rewritten"]), (1, 0, True))
            self.assertEqual((warm["records"], warm["from cache"]), (RECORDS, [True, True]))

    @parameterized.expand([("fx", False), ("aot", True)])
    def test_one_rank_warm_and_the_other_cold(self, _: str, aot_cache: bool) -> None:
        self.run_with(["a", "b"], aot_cache)
        warm, cold = self.run_with(["a", "c"], aot_cache)
        self.assertEqual((warm["hit"], cold["hit"]), (1, 0))
        self.assertEqual((warm["rewritten"], cold["rewritten"]), (True, True))
        self.assertEqual(warm["records"], cold["records"])

    @pytest.mark.slow
    def test_ranks_share_a_cache(self) -> None:
        self.run_with(["a", "a"])
        for warm in self.run_with(["a", "a"]):
            self.assertEqual(warm["hit"], 1)

    @pytest.mark.slow
    def test_other_sources_are_another_entry(self) -> None:
        """An edit of the installed package between two processes, as an upgrade is."""
        root = Path(self._directory.name)
        package = root / "symmpatterns"
        shutil.copytree(Path(symmpatterns.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        script = root / "compile.py"
        script.write_text(COMPILE_ONCE.format(root=str(root)), encoding="utf-8")

        def hits_and_misses() -> str:
            env = {**os.environ, "PYTHONPATH": str(root), "TORCHINDUCTOR_CACHE_DIR": str(root / "cache")}
            done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=200)
            self.assertEqual(done.returncode, 0, done.stderr)
            return done.stdout.split()[-1]

        self.assertEqual([hits_and_misses(), hits_and_misses()], ["0,1", "1,0"])
        with (package / "patterns" / "_matmul.py").open("a") as file:
            file.write("# changed\n")
        self.assertEqual([hits_and_misses(), hits_and_misses()], ["0,1", "1,0"])

    @pytest.mark.slow
    def test_another_configuration_is_another_entry(self) -> None:
        self.run_with(["a", "b"])
        for other in self.run_with(["a", "b"], enabled=False):
            self.assertEqual((other["hit"], other["rewritten"], other["records"]), (0, False, []))
        for back in self.run_with(["a", "b"]):
            self.assertEqual((back["hit"], back["rewritten"]), (1, True))
