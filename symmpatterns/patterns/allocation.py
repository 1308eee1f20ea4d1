"""collective(x)  ->  collective(to_symmetric(x))        for every input that is declared to be in symmetric memory

Pays always: the collective asks for it. What becomes of the marker is decided when Inductor compiles it
(allocation/lowerings.py): the producer writes there, or runs under symmetric_memory(), or a copy is made.

This pass knows what a lowering cannot see: a value that leaves the graph may not lie in pool memory, so it is copied
for the collective and stays an ordinary tensor itself, and the result of a collective that works in place is taken out
of the pool before it leaves.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from symmpatterns import compat, config
from symmpatterns.allocation.lowerings import META, Marker
from symmpatterns.allocation.operators import strides_of
from symmpatterns.patterns._declared import Call, Input, call_of, is_call_marker, is_marker, source_of
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import COLLECTIVES, c10d, collectives, value_of
from symmpatterns.report import Record, add

NAME = "allocation"

_MARK = torch.ops.symmpatterns.to_symmetric.default
# torch's collectives that copy their input into their output; working in place, the output is the symmetric memory.
_IN_PLACE: dict[object, Any] = {
    c10d.all_reduce.default: c10d.all_reduce_.default,
    c10d.broadcast.default: c10d.broadcast_.default,
}


def apply(rewriting: Rewriting) -> None:
    """Marks the declared inputs of every collective that no other family took."""
    if not config.allocation:
        return
    graph = rewriting.graph
    for node in collectives(graph):
        call = call_of(node)
        if call is None or rewriting.is_rewritten(node):
            continue
        if call.group_name is None:
            rewriting.decline(node, NAME, "group_not_a_name", "the graph does not say its group as a name")
            continue
        refusal = _refusal(call)
        if refusal is not None:
            rewriting.decline(node, NAME, *refusal)
            continue
        _rewrite(rewriting, call)
    _drop_other_markers(graph)


class _Delivery:
    """Puts the record of one collective into the report when all of its markers have been compiled."""

    def __init__(self, markers: int) -> None:
        self._missing = markers
        self._details: list[str] = []
        self._record: Record | None = None

    def settle(self, detail: str) -> None:
        self._details.append(detail)
        self._send()

    def deliver(self, record: Record) -> None:
        self._record = record
        self._send()

    def _send(self) -> None:
        if self._record is not None and len(self._details) == self._missing:
            noted = [self._record.detail] if self._record.detail else []
            add(dataclasses.replace(self._record, detail="; ".join(dict.fromkeys([*self._details, *noted]))))


def _refusal(call: Call) -> tuple[str, str] | None:
    """(code, reason) of leaving a call alone whose input must not be replaced by a copy."""
    written = [each for each in call.inputs if each.written]
    if written and not call.is_functional:
        return (
            "writes_in_place",
            "it writes to its input, and the graph does not say so: a copy would not be what changes",
        )
    for each in written:
        value = value_of(source_of(each.node))
        assert value is not None
        given = value.stride() if each.eager is None else each.eager.stride()
        if not _same(value.shape, _demanded(call, each, value), given):
            return "strides", "it wants its input contiguous, and writes to one that is not"
    return None


def _rewrite(rewriting: Rewriting, call: Call) -> None:
    graph, node = rewriting.graph, call.node
    works_in_place = call.overload in _IN_PLACE
    delivery = _Delivery(len(call.inputs))
    for each in call.inputs:
        source = source_of(each.node)
        with graph.inserting_before(node):
            marker = _mark(graph, call, each, source)
        each.put(marker)
        if is_marker(each.node) and not each.node.users:
            graph.erase_node(each.node)
        written = works_in_place or each.written
        marker.meta[META] = Marker(_why_copy(graph, source, marker, written), delivery.settle)
    if works_in_place:
        node.target = _IN_PLACE[call.overload]
    if works_in_place or any(each.written for each in call.inputs):
        _keep_results_inside(graph, call)
    rewriting.rewrote(node, NAME, "allocation", call.overload, deliver=delivery.deliver)


def _mark(graph: Graph, call: Call, each: Input, source: Node) -> Node:
    """``to_symmetric(source)`` with the strides that the operator will be given.

    Inductor sees to an operator's demands when it compiles the call, after the marker: what has other strides it would
    copy, out of symmetric memory.
    """
    value = value_of(source)
    assert value is not None
    strides = _demanded(call, each, value)
    if _same(value.shape, strides, value.stride()):
        strides = value.stride()
        arguments: tuple[Any, ...] = ()
    elif _same(value.shape, strides, strides_of(value, contiguous=True)):
        arguments = (True,)
    else:
        arguments = (False, compat.sizes_in_graph(graph, strides))
    marker = graph.call_function(_MARK, (source, call.group_name, *arguments))
    marker.meta.update(_described(source))
    with value.fake_mode:  # type: ignore[attr-defined]
        marker.meta["val"] = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return marker


def _demanded(call: Call, each: Input, value: torch.Tensor) -> Sequence[Any]:
    """The strides with which an operator gets an input: those it relies on, or those that the graph has."""
    demand = compat.layout_constraint(call.overload)
    if call.overload in COLLECTIVES or demand == "needs_contiguous_strides":
        return strides_of(value, contiguous=True)
    if demand == "needs_exact_strides" and each.eager is not None:
        return each.eager.stride()
    return value.stride()


def _same(shape: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two strides are known to mean the same; that of a dimension of size 1 means nothing."""
    return all(statically_known_true(s == t) or statically_known_true(n == 1) for n, s, t in zip(shape, a, b))


