"""vLLM's collectives, said in torch's words for as long as the families look at the graph.

::

    vllm.all_reduce(x, "tp:0")               wait(all_reduce(x, "sum", group))
    vllm.reduce_scatter(x, dim, W, "tp:0")   wait(reduce_scatter_tensor(cat(split(x, ..., dim)), "sum", W, group))
    vllm.all_gather(x, dim, W, "tp:0")       cat(split(wait(all_gather_into_tensor(x, W, group))), dim)

vLLM names its groups itself; ``groups.resolve_name`` knows which process group a name means. What no family took is put
back as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from symmpatterns.groups import SymmetricMemoryError, resolve_name
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import aten, c10d, name_of, sizes, value_of
from symmpatterns.report import Record, add

_COLLECTIVES = {
    "vllm::all_reduce": "all_reduce",
    "vllm::reduce_scatter": "reduce_scatter",
    "vllm::all_gather": "all_gather",
}


@dataclass
class _Translated:
    """One collective of vLLM's, as it was, and the nodes that say it in torch's words, in order."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]
    start: Node
    nodes: list[Node]


def is_of_vllm(node: Node) -> bool:
    """Whether the node is a collective of vLLM's."""
    return _schema_name(node) in _COLLECTIVES


def translate(graph: Graph) -> list[_Translated]:
    """Says every collective of vLLM's in the graph in torch's words; reports those that cannot be said."""
    answer = []
    for node in list(graph.nodes):
        collective = _COLLECTIVES.get(_schema_name(node))
        if collective is None:
            continue
        problem = _problem(node)
        if problem is None:
            answer.append(_translate(graph, node, collective))
        else:
            _report(node, collective, *problem)
    return answer


def restore(rewriting: Rewriting, translated: list[_Translated]) -> None:
    """Puts back what no family took."""
    graph = rewriting.graph
    for each in translated:
        if rewriting.is_rewritten(each.start):
            continue
        last = each.nodes[-1]
        with graph.inserting_before(last):
            node = graph.call_function(each.target, each.args, each.kwargs)
        node.meta.update(each.meta)
        last.replace_all_uses_with(node)
        for dead in reversed(each.nodes):
            graph.erase_node(dead)


def _schema_name(node: Node) -> str:
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _arguments(node: Node) -> dict[str, Any]:
    """tensor, dim and world_size where there are any, group_name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return {**dict(zip((a.name for a in node.target._schema.arguments), node.args)), **node.kwargs}


def _problem(node: Node) -> tuple[str, str] | None:
    """(code, reason) when a collective cannot be said in torch's words, else None."""
    arguments = _arguments(node)
    tensor = arguments.get("tensor")
    value = value_of(tensor) if isinstance(tensor, Node) else None
    if value is None or value_of(node) is None:
        return "no_metadata", f"{name_of(node.target)} carries no shape information"
    try:
        resolve_name(arguments.get("group_name"))
    except SymmetricMemoryError as error:
        return "unknown_group", str(error)
    dim = arguments.get("dim", 0)
    if not isinstance(dim, int) or not -value.ndim <= dim < max(value.ndim, 1):
        return "unsupported_form", f"its dimension {dim!r} is none of its input's {value.ndim}"
    size, world_size = value.shape[dim] if "dim" in arguments else 0, arguments.get("world_size", 1)
    if dim % max(value.ndim, 1) != 0 and not (isinstance(size, int) and isinstance(world_size, int)):
        return "unsupported_form", f"dimension {dim}, which is not the first, has the symbolic size {size}"
    if _schema_name(node) == "vllm::reduce_scatter" and isinstance(size, int) and size % world_size:
        return "uneven", f"size {size} does not divide by the {world_size} ranks of the group"
    return None


def _translate(graph: Graph, node: Node, collective: str) -> _Translated:
    arguments = _arguments(node)
    tensor, group = arguments["tensor"], resolve_name(arguments["group_name"])
    value = value_of(tensor)
    assert value is not None
    dim, world_size = arguments.get("dim", 0) % max(value.ndim, 1), arguments.get("world_size", 1)
    nodes: list[Node] = []

    def call(target: Callable[..., Any], *args: Any) -> Node:
        made = graph.call_function(target, args)
        with value.fake_mode:  # type: ignore[attr-defined]
            made.meta["val"] = target(*torch.fx.map_arg(args, lambda each: each.meta["val"]))
        nodes.append(made)
        return made

    def chunks(source: Node, along: int, to: int) -> Node:
        """`source`, cut along one dimension into as many parts as there are ranks, and put together along another."""
        parts = call(aten.split.Tensor, source, source.meta["val"].shape[along] // world_size, along)
        return call(aten.cat.default, [call(operator.getitem, parts, i) for i in range(world_size)], to)

    with graph.inserting_before(node):
        if collective == "all_reduce":
            start = call(c10d.all_reduce.default, tensor, "sum", group)
            last = call(c10d.wait_tensor.default, start)
        elif collective == "reduce_scatter":
            source = chunks(tensor, dim, 0) if dim else tensor
            start = call(c10d.reduce_scatter_tensor.default, source, "sum", world_size, group)
            last = call(c10d.wait_tensor.default, start)
        else:
            start = call(c10d.all_gather_into_tensor.default, tensor, world_size, group)
            last = call(c10d.wait_tensor.default, start)
            if dim:
                last = chunks(last, 0, dim)
    original = _Translated(node.target, node.args, dict(node.kwargs), dict(node.meta), start, nodes)
    node.replace_all_uses_with(last)
    graph.erase_node(node)
    return original


def _report(node: Node, collective: str, code: str, reason: str) -> None:
    arguments = _arguments(node)
    tensor = arguments.get("tensor")
    value = value_of(tensor) if isinstance(tensor, Node) else None
    add(
        Record(
            family=None,
            collective=collective,
            strategy=None,
            op=None if collective == "all_gather" else "sum",
            shape=() if value is None else sizes(value.shape),
            dtype=None if value is None else value.dtype,
            group_name=str(arguments.get("group_name")),
            world_size=arguments.get("world_size"),
            producer=name_of(tensor.target) if isinstance(tensor, Node) else None,
            code=code,
            reason=reason,
        )
    )
