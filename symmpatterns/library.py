"""Defining an operator and declaring its symmetric inputs in one place.

::

    symmpatterns.library.define("ns::my_collective", "(SymmMemTensor x, str group_name) -> Tensor")
    symmpatterns.library.define("ns::my_collective", "(Tensor x, str group_name) -> Tensor", symm_mem_hint="x")
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from symmpatterns.declare import requires_symmetric_memory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ARGUMENT = re.compile(r"\bSymmMemTensor(?:\([^)]*\)|\[\d*\]|\?)*\s+(\w+)")  # SymmMemTensor(a!)[] x and the like
_SCHEMA = re.compile(r"\s*\(.*\)\s*->.*", re.DOTALL)
_kept: list[torch.library.Library] = []  # an operator lives as long as its Library


def define(
    qualname: str,
    schema: str,
    *,
    symm_mem_hint: int | str | Sequence[int | str] | None = None,
    group: str | ProcessGroup | None = None,
    lib: torch.library.Library | None = None,
    tags: Any = (),
) -> None:
    """``torch.library.define`` for an operator some of whose inputs must be in symmetric memory.

    They are written `SymmMemTensor` in the schema, or named by `symm_mem_hint` (a name, a position, or several).
    `group` is as in ``requires_symmetric_memory``; `lib` and `tags` are as in ``torch.library.define``. Implement the
    operator with ``torch.library.impl`` and ``register_fake`` as usual. Raises what ``requires_symmetric_memory``
    raises, and ValueError for a schema that names no symmetric input, names one twice over, or returns one; then the
    operator is not defined.
    """
    if not isinstance(qualname, str) or not isinstance(schema, str):
        raise TypeError(f"an operator's name and schema are texts, not {qualname!r} and {schema!r}")
    if "::" not in qualname:
        raise ValueError(f"{qualname!r} is not the name of an operator: write 'namespace::name'")
    if not _SCHEMA.fullmatch(schema):
        raise ValueError(
            f"{qualname}: write a schema without a name, such as '(SymmMemTensor x) -> Tensor', not {schema!r}"
        )
    namespace, name = qualname.split("::", 1)
    if lib is not None and not isinstance(lib, torch.library.Library):
        raise TypeError(f"{qualname}: lib is a torch.library.Library, not {type(lib).__name__}")
    if lib is not None and lib.ns != namespace:
        raise ValueError(f"{qualname}: lib is of namespace {lib.ns!r}")
    arguments, _, returns = schema.rpartition("->")
    if "SymmMemTensor" in returns:
        raise ValueError(f"{qualname}: SymmMemTensor is said of arguments; what an operator returns is its own affair")
    typed = _ARGUMENT.findall(arguments)
    if typed and symm_mem_hint is not None:
        raise ValueError(f"{qualname}: say SymmMemTensor in the schema or pass symm_mem_hint, not both")
    inputs = typed or symm_mem_hint
    if inputs is None:
        raise ValueError(
            f"{qualname}: no argument is a SymmMemTensor and there is no symm_mem_hint; torch.library.define defines "
            "operators without symmetric inputs"
        )
    target = torch.library.Library(namespace, "FRAGMENT")
    try:
        target.define(name + re.sub(r"\bSymmMemTensor\b", "Tensor", schema), tags=tags)
        requires_symmetric_memory(qualname, inputs, group=group)
    except BaseException:
        target._destroy()
        raise
    if lib is not None:  # dies with the caller's library
        lib.__dict__.setdefault("_symmpatterns_kept", []).append(target)
    else:
        _kept.append(target)
