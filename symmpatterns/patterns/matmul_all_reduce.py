"""wait(all_reduce(mm(a, b)))  ->  symmpatterns.matmul_all_reduce(a, b)

Also addmm, bmm, baddbmm and _scaled_mm; what arranges the product anew, or converts its dtype, may stand in between.
Pays while the transfer is a fair share of the GEMM; cost_model.py decides. Where an RMSNorm follows, it may say that the
collective is better fused with that, by the families behind this one.
"""

from __future__ import annotations

import torch
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg, Match
from torch.fx import Node

from symmpatterns import config, cost_model
from symmpatterns.groups import Group
from symmpatterns.patterns._matmul import apply_template, is_fusable, replace, size_of
from symmpatterns.patterns._norm import norm_behind
from symmpatterns.patterns._product import Product, find_product
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import ALL_REDUCE, WAIT, value_of

NAME = "matmul_all_reduce"

_START = CallFunction(ALL_REDUCE, KeywordArg("product"), KeywordArg("reduce_op"), KeywordArg("group"), _users=MULTIPLE)
_PATTERN = CallFunction(WAIT, _START)


def apply(rewriting: Rewriting) -> None:
    """Rewrites every match in the graph that is worth it."""
    apply_template(rewriting, NAME, _PATTERN, worthwhile, rewrite)


def worthwhile(rewriting: Rewriting, match: Match) -> bool:
    """The guard: a matmul whose product nobody else reads, a sum or an average, peers within reach, and a gain."""
    return is_fusable(rewriting, NAME, match, ("sum", "avg"), _problem)


def _problem(product: Product, group: Group) -> tuple[str, str] | None:
    if product.chunks:
        return "chunks", "its input is cut into chunks and put together again in another order"
    start, value, a = next(iter(product.last.users)), value_of(product.last), value_of(product.matmul.a)
    if config.force or product.dtypes is None or value is None or a is None or norm_behind(start) is None:
        return None
    size = size_of(product.matmul)
    verdict = cost_model.norm_is_better(*size, a.dtype, group.world_size, value.device, product.dtypes[0])
    return ("cost_model", verdict.why) if verdict.fuse else None


def rewrite(rewriting: Rewriting, match: Match, product: Node, reduce_op: str, group: str) -> None:
    """The replacement: one call, and the reshapes that stood between matmul and all-reduce."""
    found = find_product(product)
    assert found is not None and found.dtypes is not None
    matmul, operator, dtype = found.matmul, torch.ops.symmpatterns.matmul_all_reduce.default, found.dtypes[1]
    graph = match.graph
    with graph.inserting_before(match.output_node()):
        result = graph.call_function(operator, (matmul.a, matmul.b, reduce_op, group), found.emit_options())
        result.meta.update(matmul.node.meta)
        result.meta["val"] = matmul.node.meta["val"].to(dtype)
        for view in found.arrangements:
            result = graph.call_function(view.target, (result, *view.args[1:]), view.kwargs)  # type: ignore[arg-type]
            result.meta.update(view.meta)
            result.meta["val"] = view.meta["val"].to(dtype)
    replace(rewriting, NAME, match, found, operator, result)
