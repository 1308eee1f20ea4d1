"""Symmetric memory in torch.compile: collectives fused into the kernels around them.

``import symmpatterns`` installs the rewrites; nothing else has to change. ``SYMMPATTERNS=0`` imports without installing.
"""

from __future__ import annotations

import os

from symmpatterns import compat

compat.require_torch()

from symmpatterns import config, library, peer_views, replacements  # noqa: E402, F401  (they register torch.ops.symmpatterns.*)
from symmpatterns.declare import requires_symmetric_memory, specify_symmetric_memory  # noqa: E402
from symmpatterns.groups import DivergenceError, SymmetricMemoryError, SymmetricMemoryTimeout, register_group_name  # noqa: E402
from symmpatterns.inductor_hook import install, is_installed, post_grad_pass, uninstall  # noqa: E402
from symmpatterns.report import report  # noqa: E402
from symmpatterns.scope import symmetric_memory  # noqa: E402
from symmpatterns.symmetric_memory import empty, is_symmetric, rendezvous  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "DivergenceError",
    "SymmetricMemoryError",
    "SymmetricMemoryTimeout",
    "config",
    "empty",
    "install",
    "is_installed",
    "is_symmetric",
    "library",
    "post_grad_pass",
    "register_group_name",
    "rendezvous",
    "report",
    "requires_symmetric_memory",
    "specify_symmetric_memory",
    "symmetric_memory",
    "uninstall",
]

if os.environ.get("SYMMPATTERNS", "1").strip().lower() not in ("0", "false", "off"):
    install()