def _described(node: Node) -> dict[str, Any]:
    """The metadata of a node that hold for a copy of its value as well: where in the program it comes from.

    Not what it computes, what it was given, and the sizes that come into being there.
    """
    own = ("val", "tensor_meta", "eager_input_vals", "unbacked_bindings", META)
    return {key: value for key, value in node.meta.items() if key not in own}


def _why_copy(graph: Graph, source: Node, marker: Node, written: bool) -> str | None:
    """Why a value cannot itself be in pool memory, however it is produced; None: it may."""
    if source.op == "placeholder":
        return "graph input"
    if source.op == "get_attr":
        return "constant"
    if _leaves(graph, [source]):
        return "it leaves the graph, as a result or for backward"
    if written and any(user is not marker for user in _aliases_users(graph, source)):
        return "the collective writes to it and it is used elsewhere"
    return None


def _storage(node: Node) -> int | None:
    value = value_of(node)
    return None if value is None else value.untyped_storage()._cdata


def _leaves(graph: Graph, nodes: Iterable[Node]) -> bool:
    """Whether the memory of one of the nodes is returned by the graph."""
    storages = {_storage(node) for node in nodes}
    return any(_storage(result) in storages for result in graph.output_node().all_input_nodes)


def _aliases_users(graph: Graph, source: Node) -> set[Node]:
    """Who reads the memory of `source`, through whatever view."""
    storage = _storage(source)
    aliases = [node for node in graph.nodes if node.op != "output" and _storage(node) == storage]
    return {user for alias in aliases for user in alias.users if user not in aliases}


def _keep_results_inside(graph: Graph, call: Call) -> None:
    """Copies out of pool memory what a collective that works in place returns, where it leaves the graph."""
    results = {_storage(call.node)} | {_storage(user) for user in call.node.users}
    results |= {_storage(user) for result in call.node.users for user in result.users if result.target in _WAITS}
    results.discard(None)
    output = graph.output_node()
    for result in output.all_input_nodes:
        if _storage(result) not in results:
            continue
        with graph.inserting_before(output):
            copy = graph.call_function(torch.ops.symmpatterns.copy_out.default, (result,))
        value = value_of(result)
        assert value is not None
        copy.meta.update(_described(result))
        with value.fake_mode:  # type: ignore[attr-defined]
            copy.meta["val"] = value.clone()
        output.replace_input_with(result, copy)


_WAITS = {c10d.wait_tensor.default}


def _drop_other_markers(graph: Graph) -> None:
    """Whoever reads a marked value beside the collective (its backward, for example) reads the value itself.

    A value of ``with symmetric_memory():`` keeps its marker where somebody may see where it is, or where its producer,
    which may look for itself, allocates it.
    """
    for node in list(graph.nodes):
        if not is_marker(node) or META in node.meta:
            continue
        source = source_of(node)
        taken = any(is_marker(user) for user in source.users if user is not node)
        readers = [user for user in _aliases_users(graph, node) if not is_marker(user)]
        is_observed = _leaves(graph, [node]) or not all(map(_is_torchs, readers))
        if is_call_marker(node) or not (is_observed or (not taken and not _is_torchs(source))):
            node.replace_all_uses_with(source, delete_user_cb=lambda user: call_of(user) is None)
        elif any(user is not node for user in _aliases_users(graph, source)):
            node.meta[META] = Marker("somebody reads the value beside, who must not see what is written to it", _ignore)
        if not node.users:
            graph.erase_node(node)


def _is_torchs(node: Node) -> bool:
    """Whether a node is an operator that computes values and does not care where they are, or a part of a result."""
    while node.target is operator.getitem and isinstance(node.args[0], Node):
        node = node.args[0]
    if node.target is torch.ops.symmpatterns.copy_out.default:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("aten", "prims")


def _ignore(detail: str) -> None:
    """No collective's record waits for this."""
