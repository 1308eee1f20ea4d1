"""Gradients of weights on their way out of a backward graph: data-parallel traffic, which schedulers hide.

::

    reduce_scatter(mm(permute(tangent), x))  ->  output       a weight's gradient: summed over tokens
    reduce_scatter(sum(tangent * x, 0))      ->  output       that of a norm's weight, or of a bias
    all_reduce(mm(permute(tangent), x))      ->  output       a weight's gradient that all ranks have
    all_reduce(sum(tangent * x, 0))          ->  output       rewritten: sequence parallelism has these of its norms, small
    reduce_scatter(mm(tangent, w))           ->  ...          the input's gradient: tensor parallelism, on the critical path

FSDP, DDP and both together (one collective behind the other) inside the graph end like that. Nothing in the graph waits for
such a collective, so Inductor's overlap and bucketing passes, which run after ours, can start it early and wait late. Fused
with its producer it could not move.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from symmpatterns import config
from symmpatterns.patterns._vocabulary import ALL_REDUCE, CAST, REDUCE_SCATTER, RESHAPE, WAIT, aten, c10d, value_of

REDUCE_SCATTERS = (*REDUCE_SCATTER, c10d.reduce_scatter_tensor_coalesced.default)

_TRANSPARENT = {*RESHAPE, *CAST, aten.clone.default, aten.div.Tensor, aten.mul.Tensor, aten.constant_pad_nd.default}
_MATMULS = {aten.mm.default: 0, aten.addmm.default: 1, aten._scaled_mm.default: 0}


def gradient_problem(source: Node, start: Node, wait: Node) -> tuple[str, str] | None:
    """(code, reason) when a reduction `start` of `source` takes a weight's gradient out of a backward graph, else None."""
    if config.force or not config.keep_overlap:
        return None
    of_matmuls_alone = start.target not in REDUCE_SCATTERS
    if not (_is_backward(source.graph) and _only_leaves(wait) and _sums(source, of_matmuls_alone)):
        return None
    return (
        "weight_gradient",
        "it reduces a weight's gradient that nothing in the graph reads, as FSDP and DDP do, which schedulers hide behind "
        "other work; config.force or config.keep_overlap=False rewrites it nevertheless",
    )


def _is_backward(graph: Graph) -> bool:
    """AOTAutograd calls the gradients that a backward graph is given tangents."""
    return any(node.op == "placeholder" and str(node.target).startswith("tangents_") for node in graph.nodes)


def _only_leaves(node: Node) -> bool:
    return bool(node.users) and all(
        user.op == "output" or (_is_on_the_way(user) and _only_leaves(user)) for user in node.users
    )


def _is_on_the_way(node: Node) -> bool:
    """Another reduction counts as well."""
    return node.target in _TRANSPARENT or node.target in WAIT or node.target in (*ALL_REDUCE, *REDUCE_SCATTERS)


def _sums(node: Node, of_matmuls_alone: bool) -> bool:
    """Whether `node` is a sum over tokens: a matmul whose left operand is transposed, or a reduction of its rows."""
    while _is_on_the_way(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    if node.target in _MATMULS:
        left = node.args[_MATMULS[node.target]]
        return isinstance(left, Node) and _is_transposed(value_of(left))
    if not of_matmuls_alone and node.target is aten.sum.dim_IntList and isinstance(node.args[0], Node):
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
