"""collective(x)  ->  collective(to_symmetric(x))        for every input that is declared to be in symmetric memory

Pays always: the collective asks for it. What becomes of the marker is decided when Inductor compiles it
(allocation/lowerings.py): the producer writes there, or runs under symmetric_memory(), or a copy is made.

This pass knows what a lowering cannot see: a value that leaves the graph may not lie in pool memory, so it is copied
for the collective and stays an ordinary tensor itself, and the result of a collective that works in place is taken out
of the pool before it leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from symmpatterns import config
from symmpatterns.allocation.lowerings import META, Marker
from symmpatterns.patterns._declared import Call, call_of, is_call_marker, is_marker, source_of
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


def _rewrite(rewriting: Rewriting, call: Call) -> None:
    graph, node = rewriting.graph, call.node
    works_in_place = call.overload in _IN_PLACE
    is_torchs = call.overload in COLLECTIVES  # these want contiguous inputs and would copy any other
    delivery = _Delivery(len(call.inputs))
    for value, put in call.inputs:
        source = source_of(value)
        written = works_in_place or any(value is each for each in call.mutated)
        with graph.inserting_before(node):
            marker = graph.call_function(_MARK, (source, call.group_name, is_torchs))
        marker.meta.update({k: v for k, v in source.meta.items() if k not in ("val", "tensor_meta", META)})
        marker.meta["val"] = _fake(source, is_torchs)
        put(marker)
        if is_marker(value) and not value.users:
            graph.erase_node(value)
        marker.meta[META] = Marker(_why_copy(graph, source, node, marker, written), delivery.settle)
    if works_in_place:
        node.target = _IN_PLACE[call.overload]
    if works_in_place or call.mutated:
        _keep_results_inside(graph, call)
    rewriting.rewrote(node, NAME, "allocation", call.overload, deliver=delivery.deliver)


def _fake(source: Node, contiguous: bool) -> torch.Tensor:
    value = value_of(source)
    assert value is not None
    with value.fake_mode:  # type: ignore[attr-defined]
        if contiguous:
            return torch.empty_like(value, memory_format=torch.contiguous_format)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _why_copy(graph: Graph, source: Node, collective: Node, marker: Node, written: bool) -> str | None:
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
            copy = graph.call_function(torch.ops.aten.clone.default, (result,))
        value = value_of(result)
        assert value is not None
        copy.meta.update({k: v for k, v in result.meta.items() if k not in ("val", "tensor_meta")})
        with value.fake_mode:  # type: ignore[attr-defined]
            copy.meta["val"] = torch.clone(value)
        output.replace_input_with(result, copy)


_WAITS = {c10d.wait_tensor.default}


def _drop_other_markers(graph: Graph) -> None:
    """Whoever reads a marked value beside the collective (its backward, for example) reads the value itself.

    A value of ``with symmetric_memory():`` that no collective took keeps its marker: the user wants it there.
    """
    for node in list(graph.nodes):
        if not is_marker(node) or META in node.meta:
            continue
        wanted = not is_call_marker(node) and not any(
            is_marker(user) for user in source_of(node).users if user is not node
        )
        if not wanted:
            node.replace_all_uses_with(source_of(node), delete_user_cb=lambda user: call_of(user) is None)
        if not node.users:
            graph.erase_node(node)
