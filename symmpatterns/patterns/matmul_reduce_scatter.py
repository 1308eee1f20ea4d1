"""wait(reduce_scatter(mm(a, b)))  ->  symmpatterns.matmul_reduce_scatter(a, b, dim)

Also addmm and _scaled_mm, a reshape or a conversion of the dtype in between, and the split and cat by which a dimension
other than the first is scattered. Pays like matmul -> all-reduce, at half the transfer.
"""

from __future__ import annotations

import torch
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg, Match
from torch.fx import Node

from symmpatterns import compat
from symmpatterns.groups import Group
from symmpatterns.patterns._matmul import apply_template, is_fusable, replace
from symmpatterns.patterns._product import Product, find_product
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import REDUCE_SCATTER, RESHAPE, WAIT, aten, name_of, value_of

NAME = "matmul_reduce_scatter"

_START = CallFunction(
    REDUCE_SCATTER,
    KeywordArg("product"),
    KeywordArg("reduce_op"),
    KeywordArg("world_size"),
    KeywordArg("group"),
    _users=MULTIPLE,
)
_PATTERN = CallFunction(WAIT, _START)


def apply(rewriting: Rewriting) -> None:
    """Rewrites every match in the graph that is worth it."""
    apply_template(rewriting, NAME, _PATTERN, worthwhile, rewrite)


def worthwhile(rewriting: Rewriting, match: Match) -> bool:
    """The guard: as for all-reduce, and the scattered dimension is one of the product's rows or its columns."""
    return is_fusable(rewriting, NAME, match, ("sum", "avg"), _problem)


def _problem(product: Product, group: Group) -> tuple[str, str] | None:
    if product.chunks and len(product.chunks) != group.world_size + 2:
        return "chunks", "its input is not cut into one chunk a rank"
    if product.matmul.is_batched:
        return "batched", f"{name_of(product.matmul.node.target)} is a batch of matrices, the kernel scatters one"
    return _arrangement_problem(product)


def _arrangement_problem(product: Product) -> tuple[str, str] | None:
    """The kernel scatters the product as it computes it, but for a reshape of its rows."""
    for view in product.arrangements:
        if view.target not in RESHAPE:
            return (
                "reshape",
                f"the product goes through {name_of(view.target)} before it is scattered, not a mere reshape",
            )
    last, matmul = value_of(product.last), value_of(product.matmul.node)
    if last is None or matmul is None:
        return "no_metadata", "the product carries no shape information"
    if last.ndim < 2 or last.shape[-1] != matmul.shape[-1]:
        return "reshape", "the product's columns are reshaped before it is scattered"
    return None


def rewrite(rewriting: Rewriting, match: Match, product: Node, reduce_op: str, world_size: int, group: str) -> None:
    """The replacement: one call on `a` with the dimensions that the reshaped product has, so `dim` means the same."""
    graph, wait = match.graph, match.output_node()
    found = find_product(product)
    assert found is not None
    matmul, operator = found.matmul, torch.ops.symmpatterns.matmul_reduce_scatter.default
    a, a_value, last = matmul.a, value_of(matmul.a), value_of(found.last)
    assert a_value is not None and last is not None
    with graph.inserting_before(wait):
        if found.arrangements:
            sizes = [*last.shape[:-1], a_value.shape[1]]  # all of them: where one is 0, -1 could be anything
            a = graph.call_function(aten.reshape.default, (a, compat.sizes_in_graph(graph, sizes)))
            a.meta["val"] = a_value.reshape(sizes)
        result = graph.call_function(operator, (a, matmul.b, reduce_op, found.dim, group), found.emit_options())
        result.meta.update(matmul.node.meta)
        result.meta["val"] = value_of(wait)
    replace(rewriting, NAME, match, found, operator, result)
