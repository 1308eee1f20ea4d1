"""wait(reduce_scatter(mm(a, b)))  ->  symmpatterns.matmul_reduce_scatter(a, b, dim)

Also addmm, a reshape in between, and the split and cat by which a dimension other than the first is scattered. Pays like
matmul -> all-reduce, at half the transfer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    KeywordArg,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)
from torch.fx import Node

from symmpatterns import config
from symmpatterns.patterns._matmul import Product, erase, find_product, is_fusable, pays
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import REDUCE_SCATTER, WAIT, aten, value_of

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
    if not config.template:
        return
    family = PatternMatcherPass(pass_name=f"symmpatterns_{NAME}")
    register_graph_pattern(_PATTERN, extra_check=partial(worthwhile, rewriting), pass_dict=family)(
        partial(rewrite, rewriting)
    )
    family.apply(rewriting.graph)


def worthwhile(rewriting: Rewriting, match: Match) -> bool:
    """The guard: as for all-reduce, and the scattered dimension is one of the product's rows or its columns."""
    wait = match.output_node()
    start = wait.args[0]
    assert isinstance(start, Node)
    product = find_product(match.kwargs["product"])
    if product is None:
        return False
    group = is_fusable(rewriting, NAME, product, start, wait, ("sum", "avg"))
    if group is None:
        return False
    result, a = value_of(product.matmul), value_of(product.a)
    assert result is not None and a is not None
    if product.chunks and len(product.chunks) != group.world_size + 2:
        return rewriting.decline(start, NAME, "chunks", "its input is not cut into one chunk a rank")
    if not _keeps_columns(product):
        return rewriting.decline(start, NAME, "reshape", "the product's columns are reshaped before it is scattered")
    return pays(rewriting, NAME, start, (result.shape[0], result.shape[1], a.shape[1]), group)


def _keeps_columns(product: Product) -> bool:
    last, matmul = value_of(product.last), value_of(product.matmul)
    return last is not None and matmul is not None and last.ndim >= 2 and last.shape[-1] == matmul.shape[-1]


def rewrite(rewriting: Rewriting, match: Match, product: Node, reduce_op: str, world_size: int, group: str) -> None:
    """The replacement: one call on `a` with the dimensions that the reshaped product has, so `dim` means the same."""
    wait, graph = match.output_node(), match.graph
    found = find_product(product)
    assert found is not None
    operator = torch.ops.symmpatterns.matmul_reduce_scatter.default
    bias: dict[str, Any] = {} if found.bias is None else {"bias": found.bias}
    a_value = value_of(found.a)
    assert a_value is not None
    with graph.inserting_before(wait):
        a = found.a
        if found.views:
            a = graph.call_function(aten.reshape.default, (a, [*_leading(found.views[-1]), -1]))
            shape = value_of(found.last).shape  # type: ignore[union-attr]
            a.meta["val"] = a_value.reshape(*shape[:-1], a_value.shape[1])
        result = graph.call_function(operator, (a, found.b, reduce_op, found.dim, group), bias)
        result.meta.update(found.matmul.meta)
        result.meta["val"] = value_of(wait)
    rewriting.rewrote(wait.args[0], NAME, "template", operator)  # type: ignore[arg-type]
    wait.replace_all_uses_with(result)
    match.erase_nodes()
    erase(found)


def _leading(view: Node) -> list[Any]:
    """The sizes of a reshape but the last, as the graph spells them (numbers or nodes)."""
    return list(view.args[1])[:-1]  # type: ignore[arg-type]
