"""The order of calls that wait for peers is the graph's, on every rank, whatever Inductor makes of the loops between them.

Declared inputs are allocated by such calls too, which the graph does not have: Inductor makes one for each marker
(``to_symmetric``), when it knows what computes the input. It must come before whatever writes to the memory. That may be a
loop that Inductor computes early because others read it too, a matmul, a part of a concatenation, or what computed memory
that something else writes to later. Which it is depends on sizes, of which ranks may have different ones. So the place is
said here, from the graph alone: behind the calls that the input is sure to depend on, and, so that memory is not held from
the beginning of the graph on, behind those in front of the matmuls that it is computed from. It is in front of everything
that might be what writes there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from symmpatterns import compat
from symmpatterns.patterns._declared import call_of, is_marker
from symmpatterns.patterns._vllm import is_of_vllm
from symmpatterns.patterns._vocabulary import WAIT, is_loop, is_matmul


def keep_order_of_calls(graph: Graph) -> None:
    """Has Inductor make the graph's calls that wait for peers in their order, once the graph is rewritten."""
    calls: list[object] = []
    last: dict[Node, int] = {}  # how many calls there are up to the last one, or matmul, that a node depends on
    early: dict[Node, int] = {}  # how many are sure to come before what computes a node's value
    for node in graph.nodes:
        inputs = [each for each in node.all_input_nodes if not isinstance(each.meta.get("val"), (int, torch.SymInt))]
        target = _waiting_operator(node)
        if target is not None:
            calls.append(target)
        counts = target is not None or is_matmul(node)
        last[node] = len(calls) if counts else max((last[each] for each in inputs), default=0)
        is_new = _is_new_memory(node, target, inputs)
        early[node] = last[node] if is_new else min((early[each] for each in inputs), default=0)
    markers = {node.name: early[node] for node in graph.nodes if is_marker(node)}
    compat.keep_order_of_calls(graph, calls, markers)


def _is_new_memory(node: Node, waiting: object | None, inputs: Sequence[Node]) -> bool:
    """Whether what it returns is sure not to be an input, or a part of one, or a copy of one that is written to."""
    if waiting is not None:  # Inductor's own collectives write to a copy that it makes before
        return isinstance(node.target, torch._ops.OpOverload) and not _is_torchs(node.target)
    return is_matmul(node) or (is_loop(node) and len(inputs) > 1)


def _is_torchs(target: torch._ops.OpOverload) -> bool:
    return target.namespace == "_c10d_functional" and target not in WAIT


def _waiting_operator(node: Node) -> object | None:
    """The operator whose call a rank may spend waiting for others, if the node is one."""
    call, target = call_of(node), node.target
    if call is not None:
        return call.overload
    if not isinstance(target, torch._ops.OpOverload):
        return None
    # Ours that are of a group, some of which wait in their first call only; a marker becomes an allocation, if anything.
    of_group = any(argument.name == "group_name" for argument in target._schema.arguments)
    is_ours = target.namespace == "symmpatterns" and of_group and not is_marker(node)
    return target if is_ours or _is_torchs(target) or is_of_vllm(node) else None
