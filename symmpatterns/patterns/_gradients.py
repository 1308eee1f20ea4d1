"""Gradients of weights on their way out of a backward graph: data-parallel traffic, which schedulers hide.

::

    reduce_scatter(mm(permute(tangent), x))  ->  output       a weight's gradient: summed over tokens
    reduce_scatter(sum(tangent * x, 0))      ->  output       that of a norm's weight, or of a bias
    reduce_scatter(mm(tangent, w))           ->  ...          the input's gradient: tensor parallelism, on the critical path

FSDP inside the graph ends like that. Nothing in the graph waits for such a collective, so Inductor's overlap and
bucketing passes, which run after ours, can start it early and wait late. Fused with its producer it could not move.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from symmpatterns import config
from symmpatterns.patterns._vocabulary import CAST, RESHAPE, aten, value_of

_TRANSPARENT = {*RESHAPE, *CAST, aten.clone.default, aten.div.Tensor, aten.mul.Tensor, aten.constant_pad_nd.default}
_MATMULS = {aten.mm.default: 0, aten.addmm.default: 1, aten._scaled_mm.default: 0}


def gradient_problem(source: Node, wait: Node) -> tuple[str, str] | None:
    """(code, reason) when a reduce-scatter of `source` takes a weight's gradient out of a backward graph, else None."""
    if config.force or not config.keep_overlap:
        return None
    if not (_is_backward(source.graph) and _only_leaves(wait) and _sums(source)):
        return None
    return (
        "weight_gradient",
        "it scatters a weight's gradient that nothing in the graph reads, as FSDP does, which schedulers hide behind "
        "other work; config.force or config.keep_overlap=False rewrites it nevertheless",
    )


def _is_backward(graph: Graph) -> bool:
    """AOTAutograd calls the gradients that a backward graph is given tangents."""
    return any(node.op == "placeholder" and str(node.target).startswith("tangents_") for node in graph.nodes)


def _only_leaves(node: Node) -> bool:
    return bool(node.users) and all(
        user.op == "output" or (user.target in _TRANSPARENT and _only_leaves(user)) for user in node.users
    )


def _sums(node: Node) -> bool:
    """Whether `node` is a sum over tokens: a matmul whose left operand is transposed, or a reduction of its rows."""
    while node.target in _TRANSPARENT and isinstance(node.args[0], Node):
        node = node.args[0]
    if node.target in _MATMULS:
        left = node.args[_MATMULS[node.target]]
        return isinstance(left, Node) and _is_transposed(value_of(left))
    if node.target is aten.sum.dim_IntList and isinstance(node.args[0], Node):
        value, dims = value_of(node.args[0]), node.args[1]
        assert isinstance(dims, (list, tuple))
        return value is not None and all(isinstance(d, int) and d % value.ndim != value.ndim - 1 for d in dims)
    return False


def _is_transposed(value: torch.Tensor | None) -> bool:
    """Whether a matrix lies in memory column by column; one that was saved for backward has no permute to see."""
    if value is None:
        return False
    rows, columns = value.stride()
    return isinstance(rows, int) and rows == 1 and not (isinstance(columns, int) and columns == 1)
