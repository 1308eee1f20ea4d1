"""Every switch and threshold of symmpatterns, with its default and its meaning.

Read and set as attributes (``symmpatterns.config.force = True``) or for a while with ``patch``::

    with symmpatterns.config.patch(force=True, timeout_s=20):
        torch.compile(model)(x)

A value is checked when it is set. Everything that can change what a compilation produces is part of
``fingerprint()``, which is part of the pass's cache key: a graph compiled under one configuration is never
taken from Inductor's cache under another.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Option:
    default: Any
    kind: type | tuple[type, ...]
    doc: str
    compiled: bool  # may change the compiled graph, so it belongs to the fingerprint
    allowed: Callable[[Any], bool] | None = None
    requirement: str = ""


_OPTIONS: dict[str, _Option] = {
    "enabled": _Option(True, bool, "rewrite graphs at all; False leaves every graph as it is", True),
    "force": _Option(
        False, bool, "rewrite wherever it is correct, whatever the cost model says (tests, measurements)", True
    ),
    "template": _Option(
        True, bool, "fuse a matmul and its collective, or an all-reduce and its RMSNorm, into one kernel", True
    ),
    "peer_views": _Option(True, bool, "let Inductor's own kernels store to and load from the peers", True),
    "allocation": _Option(True, bool, "allocate the declared inputs of other collectives in symmetric memory", True),
    "keep_overlap": _Option(
        True,
        bool,
        "leave a collective alone whose wait stands behind a matmul, convolution or attention: it is hidden already",
        True,
    ),
    "cuda_graphs": _Option(
        False,
        bool,
        "the compiled code will be captured in CUDA graphs by its user, so host time does not count in the cost model",
        True,
    ),
    "early_launch": _Option(
        True,
        bool,
        "launch the kernels around small collectives while the one before still runs (compute capability 9.0 and later); "
        "Inductor's own only where CUDA graphs launch them",
        True,
    ),
    "host_kernels": _Option(
        "aten",
        str,
        "CPU tensors: 'aten' computes with ATen's GEMM into peers' memory; 'triton' runs the Triton kernels in "
        "Triton's interpreter (TRITON_INTERPRET=1), which is slow and meant for testing the kernels",
        False,
        lambda v: v in ("aten", "triton"),
        "'aten' or 'triton'",
    ),
    "tuning_table": _Option(
        "",
        str,
        "file of the user's own measurements, as `python -m symmpatterns tune` writes it; '' is tuning.json in "
        "symmpatterns' cache folder, if it is there",
        False,
    ),
    "timeout_s": _Option(
        300.0,
        (int, float),
        "seconds a rank waits for its peers before the call fails with SymmetricMemoryTimeout; longer than the "
        "slowest rank may take to compile",
        False,
        lambda v: 0 < v <= 1e9,
        "a positive number of seconds, up to 1e9",
    ),
}


def _check(name: str, value: Any) -> None:
    option = _OPTIONS.get(name)
    if option is None:
        raise AttributeError(f"symmpatterns.config has no option {name!r}; the options are {', '.join(_OPTIONS)}")
    kinds = option.kind if isinstance(option.kind, tuple) else (option.kind,)
    is_number_flag = isinstance(value, bool) and bool not in kinds  # True is an int for isinstance, not for people
    if not isinstance(value, kinds) or is_number_flag:
        names = " or ".join(k.__name__ for k in kinds)
        raise TypeError(f"symmpatterns.config.{name} takes {names}, not {type(value).__name__} ({value!r})")
    if option.allowed is not None and not option.allowed(value):
        raise ValueError(f"symmpatterns.config.{name} takes {option.requirement}, not {value!r}")


def _from_environment(name: str, option: _Option) -> Any:
    """``SYMMPATTERNS_<NAME>`` overrides a default, e.g. ``SYMMPATTERNS_TIMEOUT_S=30``."""
    variable = f"SYMMPATTERNS_{name.upper()}"
    text = os.environ.get(variable)
    if text is None:
        return option.default
    value: Any = text
    try:
        if option.kind is bool:
            value = {"1": True, "true": True, "0": False, "false": False}[text.strip().lower()]
        elif option.kind is not str:
            value = float(text)
        _check(name, value)
    except (KeyError, ValueError) as error:
        raise ValueError(f"environment variable {variable}={text!r} is not valid: {option.doc}") from error
    return value


def options() -> dict[str, Any]:
    """The current value of every option."""
    return {name: getattr(sys.modules[__name__], name) for name in _OPTIONS}


def describe(name: str) -> str:
    """One sentence on what an option does."""
    if name not in _OPTIONS:
        raise AttributeError(f"symmpatterns.config has no option {name!r}; the options are {', '.join(_OPTIONS)}")
    return _OPTIONS[name].doc


def fingerprint() -> str:
    """The options that can change a compiled graph, as text; equal on ranks that will compile alike."""
    return ",".join(f"{name}={value!r}" for name, value in options().items() if _OPTIONS[name].compiled)


@contextlib.contextmanager
def patch(**changes: Any) -> Iterator[None]:
    """Sets options for the duration of a ``with`` block or of a decorated function.

    They hold for compilations inside it, and are part of the pass's cache key: those that change graphs, and `timeout_s`.
    Raises AttributeError for an unknown option, TypeError or ValueError for a bad value; nothing is changed then.
    """
    for name, value in changes.items():
        _check(name, value)
    before = {name: getattr(sys.modules[__name__], name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(sys.modules[__name__], name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(sys.modules[__name__], name, value)


class _ConfigModule(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("__"):
            _check(name, value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in _OPTIONS:
            raise AttributeError(
                f"symmpatterns.config.{name} cannot be deleted; its default is {_OPTIONS[name].default!r}"
            )
        super().__delattr__(name)


enabled: bool
force: bool
template: bool
peer_views: bool
allocation: bool
keep_overlap: bool
cuda_graphs: bool
early_launch: bool
host_kernels: str
tuning_table: str
timeout_s: float
for _name, _option in _OPTIONS.items():
    globals()[_name] = _from_environment(_name, _option)
del _name, _option
sys.modules[__name__].__class__ = _ConfigModule
