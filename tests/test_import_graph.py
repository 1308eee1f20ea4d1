"""Imports go one way, private torch names stay in compat.py, and importing the package stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).parent.parent / "symmpatterns"
# A layer may import the layers behind it; everything may import the helpers.
LAYERS = [
    {"symmpatterns.__main__", "symmpatterns.cli", "symmpatterns.testing"},
    {"symmpatterns"},
    {"symmpatterns.inductor_hook"},
    {"symmpatterns.patterns"},
    {"symmpatterns.replacements", "symmpatterns.cost_model", "symmpatterns.library"},
    {"symmpatterns.operators"},
    {"symmpatterns.declare"},
    {"symmpatterns.fusion_aware_alloc"},
    {"symmpatterns.copy_engine"},
    {"symmpatterns.allocation", "symmpatterns.peer_views", "symmpatterns.triton_kernels"},
    {"symmpatterns.sentinel_memory", "symmpatterns.group_memory"},
    {"symmpatterns.workspace", "symmpatterns.scope"},
    {"symmpatterns.symmetric_memory"},
    {"symmpatterns.host_backend"},
    {"symmpatterns.host_build"},
    {"symmpatterns.groups"},
    {
        "symmpatterns.early_launch",
        "symmpatterns.functions",
        "symmpatterns.generated_calls",
        "symmpatterns.streams",
        "symmpatterns.tables",
    },
]
HELPERS = {"symmpatterns.config", "symmpatterns.compat", "symmpatterns.report", "symmpatterns.report_html"}
ALLOWED_ANYWHERE_IN = {"symmpatterns.testing"}


def _modules() -> dict[str, Path]:
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["symmpatterns", *path.relative_to(ROOT).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def _imports(path: Path, modules: dict[str, Path]) -> set[str]:
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # what only the type checker reads is no import
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else node.module)
    return {name for name in found if name.split(".")[0] == "symmpatterns"}


def _layer(module: str) -> int | None:
    best = None
    for index, names in enumerate(LAYERS):
        for name in names:
            if (module == name or (name != "symmpatterns" and module.startswith(name + "."))) and (
                best is None or len(name) > best[1]
            ):
                best = (index, len(name))
    return None if best is None else best[0]


class ImportGraphTest(unittest.TestCase):
    def test_imports_go_one_way(self) -> None:
        modules = _modules()
        for module, path in modules.items():
            if module in ALLOWED_ANYWHERE_IN:
                continue
            own = _layer(module)
            for imported in _imports(path, modules):
                if imported in HELPERS and module != imported:
                    continue
                if module in HELPERS:
                    self.assertIn(imported, HELPERS, f"{module} is a helper and may not import {imported}")
                    continue
                self.assertIsNotNone(own, f"{module} has no layer: add it to LAYERS")
                other = _layer(imported)
                self.assertIsNotNone(other, f"{imported} has no layer: add it to LAYERS")
                if imported == "symmpatterns":  # the package's version and such, never its public functions
                    continue
                self.assertGreaterEqual(other, own, f"{module} may not import {imported}")

    def test_families_do_not_import_each_other(self) -> None:
        modules = _modules()
        for module, path in modules.items():
            if module.startswith("symmpatterns.patterns.") and not module.split(".")[-1].startswith("_"):
                siblings = {
                    name
                    for name in _imports(path, modules)
                    if name.startswith("symmpatterns.patterns.") and not name.split(".")[-1].startswith("_")
                }
                self.assertEqual(siblings, set(), module)

    def test_kernels_import_only_triton_torch_and_their_own_files(self) -> None:
        modules = _modules()
        shared = {
            "symmpatterns.triton_kernels",
            *(
                f"symmpatterns.triton_kernels.{n}"
                for n in ("_sync", "_tiles", "_choices", "_plan", "_sentinel", "_shards", "_background")
            ),
        }
        # The files that know workspaces and their errors, and how launches are repeated.
        adapters = {f"symmpatterns.triton_kernels.{name}" for name in ("_workspace", "_launch")}
        for module, path in modules.items():
            if module.startswith("symmpatterns.triton_kernels.") and module not in adapters:
                self.assertLessEqual(_imports(path, modules), shared | adapters, module)

    def test_private_torch_names_only_in_compat(self) -> None:
        # The modules of Inductor in which passes, patterns and lowerings are written are this library's ground.
        ground = ("torch._inductor", "torch.testing._internal", "torch._library", "torch._ops")
        for module, path in _modules().items():
            if module == "symmpatterns.compat":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch."):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names if alias.name.startswith("torch.")]
                else:
                    continue
                for name in names:
                    private = any(part.startswith("_") for part in name.split(".")[1:])
                    allowed = name.startswith(ground) or "_functional_collectives" in name
                    self.assertTrue(not private or allowed, f"{module} imports {name}: move it to compat.py")

    def test_import_does_not_load_the_pattern_matcher_or_kernels(self) -> None:
        code = (
            "import sys, symmpatterns\n"
            "bad = [m for m in ('torch._inductor.pattern_matcher', 'symmpatterns.triton_kernels', 'symmpatterns.patterns')"
            " if m in sys.modules]\n"
            "print(bad)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        self.assertEqual(run.stdout.strip(), "[]", run.stderr)
