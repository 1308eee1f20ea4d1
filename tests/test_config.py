"""Configuration: values are checked when set, patches are undone, and the fingerprint knows what matters."""

from __future__ import annotations

import os
import subprocess
import sys
import unittest

from parameterized import parameterized

from symmpatterns import config


class ConfigTest(unittest.TestCase):
    def test_patch_is_undone_also_after_an_exception(self) -> None:
        with self.assertRaises(KeyError), config.patch(force=True, timeout_s=3):
            self.assertTrue(config.force)
            self.assertEqual(config.timeout_s, 3)
            raise KeyError
        self.assertFalse(config.force)
        self.assertEqual(config.timeout_s, 300.0)

    def test_patch_decorates(self) -> None:
        @config.patch(enabled=False)
        def inside() -> bool:
            return config.enabled

        self.assertFalse(inside())
        self.assertTrue(config.enabled)

    @parameterized.expand(
        [
            ("unknown option", {"fuse": True}, AttributeError, "no option 'fuse'"),
            ("wrong type", {"enabled": 1}, TypeError, "takes bool, not int"),
            ("a flag is not a number", {"timeout_s": True}, TypeError, "not bool"),
            ("negative time", {"timeout_s": -1}, ValueError, "positive number of seconds"),
            ("unknown kernels", {"host_kernels": "cuda"}, ValueError, "'aten' or 'triton'"),
        ]
    )
    def test_bad_values_change_nothing(self, _: str, changes: dict, error: type, text: str) -> None:
        before = config.options()
        with self.assertRaisesRegex(error, text), config.patch(force=True, **changes):
            self.fail("a bad value was accepted")
        self.assertEqual(config.options(), before)

    def test_assignment_is_checked_too(self) -> None:
        with self.assertRaisesRegex(AttributeError, "the options are enabled"):
            config.enable = True  # type: ignore[attr-defined]

    def test_fingerprint_follows_what_compilation_depends_on(self) -> None:
        before = config.fingerprint()
        for name in ("enabled", "force", "template", "peer_views", "allocation"):
            with config.patch(**{name: not getattr(config, name)}):
                self.assertNotEqual(config.fingerprint(), before, name)
        with config.patch(timeout_s=1.0):
            self.assertEqual(config.fingerprint(), before)

    def test_environment(self) -> None:
        env = {"SYMMPATTERNS_FORCE": "1", "SYMMPATTERNS_TIMEOUT_S": "12", "SYMMPATTERNS_HOST_KERNELS": "triton"}
        code = "from symmpatterns import config; print(config.force, config.timeout_s, config.host_kernels)"
        run = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=60
        )
        self.assertEqual(run.stdout.strip(), "True 12.0 triton", run.stderr)

    def test_bad_environment_is_named(self) -> None:
        env = {**os.environ, "SYMMPATTERNS_FORCE": "maybe"}
        run = subprocess.run(
            [sys.executable, "-c", "import symmpatterns"], env=env, capture_output=True, text=True, timeout=60
        )
        self.assertIn("SYMMPATTERNS_FORCE='maybe' is not valid", run.stderr)
