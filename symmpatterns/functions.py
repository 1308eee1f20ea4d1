"""Which of torch's functions make new memory for their result: what ``with symmetric_memory():`` has to mark in a trace.

A marked result is a new tensor. So what may be its input, or a view of it, must not be marked: who writes to the one
would no longer write to the other.
"""

from __future__ import annotations

from typing import Any

import torch

from symmpatterns.report import Record, add_once

NEW, SHARED, WRITTEN, UNKNOWN = -1, -2, -3, -4
# They may return their input or a view of it, and most of their schemas do not say so.
_MAY_SHARE = set(
    "alpha_dropout atleast_1d atleast_2d atleast_3d broadcast_tensors contiguous dropout dropout1d dropout2d dropout3d "
    "einsum feature_alpha_dropout feature_dropout flatten meshgrid pin_memory ravel reshape reshape_as to to_dense "
    "type_as".split()
)


def kind_of(func: Any) -> int:
    """NEW: the result is new memory. SHARED: it is memory of an argument. WRITTEN: of one that the function writes to.
    UNKNOWN: that depends, or nobody says.

    Or the position of the argument ``inplace``: NEW unless that is true.
    """
    if isinstance(func, torch._ops.OpOverload):
        return _kind_of_overloads([func])
    if isinstance(func, torch._ops.OpOverloadPacket):
        return _kind_of_overloads([getattr(func, name) for name in func.overloads()])
    name = getattr(func, "__name__", "")
    if name == "__get__":  # of an attribute, such as T
        return SHARED
    if name == "__setitem__":
        return WRITTEN
    name = name.strip("_") if name.startswith("__r") else name  # 1 - x
    packet = getattr(torch.ops.aten, name, None)
    if name in _MAY_SHARE or packet is None:
        return UNKNOWN
    kind = _kind_of_overloads([getattr(packet, each) for each in packet.overloads()])
    code = getattr(func, "__code__", None)
    if kind == NEW and code is not None and "inplace" in code.co_varnames[: code.co_argcount]:
        return int(code.co_varnames.index("inplace"))
    return kind


def _kind_of_overloads(overloads: list[torch._ops.OpOverload]) -> int:
    functional = [each._schema for each in overloads if not each._schema.is_mutable]
    if not functional:
        return WRITTEN
    shares = any(value.alias_info is not None for schema in functional for value in schema.returns)
    return SHARED if shares else NEW


_REASONS = {
    UNKNOWN: (
        "may_share_memory",
        "{} is not known to make new memory: it may return its input, so its result stays where it is; .clone() it inside "
        "the block",
    ),
    WRITTEN: (
        "written_in_place",
        "{} writes to a tensor in place, which compiled code does by computing a new value: if the tensor was made inside "
        "the block, it is not in symmetric memory afterwards; write to it outside of compiled code, or .clone() it after",
    ),
}


def report_left(func: Any, kind: int) -> None:
    """Says in the report why the result of a call in ``with symmetric_memory():`` is not put into symmetric memory.

    Once, because Dynamo may trace a function several times until it has its graph.
    """
    name = getattr(func, "__name__", str(func))
    code, reason = _REASONS[kind]
    record = Record(
        family="allocation",
        collective=f"symmetric_memory: {name}",
        strategy=None,
        op=None,
        shape=(),
        dtype=None,
        group_name=None,
        world_size=None,
        code=code,
        reason=reason.format(name),
    )
    add_once(record)
