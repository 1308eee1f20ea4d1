"""wait(all_reduce(mm(a, b)))  ->  symmpatterns.matmul_all_reduce(a, b)        also addmm, and a reshape in between

Pays while the transfer is a fair share of the GEMM; cost_model.py decides.
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
from symmpatterns.patterns._matmul import erase, find_product, is_fusable, pays
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import ALL_REDUCE, WAIT, value_of

NAME = "matmul_all_reduce"

_START = CallFunction(ALL_REDUCE, KeywordArg("product"), KeywordArg("reduce_op"), KeywordArg("group"), _users=MULTIPLE)
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
    """The guard: a matmul whose product nobody else reads, a plain sum, peers within reach, and a gain."""
    wait = match.output_node()
    start = wait.args[0]
    assert isinstance(start, Node)
    product = find_product(match.kwargs["product"])
    if product is None or product.chunks:
        return False
    group = is_fusable(rewriting, NAME, product, start, wait, ("sum",))
    if group is None:
        return False
    result, a = value_of(product.matmul), value_of(product.a)
    assert result is not None and a is not None
    return pays(rewriting, NAME, start, (result.shape[0], result.shape[1], a.shape[1]), group)


def rewrite(rewriting: Rewriting, match: Match, product: Node, reduce_op: str, group: str) -> None:
    """The replacement: one call, and the reshape that stood between matmul and all-reduce."""
    wait = match.output_node()
    found = find_product(product)
    assert found is not None
    operator = torch.ops.symmpatterns.matmul_all_reduce.default
    bias: dict[str, Any] = {} if found.bias is None else {"bias": found.bias}
    with match.graph.inserting_before(wait):
        result = match.graph.call_function(operator, (found.a, found.b, reduce_op, group), bias)
        result.meta.update(found.matmul.meta)
        for view in found.views:
            result = match.graph.call_function(view.target, (result, view.args[1]))  # type: ignore[arg-type]
            result.meta.update(view.meta)
    rewriting.rewrote(wait.args[0], NAME, "template", operator)  # type: ignore[arg-type]
    wait.replace_all_uses_with(result)
    match.erase_nodes()
    erase(found)
