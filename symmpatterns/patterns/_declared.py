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
class Call:
    """One call of an operator that wants symmetric inputs.

    node        its node
    overload    the operator
    inputs      each symmetric input, and how to put another node in its place
    group_name  the group, or None where the graph does not say it as a name
    mutated     the symmetric inputs that the call writes to (in the graph: whose new value it returns)
    """

    node: Node
    overload: torch._ops.OpOverload
    inputs: tuple[tuple[Node, Callable[[Node], None]], ...]
    group_name: str | None
    mutated: tuple[Node, ...]

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


def _plain(node: Node, overload: torch._ops.OpOverload) -> Call | None:
    requirement = requirement_of(overload)
    arguments = overload._schema.arguments
    places: list[tuple[str, Any, Callable[[Any], None]]] = []
    for position, argument in enumerate(arguments):
        if position < len(node.args):
            places.append((argument.name, node.args[position], _setter(node, position)))
        elif argument.name in node.kwargs:
            places.append((argument.name, node.kwargs[argument.name], _setter(node, argument.name)))
    if requirement is None and not any(is_call_marker(each) for _, value, _ in places for each in _nodes(value)):
        return None
    inputs = _pick(places, requirement)
    values = {name: value for name, value, _ in places}
    group = _group(overload, requirement, values, [each for each, _ in inputs])
    return Call(node, overload, tuple(inputs), group, ()) if inputs else None


def _functionalized(node: Node, overload: torch._ops.OpOverload) -> Call | None:
    requirement = requirement_of(overload)
    written = {a.name for a in overload._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    bases = node.kwargs.get("_all_bases")
    places: list[tuple[str, Any, Callable[[Any], None]]] = []
    for argument in overload._schema.arguments:
        name = argument.name
        index = node.kwargs.get(f"_{name}_base_index")
        if isinstance(bases, (list, tuple)) and isinstance(index, int):
            places.append((name, bases[index], _base_setter(node, index)))
        elif name in node.kwargs:
            places.append((name, node.kwargs[name], _setter(node, name)))
    if requirement is None and not any(is_call_marker(each) for _, value, _ in places for each in _nodes(value)):
        return None
    inputs = _pick(places, requirement)
    mutated = tuple(each for name, value, _ in places if name in written for each in _nodes(value))
    values = {name: value for name, value, _ in places}
    group = _group(overload, requirement, values, [each for each, _ in inputs])
    return Call(node, overload, tuple(inputs), group, mutated) if inputs else None


def _nodes(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    return [each for each in value if isinstance(each, Node)] if isinstance(value, (list, tuple)) else []


def _pick(places: list[tuple[str, Any, Callable[[Any], None]]], requirement: Requirement | None) -> list[Any]:
    """Each declared or marked tensor, with its setter; a list of tensors counts one by one."""
    picked: list[tuple[Node, Callable[[Node], None]]] = []
    for name, value, put in places:
        declared = requirement is not None and name in requirement.inputs
        put_one = _replacer(value, put)
        for each in _nodes(value):
            if not (declared or is_call_marker(each)) or any(each is known for known, _ in picked):
                continue
            picked.append((each, functools.partial(put_one, each)))
    return picked


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
    overload: torch._ops.OpOverload, requirement: Requirement | None, values: dict[str, Any], inputs: list[Node]
) -> str | None:
    if requirement is None:
        marked = next(each for each in inputs if is_call_marker(each))
        group: Any = marked.args[1]
    elif requirement.group_argument is None:
        group = requirement.group_name
    else:
        argument = next(a for a in overload._schema.arguments if a.name == requirement.group_argument)
        group = values.get(argument.name, argument.default_value)
    return group if isinstance(group, str) else None
