"""mm(wait(all_gather(x)), b), ...  ->  symmpatterns.all_gather_matmul(x, [b, ...])

Also addmm, a reshape in between, the split and cat by which a dimension other than the first is gathered, and several
matmuls that share the gather. The gathered tensor stays only if something else reads it. Pays while the transfer of x is
a fair share of the GEMMs.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
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
    stable_topological_sort,
)
from torch.fx import Node

from symmpatterns import config
from symmpatterns.patterns._matmul import pays
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import ALL_GATHER, RESHAPE, WAIT, aten, hidden_work, value_of
from symmpatterns.replacements import MATMUL_DTYPES

NAME = "all_gather_matmul"

_START = CallFunction(ALL_GATHER, KeywordArg("shard"), KeywordArg("world_size"), KeywordArg("group"), _users=MULTIPLE)
_PATTERN = CallFunction(WAIT, _START, _users=MULTIPLE)


@dataclass
class _Gather:
    """What becomes of a gathered tensor.

    full      the node that holds it, joined along `dim`
    matmuls   mm and addmm nodes that multiply it, as rows, from the left
    others    whether anything else reads it
    """

    full: Node
    dim: int
    matmuls: list[Node] = field(default_factory=list)
    others: bool = False


def apply(rewriting: Rewriting) -> None:
    """Rewrites every match in the graph that is worth it."""
    if not config.template:
        return
    family = PatternMatcherPass(pass_name=f"symmpatterns_{NAME}")
    register_graph_pattern(_PATTERN, extra_check=partial(worthwhile, rewriting), pass_dict=family)(
        partial(rewrite, rewriting)
    )
    family.apply(rewriting.graph)


def _read(wait: Node) -> _Gather:
    full, dim = _join(wait)
    gather = _Gather(full, dim)
    value = value_of(full)
    assert value is not None

    def visit(node: Node) -> None:
        for user in node.users:
            shape = value_of(user)
            if user.target in RESHAPE and shape is not None and shape.ndim >= 2 and shape.shape[-1] == value.shape[-1]:
                visit(user)
            elif _multiplies(user, node) and not any(
                _depends_on(o, wait) for o in user.all_input_nodes if o is not node
            ):
                gather.matmuls.append(user)
            else:
                gather.others = True

    visit(full)
    return gather


def _join(wait: Node) -> tuple[Node, int]:
    """(full, dim): the ranks' shards stand one after the other in `wait`, and side by side along `dim` in `full`."""
    users = list(wait.users)
    if len(users) == 1 and users[0].target is aten.split.Tensor and users[0].args[2:] in ((), (0,)):
        parts = list(users[0].users)
        if all(part.target is operator.getitem for part in parts):
            parts.sort(key=lambda part: part.args[1])  # type: ignore[arg-type,return-value]
            readers = {reader for part in parts for reader in part.users}
            if len(readers) == 1 and (cat := readers.pop()).target is aten.cat.default and cat.args[0] == parts:
                value = value_of(cat)
                dim = cat.args[1] if len(cat.args) > 1 else 0
                if value is not None and isinstance(dim, int):
                    return cat, dim % value.ndim
    return wait, 0


def _multiplies(node: Node, rows: Node) -> bool:
    """Whether `node` is a plain matmul with `rows` as its left operand and nowhere else."""
    if node.target is aten.mm.default:
        return node.args[0] is rows and node.args[1] is not rows
    if node.target is aten.addmm.default:
        bias = value_of(node.args[0]) if isinstance(node.args[0], Node) else None
        plain = all(node.kwargs.get(name, 1) == 1 for name in ("alpha", "beta"))
        return plain and node.args[1] is rows and node.args[2] is not rows and bias is not None and _is_row(bias, node)
    return False


def _is_row(bias: torch.Tensor, matmul: Node) -> bool:
    value = value_of(matmul)
    return value is not None and bias.ndim == 1 and bias.dtype == value.dtype


