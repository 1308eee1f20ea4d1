"""The hook: installed on import, composed with what others put there, and never lost silently."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unittest
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as funcol
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import symmpatterns
from symmpatterns import compat, inductor_hook
from symmpatterns.testing import compiled_code, fake_group


class _Counting(CustomGraphPass):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> Any:
        return "counting"


def _compile_once() -> str:
    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return funcol.all_reduce(x @ w, "sum", torch.distributed.group.WORLD)

    with inductor_config.patch(fx_graph_cache=False):
        return compiled_code(fn, torch.randn(8, 16), torch.randn(16, 8))[1]


class HookTest(unittest.TestCase):
    def setUp(self) -> None:
        symmpatterns.uninstall()
        inductor_config.post_grad_custom_post_pass = None

    def tearDown(self) -> None:
        symmpatterns.uninstall()
        inductor_config.post_grad_custom_post_pass = None
        symmpatterns.install()

    def test_all_threads_are_rewritten(self) -> None:
        """torch keeps what is assigned to its configuration for the assigning thread, from 2.13 on."""
        source = """
            import threading, symmpatterns
            from symmpatterns import compat
            from torch._inductor import config
            def seen():
                found = []
                thread = threading.Thread(target=lambda: found.append(symmpatterns.is_installed()))
                thread.start(); thread.join()
                return found[0], symmpatterns.is_installed()
            assert seen() == (True, True)
            symmpatterns.uninstall()
            assert seen() == (False, False)
            symmpatterns.install()
            with config.patch(post_grad_custom_post_pass=None):
                assert seen() == (compat.torch_version() >= (2, 13), False)
            symmpatterns.uninstall()
            assert seen() == (False, False)
            symmpatterns.install()
            assert seen()[1]
        """
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(source)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_install_and_uninstall(self) -> None:
        self.assertFalse(symmpatterns.is_installed())
        symmpatterns.install()
        symmpatterns.install()
        self.assertTrue(symmpatterns.is_installed())
        self.assertIs(inductor_config.post_grad_custom_post_pass, symmpatterns.post_grad_pass)
        symmpatterns.uninstall()
        symmpatterns.uninstall()
        self.assertFalse(symmpatterns.is_installed())
        self.assertIsNone(inductor_config.post_grad_custom_post_pass)

    def test_a_hook_set_before_keeps_running_and_is_restored(self) -> None:
        theirs = _Counting()
        inductor_config.post_grad_custom_post_pass = theirs
        symmpatterns.install()
        with fake_group(2):
            code = _compile_once()
        self.assertEqual(theirs.calls, 1)
        self.assertIn("symmpatterns.matmul_all_reduce", code)
        self.assertIsNotNone(inductor_config.post_grad_custom_post_pass.uuid())
        symmpatterns.uninstall()
        self.assertIs(inductor_config.post_grad_custom_post_pass, theirs)

    def test_a_plain_function_set_before_keeps_running(self) -> None:
        calls = []
        inductor_config.post_grad_custom_post_pass = lambda graph: calls.append(graph)
        symmpatterns.install()
        with fake_group(2):
            code = _compile_once()
        self.assertEqual(len(calls), 1)
        self.assertIn("symmpatterns.matmul_all_reduce", code)
        # It has no identity, so Inductor may not cache: as it was without us.
        self.assertIsNone(inductor_config.post_grad_custom_post_pass.uuid())

    def test_a_hook_put_around_ours_survives_uninstall(self) -> None:
        from symmpatterns.inductor_hook import Chain

        symmpatterns.install()
        theirs = _Counting()
        inductor_config.post_grad_custom_post_pass = Chain((symmpatterns.post_grad_pass, theirs))
        self.assertTrue(symmpatterns.is_installed())
        symmpatterns.uninstall()
        self.assertIs(inductor_config.post_grad_custom_post_pass, theirs)

    def test_being_overwritten_is_reported(self) -> None:
        symmpatterns.install()
        inductor_config.post_grad_custom_post_pass = _Counting()
        self.assertFalse(symmpatterns.is_installed())
        self.assertIn("was overwritten after symmpatterns was installed", str(symmpatterns.report()))
        symmpatterns.install()
        self.assertTrue(symmpatterns.is_installed())
        self.assertNotIn("overwritten", str(symmpatterns.report()))

    def test_environment_switch(self) -> None:
        self.check_environment_switch("0", "False")

    @pytest.mark.slow
    def test_environment_switch_spelt_otherwise(self) -> None:
        self.check_environment_switch("1", "True")
        self.check_environment_switch("off", "False")

    def check_environment_switch(self, value: str, installed: str) -> None:
        run = subprocess.run(
            [sys.executable, "-c", "import symmpatterns; print(symmpatterns.is_installed())"],
            env={**os.environ, "SYMMPATTERNS": value},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual(run.stdout.strip(), installed, run.stderr)

    def test_identity_covers_configuration_and_topology(self) -> None:
        first = symmpatterns.post_grad_pass.uuid()
        self.assertEqual(first, symmpatterns.post_grad_pass.uuid())
        for change in (
            {"force": True},
            *({name: False} for name in ("enabled", "template", "peer_views", "allocation")),
            {"timeout_s": 7},
        ):
            with symmpatterns.config.patch(**change):
                self.assertNotEqual(first, symmpatterns.post_grad_pass.uuid(), change)
        before = os.environ.get("LOCAL_WORLD_SIZE")
        os.environ["LOCAL_WORLD_SIZE"] = "77"
        try:
            self.assertNotEqual(first, symmpatterns.post_grad_pass.uuid())
        finally:
            os.environ.pop("LOCAL_WORLD_SIZE")
            if before is not None:
                os.environ["LOCAL_WORLD_SIZE"] = before

    def test_identity_covers_sources(self) -> None:
        package = Path(inductor_hook.__file__).parent
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "symmpatterns"
            shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
            with unittest.mock.patch.object(inductor_hook, "__file__", str(copy / "inductor_hook.py")):
                before = inductor_hook._sources_hash.__wrapped__()
                (copy / "patterns" / "_matmul.py").open("a").write("# changed\n")
                after = inductor_hook._sources_hash.__wrapped__()
        self.assertEqual(before, symmpatterns.post_grad_pass.uuid()[1])
        self.assertNotEqual(before, after)

    def test_a_list_with_others_before_and_after(self) -> None:
        if compat.torch_version() < (2, 13):
            self.skipTest("torch 2.11 takes one pass, no list")
        before, after = _Counting(), _Counting()
        inductor_config.post_grad_custom_post_pass = [before, symmpatterns.post_grad_pass, after]
        symmpatterns.install()  # it is there already
        with fake_group(2):
            code = _compile_once()
        self.assertEqual((before.calls, after.calls), (1, 1))
        self.assertIn("symmpatterns.matmul_all_reduce", code)
        self.assertEqual(symmpatterns.report().notes, [])

    def test_disabled_leaves_the_graph_alone(self) -> None:
        symmpatterns.install()
        with fake_group(2), symmpatterns.config.patch(enabled=False):
            code = _compile_once()
        self.assertNotIn("symmpatterns", code)
        self.assertIn("all_reduce", code)
        self.assertEqual(symmpatterns.report().records, [])
