"""The words in which families describe graphs: operators and how they are spelled, and questions about nodes."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from symmpatterns import compat
from symmpatterns.patterns._declared import call_of

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

# A pattern traced by torch.export says `view` where post-grad graphs say `reshape`, so both are always meant.
RESHAPE = [aten.reshape.default, aten.view.default, aten._unsafe_view.default]
CAST = [torch.ops.prims.convert_element_type.default, aten._to_copy.default]
ALL_REDUCE = [c10d.all_reduce.default, c10d.all_reduce_.default]
REDUCE_SCATTER = [c10d.reduce_scatter_tensor.default]
ALL_GATHER = [c10d.all_gather_into_tensor.default]
WAIT = [c10d.wait_tensor.default]

# Collectives by the name under which they are reported; the position of the reduction and of the group among the
# operator's arguments.
COLLECTIVES: dict[object, tuple[str, int | None, int]] = {
    c10d.all_reduce.default: ("all_reduce", 1, 2),
    c10d.all_reduce_.default: ("all_reduce", 1, 2),
    c10d.all_reduce_coalesced.default: ("all_reduce", 1, 2),
    c10d.all_reduce_coalesced_.default: ("all_reduce", 1, 2),
    c10d.reduce_scatter_tensor.default: ("reduce_scatter", 1, 3),
    c10d.reduce_scatter_tensor_coalesced.default: ("reduce_scatter", 1, 3),
    c10d.all_gather_into_tensor.default: ("all_gather", None, 2),
    c10d.all_gather_into_tensor_out.default: ("all_gather", None, 2),
    c10d.all_gather_into_tensor_coalesced.default: ("all_gather", None, 2),
    c10d.all_to_all_single.default: ("all_to_all", None, 3),
    c10d.broadcast.default: ("broadcast", None, 2),
    c10d.broadcast_.default: ("broadcast", None, 2),
}

_MATMULS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_mm.default,
    aten._int_mm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
_GATHERS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default}


def value_of(node: Node) -> torch.Tensor | None:
    """The fake tensor a node computes, or None."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def name_of(target: object) -> str:
    """For example "aten.mm"; how reports speak of an operator."""
    if isinstance(target, torch._ops.OpOverload):
        text = str(target)
        return text.removesuffix(".default")
    return getattr(target, "__name__", str(target))


def sizes(shape: Sequence[object]) -> tuple[int | str, ...]:
    """A shape for a report: integers, and symbolic sizes as text."""
    return tuple(s if isinstance(s, int) else str(s) for s in shape)


def hint(size: object) -> int:
    """A size as a number: for a symbolic size the example it was traced with."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    value = getattr(node, "hint", None)
    return int(value) if value is not None else 1


def num_bytes(value: torch.Tensor) -> int:
    """Bytes of a fake tensor; symbolic sizes count as their example."""
    return math.prod(hint(s) for s in value.shape) * value.element_size()


def through_views(node: Node) -> Node:
    """The node that computes the data of `node`, skipping reshapes."""
    while node.op == "call_function" and node.target in RESHAPE and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def nodes_between(start: Node, end: Node) -> Iterator[Node]:
    node = start.next
    while node is not end and node.op != "root":
        yield node
        node = node.next


def is_loop(node: Node) -> bool:
    """Whether Inductor generates a loop for the node: it is computed element by element, reduces, or gathers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target in _GATHERS or not {torch.Tag.pointwise, torch.Tag.reduction}.isdisjoint(target.tags)


def is_matmul(node: Node) -> bool:
    """Whether the node is a matmul, convolution or attention, which Inductor leaves to a library or a template."""
    return node.op == "call_function" and node.target in _MATMULS


def something_mutates(start: Node, end: Node) -> bool:
    """Whether a tensor may change between two nodes: who reads it later would read something else."""
    for node in nodes_between(start, end):
        target = node.target
        if node.op == "call_function" and not isinstance(target, torch._ops.OpOverload) and target != operator.getitem:
            return True
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            return True
    return False


def hidden_work(start: Node, wait: Node) -> str | None:
    """What runs while the collective is under way and hides it: a matmul, convolution or attention; None without any.

    How large it is does not count: ranks may have different sizes of their own, and would decide differently.
    """
    for node in nodes_between(start, wait):
        if is_matmul(node):
            return f"{name_of(node.target)} ({node.name})"
    return None


def drop_repeated_waits(graph: Graph) -> None:
    """Takes out waits for what has been waited for: functional collectives wait by themselves under some torch versions,
    and a program that waits as well has two in a row."""
    for node in graph.nodes:
        if node.target in WAIT and isinstance(node.args[0], Node) and node.args[0].target in WAIT:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def ask_inputs_for_sizes(graph: Graph) -> None:
    """Computes from the graph's inputs what is asked as the size of a collective under way, as DTensor's graphs of symbolic
    sizes do: the collective has no other user then than its wait."""
    for node in graph.nodes:
        if node.target is not aten.sym_size.int or not is_collective(node.args[0]):
            continue
        if free_unbacked_symbols(node.meta["val"]):
            continue
        with graph.inserting_before(node):
            (size,) = compat.sizes_in_graph(graph, [node.meta["val"]])
        if isinstance(size, Node) and size is not node:
            node.replace_all_uses_with(size)
            graph.erase_node(node)


def collectives(graph: Graph) -> list[Node]:
    """The collectives of a graph in order: torch's functional ones, and operators with declared symmetric inputs."""
    return [node for node in graph.nodes if is_collective(node)]


def is_collective(node: Node) -> bool:
    return node.op == "call_function" and (node.target in COLLECTIVES or call_of(node) is not None)
