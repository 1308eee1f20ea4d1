"""mm(wait(all_gather(x)), b), ...  ->  symmpatterns.all_gather_matmul(x, [b, ...])

Also addmm and _scaled_mm, a reshape in between, the split and cat by which a dimension other than the first is gathered,
and several matmuls that share the gather. The gathered tensor stays only if something else reads it. Pays while the
transfer of x is a fair share of the GEMMs.
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
    stable_topological_sort,
)
from torch.fx import Node

from symmpatterns import compat, config
from symmpatterns.patterns._layouts import joined
from symmpatterns.patterns._matmul import apply_template, pays, size_of
from symmpatterns.patterns._product import Matmul, as_matmul
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import ALL_GATHER, RESHAPE, WAIT, aten, hidden_work, name_of, value_of
from symmpatterns.replacements import FLOAT8

NAME = "all_gather_matmul"

_START = CallFunction(ALL_GATHER, KeywordArg("shard"), KeywordArg("world_size"), KeywordArg("group"), _users=MULTIPLE)
_PATTERN = CallFunction(WAIT, _START, _users=MULTIPLE)


@dataclass
class _Gather:
    """What becomes of a gathered tensor.

    full      the node that holds it, joined along `dim`
    dtype     the dtype in which it is multiplied: bytes may travel that are a view of float8
    matmuls   those that multiply it, as rows, from the left
    others    whether anything else reads it
    problem   (code, reason) why the first matmul that reads it and is not among `matmuls` is not
    """

    full: Node
    dim: int
    dtype: torch.dtype
    matmuls: list[Matmul] = field(default_factory=list)
    others: bool = False
    problem: tuple[str, str] | None = None


def apply(rewriting: Rewriting) -> None:
    """Rewrites every match in the graph that is worth it."""
    apply_template(rewriting, NAME, _PATTERN, worthwhile, rewrite)


def _read(wait: Node, world_size: int) -> _Gather:
    full, dim, _ = joined(wait, world_size)
    value = value_of(full)
    assert value is not None
    gather = _Gather(full, dim, value.dtype)

    def visit(node: Node) -> None:
        for user in node.users:
            shape = value_of(user)
            if user.target in RESHAPE and shape is not None and shape.ndim >= 2 and shape.shape[-1] == value.shape[-1]:
                visit(user)
            elif _is_float8_view(user) and not gather.matmuls:
                gather.dtype = FLOAT8
                visit(user)
            elif not _is_multiplied(gather, as_matmul(user), node, wait):
                gather.others = True

    visit(full)
    return gather


def _is_float8_view(node: Node) -> bool:
    """Whether `node` only calls bytes float8, which not every backend sends as such."""
    return node.target is aten.view.dtype and node.args[1] == FLOAT8


def _is_multiplied(gather: _Gather, matmul: Matmul | None, rows: Node, wait: Node) -> bool:
    """Adds a matmul with `rows` as its left operand, and nowhere else, if one call can compute it with the others."""
    if matmul is None or matmul.a is not rows:
        return False
    problem = matmul.problem()
    if matmul.is_batched:
        problem = "batched", f"{name_of(matmul.node.target)} multiplies a batch of matrices, the kernel one"
    if problem is not None:
        gather.problem = gather.problem or problem
        return False
    value, a = value_of(matmul.node), value_of(rows)
    if value is None or a is None or a.dtype != gather.dtype or (a.dtype != FLOAT8 and value.dtype != a.dtype):
        return False
    if any(node is not rows and _depends_on(node, wait) for node in matmul.node.all_input_nodes):
        return False
    if rows in (matmul.b, matmul.bias) or not _agrees(matmul, gather.matmuls):
        return False
    gather.matmuls.append(matmul)
    return True


def _agrees(matmul: Matmul, others: list[Matmul]) -> bool:
    """Whether a call has the same left scale and the same dtype of the result for all."""
    first = others[0] if others else matmul
    return first.scales[0] is matmul.scales[0] and _dtype(first) == _dtype(matmul)


def _dtype(matmul: Matmul) -> torch.dtype:
    value = value_of(matmul.node)
    assert value is not None
    return value.dtype


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
    gather = _read(wait, match.kwargs["world_size"])
    if not gather.matmuls:
        return False if gather.problem is None else decline(*gather.problem)
    if len(start.users) > 1:
        return decline("collective_has_other_users", f"{start.name} is used besides its wait")
    if value.device.type not in ("cpu", "cuda"):
        return decline("device", f"there is no symmetric memory on device {value.device}")
    if compat.compiles_cpp_at_run_time():
        return decline(
            "cpp_wrapper", "C++ code that is compiled at run time cannot call an operator with several results"
        )
    if config.keep_overlap and (hidden := hidden_work(start, wait)) is not None:
        return decline("overlapped", f"its wait comes after {hidden}, which hides it already")
    group = rewriting.can_reach_peers(start, NAME, match.kwargs["group"])
    if group is None:
        return False
    sizes = [size_of(matmul) for matmul in gather.matmuls]
    size = (sizes[0][0], sum(columns for _, columns, _ in sizes), sizes[0][2])
    return pays(rewriting, NAME, start, gather.matmuls[0], size, group, gather.dtype)


def rewrite(rewriting: Rewriting, match: Match, shard: Node, world_size: int, group: str) -> None:
    """The replacement: one call; its products go where the matmuls were, the gathered tensor where the gather was."""
    wait, graph = match.output_node(), match.graph
    gather = _read(wait, world_size)
    full_value = value_of(gather.full)
    assert full_value is not None
    target = torch.ops.symmpatterns.all_gather_matmul.default
    first, weights = gather.matmuls[0], [matmul.b for matmul in gather.matmuls]
    sent, dtype = full_value.dtype, _dtype(first)
    with graph.inserting_before(gather.full):
        if gather.dtype != sent:
            bytes_ = shard
            shard = graph.call_function(aten.view.dtype, (bytes_, gather.dtype))
            shard.meta["val"] = value_of(bytes_).view(gather.dtype)  # type: ignore[union-attr]
            full_value = full_value.view(gather.dtype)
        options = _options(gather)
        call = graph.call_function(target, (shard, weights, gather.dim, group, gather.others), options)
        products = graph.call_function(operator.getitem, (call, 1))
        columns = [value_of(matmul.node).shape[1] for matmul in gather.matmuls]  # type: ignore[union-attr]
        products.meta["val"] = [full_value.new_empty([*full_value.shape[:-1], n], dtype=dtype) for n in columns]
        call.meta["val"] = (full_value if gather.others else None, products.meta["val"])
        if gather.others:
            kept = graph.call_function(operator.getitem, (call, 0))
            kept.meta["val"] = full_value
            if gather.dtype != sent:
                kept = graph.call_function(aten.view.dtype, (kept, sent))
                kept.meta["val"] = full_value.view(sent)
    for index, matmul in enumerate(gather.matmuls):
        node = matmul.node
        with graph.inserting_before(node):
            product = graph.call_function(operator.getitem, (products, index))
            product.meta["val"] = products.meta["val"][index]
            if full_value.ndim > 2:
                sizes = compat.sizes_in_graph(graph, node.meta["val"].shape)
                product = graph.call_function(aten.reshape.default, (product, sizes))
                product.meta.update(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    if gather.others:
        gather.full.replace_all_uses_with(kept)
    _erase_unread(gather.full)
    rewriting.rewrote(wait.args[0], NAME, "template", target, detail=f"{len(weights)} matmuls")  # type: ignore[arg-type]
    match.erase_nodes()
    stable_topological_sort(graph)  # a weight may be viewed only just before its matmul


def _options(gather: _Gather) -> dict[str, Any]:
    """The keyword arguments of the operator; new nodes go to the graph's insertion point."""
    biases = [matmul.emit_bias() for matmul in gather.matmuls]
    options: dict[str, Any] = {"biases": biases} if any(biases) else {}
    scale_a, _ = gather.matmuls[0].scales
    if scale_a is not None:
        options |= {"scale_a": scale_a, "scale_bs": [matmul.scales[1] for matmul in gather.matmuls]}
        options |= {"out_dtype": _dtype(gather.matmuls[0])}
    return options


def _erase_unread(node: Node) -> None:
    """Removes `node` if nothing reads it any more, after the reshapes of it and before the split and cat that made it."""
    for user in list(node.users):
        if user.target in RESHAPE or _is_float8_view(user):
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
