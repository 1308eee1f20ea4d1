"""wait(all_reduce(mm(a, b)))  ->  symmpatterns.matmul_all_reduce(a, b)        also addmm, and a reshape in between

Pays while the transfer is a fair share of the GEMM; cost_model.py decides.
"""

from __future__ import annotations

from functools import partial

import torch
from torch._inductor.pattern_matcher import (
    CallFunction,
    Ignored,
    KeywordArg,
    Match,
    MULTIPLE,
    PatternExpr,
    PatternMatcherPass,
    register_graph_pattern,
)
from torch.fx import Node

from symmpatterns import config, cost_model
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import ALL_REDUCE, RESHAPE, WAIT, aten, hidden_work, hint, name_of, value_of
from symmpatterns.replacements import MATMUL_DTYPES

NAME = "matmul_all_reduce"

_MM = CallFunction(aten.mm.default, KeywordArg("a"), KeywordArg("b"), _users=MULTIPLE)
# The matcher lets a node have keyword arguments that the pattern does not name: the guard looks at alpha and beta.
_ADDMM = CallFunction(aten.addmm.default, KeywordArg("bias"), KeywordArg("a"), KeywordArg("b"), _users=MULTIPLE)


def _all_reduced(producer: PatternExpr) -> CallFunction:
    start = CallFunction(ALL_REDUCE, producer, KeywordArg("reduce_op"), KeywordArg("group_name"), _users=MULTIPLE)
    return CallFunction(WAIT, start)


def _reshaped(producer: PatternExpr) -> CallFunction:
    return CallFunction(RESHAPE, producer, Ignored(), _users=MULTIPLE)


def apply(rewriting: Rewriting) -> None:
    """Rewrites every match in the graph that is worth it."""
    if not config.template:
        return
    family = PatternMatcherPass(pass_name=f"symmpatterns_{NAME}")
    for producer in (_MM, _ADDMM):
        for pattern in (_all_reduced(producer), _all_reduced(_reshaped(producer))):
            register_graph_pattern(pattern, extra_check=partial(worthwhile, rewriting), pass_dict=family)(
                partial(rewrite, rewriting)
            )
    family.apply(rewriting.graph)


def _parts(match: Match) -> tuple[Node, list[Node], Node, Node]:
    """(matmul, reshapes in between, all_reduce, wait) of a match."""
    wait = match.output_node()
    start = wait.args[0]
    assert isinstance(start, Node)
    views = []
    node = start.args[0]
    assert isinstance(node, Node)
    while node.target in RESHAPE:
        views.append(node)
        node = node.args[0]
        assert isinstance(node, Node)
    return node, views, start, wait


def worthwhile(rewriting: Rewriting, match: Match) -> bool:
    """The guard: dtype, reduction, users, overlap, group, size; declines with a reason."""
    matmul, views, start, wait = _parts(match)
    decline = partial(rewriting.decline, start, NAME)
    producer = name_of(matmul.target)
    result = value_of(matmul)
    a, b = matmul.args[-2:] if matmul.target is aten.mm.default else matmul.args[1:3]
    if result is None or not isinstance(a, Node) or not isinstance(b, Node) or value_of(a) is None:
        return decline("no_metadata", f"{producer} carries no shape information")
    a_value = value_of(a)
    assert a_value is not None
    if result.dtype not in MATMUL_DTYPES or a_value.dtype != result.dtype:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in MATMUL_DTYPES)
        return decline("dtype", f"{producer} gives {result.dtype} from {a_value.dtype}; the kernel takes {wanted}")
    if result.device.type not in ("cpu", "cuda"):
        return decline("device", f"there is no symmetric memory on device {result.device}")
    if match.kwargs["reduce_op"] != "sum":
        return decline("reduce_op", f'the kernel reduces with "sum", not with "{match.kwargs["reduce_op"]}"')
    if any(matmul.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return decline("scaled_addmm", "addmm with alpha or beta other than 1 is not fused")
    bias = match.kwargs.get("bias")
    if bias is not None and (value_of(bias) is None or value_of(bias).ndim != 1 or value_of(bias).dtype != result.dtype):
        return decline("bias_form", "only a bias of one row, in the dtype of the result, is added in the kernel")
    for node in [matmul, *views]:
        if len(node.users) > 1:
            return decline(
                "producer_has_other_users",
                f"{node.name} is also read by {', '.join(u.name for u in list(node.users)[:3] if u is not start)}, so the "
                "unreduced product has to exist",
            )
    if len(start.users) > 1:
        return decline("collective_has_other_users", f"{start.name} is used besides its wait")
    if config.keep_overlap:
        hidden = hidden_work(start, wait)
        if hidden is not None:
            return decline("overlapped", f"its wait comes after {hidden}, which hides it already")
    group = rewriting.can_reach_peers(start, NAME, match.kwargs["group_name"])
    if group is None:
        return False
    m, n = (hint(s) for s in result.shape)
    verdict = cost_model.matmul_all_reduce(m, n, hint(a_value.shape[1]), result.dtype, group.world_size, result.device)
    if not verdict.fuse and not config.force:
        return decline("cost_model", verdict.why)
    return True


def rewrite(rewriting: Rewriting, match: Match, **_: object) -> None:
    """The replacement: one call, and the reshape that stood between matmul and all-reduce."""
    matmul, views, start, wait = _parts(match)
    graph = match.graph
    operator = torch.ops.symmpatterns.matmul_all_reduce.default
    arguments = (match.kwargs["a"], match.kwargs["b"], match.kwargs["reduce_op"], match.kwargs["group_name"])
    bias = match.kwargs.get("bias")
    with graph.inserting_before(wait):
        result = graph.call_function(operator, arguments, {} if bias is None else {"bias": bias})
        result.meta.update(matmul.meta)
        for view in reversed(views):
            result = graph.call_function(view.target, (result, view.args[1]))
            result.meta.update(view.meta)
    rewriting.rewrote(start, NAME, "template", operator)
    wait.replace_all_uses_with(result)
    match.erase_nodes()