def worthwhile(rewriting: Rewriting, match: Match) -> bool:
    """The guard: at least one matmul multiplies the gathered rows, and all of them in the shard's dtype."""
    wait = match.output_node()
    start = wait.args[0]
    assert isinstance(start, Node)
    shard = match.kwargs["shard"]
    decline = partial(rewriting.decline, start, NAME)
    value = value_of(shard) if isinstance(shard, Node) else None
    if value is None or value_of(wait) is None or value.ndim < 2:
        return False
    gather = _read(wait)
    if not gather.matmuls:
        return False
    if len(start.users) > 1:
        return decline("collective_has_other_users", f"{start.name} is used besides its wait")
    dtypes = {value.dtype, *(m.dtype for node in gather.matmuls if (m := value_of(node)) is not None)}
    if dtypes != {value.dtype} or value.dtype not in MATMUL_DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in MATMUL_DTYPES)
        return decline("dtype", f"its matmuls have dtypes {', '.join(map(str, dtypes))}; the kernel takes {wanted}")
    if value.device.type not in ("cpu", "cuda"):
        return decline("device", f"there is no symmetric memory on device {value.device}")
    if config.keep_overlap and (hidden := hidden_work(start, wait)) is not None:
        return decline("overlapped", f"its wait comes after {hidden}, which hides it already")
    group = rewriting.can_reach_peers(start, NAME, match.kwargs["group"])
    if group is None:
        return False
    shapes = [value_of(node).shape for node in gather.matmuls]  # type: ignore[union-attr]
    inner = value_of(gather.full).shape[-1]  # type: ignore[union-attr]
    return pays(rewriting, NAME, start, (shapes[0][0], sum(shape[1] for shape in shapes), inner), group)


def rewrite(rewriting: Rewriting, match: Match, shard: Node, world_size: int, group: str) -> None:
    """The replacement: one call; its products go where the matmuls were, the gathered tensor where the gather was."""
    wait, graph = match.output_node(), match.graph
    gather = _read(wait)
    full_value = value_of(gather.full)
    assert full_value is not None
    target = torch.ops.symmpatterns.all_gather_matmul.default
    weights = [node.args[-1] for node in gather.matmuls]
    rows = [node.args[0] if node.target is aten.addmm.default else None for node in gather.matmuls]
    biases: dict[str, Any] = {"biases": rows} if any(rows) else {}
    with graph.inserting_before(gather.full):
        call = graph.call_function(target, (shard, weights, gather.dim, group, gather.others), biases)
        products = graph.call_function(operator.getitem, (call, 1))
        columns = [value_of(node).shape[1] for node in gather.matmuls]  # type: ignore[union-attr]
        products.meta["val"] = [full_value.new_empty([*full_value.shape[:-1], width]) for width in columns]
        call.meta["val"] = (full_value if gather.others else None, products.meta["val"])
        if gather.others:
            kept = graph.call_function(operator.getitem, (call, 0))
            kept.meta["val"] = full_value
    for index, node in enumerate(gather.matmuls):
        with graph.inserting_before(node):
            product = graph.call_function(operator.getitem, (products, index))
            product.meta["val"] = products.meta["val"][index]
            if full_value.ndim > 2:
                product = graph.call_function(aten.reshape.default, (product, [-1, _columns(node)]))
                product.meta.update(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    if gather.others:
        gather.full.replace_all_uses_with(kept)
    _erase_unread(gather.full)
    rewriting.rewrote(wait.args[0], NAME, "template", target, detail=f"{len(weights)} matmuls")  # type: ignore[arg-type]
    match.erase_nodes()
    stable_topological_sort(graph)  # a weight may be viewed only just before its matmul


def _columns(matmul: Node) -> Any:
    """The number of columns of a product, as an argument of a node: a symbolic one needs a node that computes it."""
    weight = matmul.args[-1]
    size = value_of(weight).shape[1]  # type: ignore[union-attr,arg-type]
    if isinstance(size, int):
        return size
    node = matmul.graph.call_function(aten.sym_size.int, (weight, 1))
    node.meta["val"] = size
    return node


def _erase_unread(node: Node) -> None:
    """Removes `node` if nothing reads it any more, after the reshapes of it and before the split and cat that made it."""
    for user in list(node.users):
        if user.target in RESHAPE:
            _erase_unread(user)
    if node.users or node.target in WAIT:
        return
    sources = list(node.all_input_nodes)
    node.graph.erase_node(node)
    for source in sources:
        if source.target in (operator.getitem, aten.split.Tensor):
            _erase_unread(source)


def _depends_on(node: Node, source: Node) -> bool:
    """Whether `node` is computed from `source`."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current is source:
            return True
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False
