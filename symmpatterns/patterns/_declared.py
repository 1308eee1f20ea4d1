"""Calls with declared symmetric inputs, as post-grad graphs spell them.

::

    op(x, group)                                             functional operators
    auto_functionalized_v2(op, group=..., _x_base_index=0, _all_bases=[x])    operators that write to an input
    op(to_symmetric(x, group), group)                        a call inside ``with specify_symmetric_memory(op, "x")``
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from symmpatterns.declare import Requirement, requirement_of

_HIGHER_ORDER = ("auto_functionalized", "auto_functionalized_v2")


@dataclass(frozen=True)
class Input:
    """One tensor that a call wants in symmetric memory.

    node     computes it
    put      puts another node in its place
    eager    what the operator was given when the program was traced; None where the graph does not say
    written  the call writes to it (in the graph: returns its new value)
    """

    node: Node
    put: Callable[[Node], None]
    eager: torch.Tensor | None
    written: bool


@dataclass(frozen=True)
class Call:
    """One call of an operator that wants symmetric inputs.

    node           its node
    overload       the operator
    inputs         its symmetric inputs
    group_name     the group, or None where the graph does not say it as a name
    is_functional  what it writes to, if anything, is returned as a new value
    """

    node: Node
    overload: torch._ops.OpOverload
    inputs: tuple[Input, ...]
    group_name: str | None
    is_functional: bool

    @property
    def name(self) -> str:
        """ "ns::name" """
        return self.overload._schema.name


def is_marker(node: Any) -> bool:
    """Whether a node is ``to_symmetric``."""
    return isinstance(node, Node) and node.target is torch.ops.symmpatterns.to_symmetric.default


def is_call_marker(node: Any) -> bool:
    """Whether a node is ``to_symmetric`` for a collective; those of ``with symmetric_memory():`` have no group."""
    return is_marker(node) and node.args[1] != ""


def source_of(node: Node) -> Node:
    """The value behind its markers, or the node itself."""
    while is_marker(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def call_of(node: Node) -> Call | None:
    """The call at a node if any of its inputs is declared or marked."""
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        return _plain(node, node.target)
    if getattr(node.target, "__name__", "") in _HIGHER_ORDER and isinstance(node.args[0], torch._ops.OpOverload):
        return _functionalized(node, node.args[0])
    return None


@dataclass(frozen=True)
class _Place:
    """One argument of a call: its name, its value in the graph and in the traced program, and how to replace it."""

    name: str
    value: Any
    eager: Any
    put: Callable[[Any], None]


def _plain(node: Node, overload: torch._ops.OpOverload) -> Call | None:
    eager_args, eager_kwargs = node.meta.get("eager_input_vals", ((), {}))
    places = []
    for position, argument in enumerate(overload._schema.arguments):
        name = argument.name
        eager = eager_args[position] if position < len(eager_args) else eager_kwargs.get(name)
        if position < len(node.args):
            places.append(_Place(name, node.args[position], eager, _setter(node, position)))
        elif name in node.kwargs:
            places.append(_Place(name, node.kwargs[name], eager, _setter(node, name)))
    return _call(node, overload, places, is_functional=not overload._schema.is_mutable)


def _functionalized(node: Node, overload: torch._ops.OpOverload) -> Call | None:
    bases = node.kwargs.get("_all_bases")
    _, eager = node.meta.get("eager_input_vals", ((), {}))
    eager_bases = eager.get("_all_bases")
    places = []
    for argument in overload._schema.arguments:
        name = argument.name
        index = node.kwargs.get(f"_{name}_base_index")
        if isinstance(bases, (list, tuple)) and isinstance(index, int):
            base = eager_bases[index] if isinstance(eager_bases, (list, tuple)) else None
            places.append(_Place(name, bases[index], base, _base_setter(node, index)))
        elif name in node.kwargs:
            places.append(_Place(name, node.kwargs[name], eager.get(name), _setter(node, name)))
    return _call(node, overload, places, is_functional=True)


def _call(node: Node, overload: torch._ops.OpOverload, places: list[_Place], is_functional: bool) -> Call | None:
    requirement = requirement_of(overload)
    if requirement is None and not any(is_call_marker(each) for place in places for each in _nodes(place.value)):
        return None
    inputs = _pick(overload, places, requirement)
    if not inputs:
        return None
    group = _group(overload, requirement, {place.name: place.value for place in places}, inputs)
    return Call(node, overload, tuple(inputs), group, is_functional)


def _nodes(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    return [each for each in value if isinstance(each, Node)] if isinstance(value, (list, tuple)) else []


def _pick(overload: torch._ops.OpOverload, places: list[_Place], requirement: Requirement | None) -> list[Input]:
    """Each declared or marked tensor; a list of tensors counts one by one."""
    names = {a.name for a in overload._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    written = [each for place in places if place.name in names for each in _nodes(place.value)]
    picked: list[Input] = []
    for place in places:
        declared = requirement is not None and place.name in requirement.inputs
        put_one = _replacer(place.value, place.put)
        known: list[Node] = []
        for each in _nodes(place.value):
            if not (declared or is_call_marker(each)) or each in known:
                continue
            known.append(each)
            put = functools.partial(put_one, each)
            picked.append(Input(each, put, _eager_of(place, each), each in written))
    return picked


def _eager_of(place: _Place, node: Node) -> torch.Tensor | None:
    """What the traced program had for one node of an argument."""
    value, eager = place.value, place.eager
    if isinstance(value, (list, tuple)):
        same_length = isinstance(eager, (list, tuple)) and len(eager) == len(value)
        eager = eager[list(value).index(node)] if same_length else None
    return eager if isinstance(eager, torch.Tensor) else None


def _replacer(value: Any, put: Callable[[Any], None]) -> Callable[[Node, Node], None]:
    """A function that puts one node in the place of another in an argument."""
    if not isinstance(value, (list, tuple)):
        return lambda old, new: put(new)
    current = list(value)

    def replace(old: Node, new: Node) -> None:
        current[:] = [new if each is old else each for each in current]
        put(list(current))

    return replace


def _setter(node: Node, key: int | str) -> Callable[[Any], None]:
    if isinstance(key, int):
        return lambda value: node.update_arg(key, value)
    return lambda value: node.update_kwarg(key, value)


def _base_setter(node: Node, index: int) -> Callable[[Any], None]:
    def put(value: Any) -> None:
        bases = list(node.kwargs["_all_bases"])  # type: ignore[arg-type]
        bases[index] = value
        node.update_kwarg("_all_bases", bases)

    return put


def _group(
    overload: torch._ops.OpOverload, requirement: Requirement | None, values: dict[str, Any], inputs: list[Input]
) -> str | None:
    if requirement is None:
        marked = next(each.node for each in inputs if is_call_marker(each.node))
        group: Any = marked.args[1]
    elif requirement.group_argument is None:
        group = requirement.group_name
    else:
        argument = next(a for a in overload._schema.arguments if a.name == requirement.group_argument)
        group = values.get(argument.name, argument.default_value)
    return group if isinstance(group, str) else None
