"""A GPU of compute capability 9.0 for Triton to generate code for, where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Driver:
    """As much of Triton's driver as generating code and compiling kernels ask for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        """Nothing is launched."""


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    import triton

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(Driver())
    try:
        yield
    finally:
        driver._active = before
