"""What the tests of declared collectives share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

import symmpatterns
from tests.allocation_operators import relaxed

IN_PLACE, SCOPE = "in place", "under symmetric_memory()"
INPUT, LEAVES = "copied: graph input", "copied: it leaves the graph, as a result or for backward"
Function = Callable[..., Any]


def group() -> str:
    return dist.group.WORLD.group_name  # type: ignore[union-attr]


def eager(function: Function, *args: Any) -> Any:
    """What `function` gives without symmetric memory."""
    with relaxed():
        return function(*args)


def details() -> list[str | None]:
    return [record.detail for record in symmpatterns.report().rewrites]


def calls(code: str, name: str) -> int:
    """How often generated code calls what starts with `name`."""
    body = code[code.index("def call(") :]
    return sum(line.strip().startswith(name) or f" = {name}" in line for line in body.splitlines())


def expect_error(text: str, function: Function, *args: Any) -> None:
    try:
        function(*args)
    except Exception as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no error that says {text!r}")
