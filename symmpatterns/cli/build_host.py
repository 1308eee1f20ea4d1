"""``build-host``: compiles the native part for CPU tensors, so that no first use has to wait for it."""

from __future__ import annotations

import sys
import time


def run() -> int:
    """0 when the native part is there and loads, 1 when not."""
    from symmpatterns import host_backend
    from symmpatterns.groups import SymmetricMemoryError

    start = time.monotonic()
    try:
        path = host_backend.build()
        host_backend.load()
    except SymmetricMemoryError as error:  # the compiler's last lines are in its text; a traceback would bury them
        print(f"the native part for CPU tensors does not work here: {error}", file=sys.stderr)
        return 1
    print(f"native part for CPU tensors: {path} ({time.monotonic() - start:.1f} s)")
    return 0
