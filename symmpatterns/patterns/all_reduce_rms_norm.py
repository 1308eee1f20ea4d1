"""rms_norm(wait(all_reduce(x)) + residual) * weight  ->  symmpatterns.all_reduce_rms_norm(x, residual, weight, eps)

With or without residual and weight, in fp32 or with casts around it, and the sum may have other readers; _norm.py
recognises it. Peer views fuse the same into two kernels and a barrier; this has no barrier, which is what a decode step of
few rows waits for.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch

from symmpatterns import config, cost_model
from symmpatterns.operators.all_reduce_rms_norm import MAX_COLUMNS, NAME
from symmpatterns.patterns._norm import Norm, norm_behind
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import c10d, hidden_work, hint, value_of


def apply(rewriting: Rewriting) -> None:
    """Rewrites every match in the graph that is worth it."""
    if not config.template:
        return
    for start in [node for node in rewriting.graph.nodes if node.target is c10d.all_reduce.default]:
        if rewriting.is_rewritten(start):
            continue
        found = norm_behind(start)
        if found is not None and worthwhile(rewriting, found):
            _rewrite(rewriting, found)


def worthwhile(rewriting: Rewriting, found: Norm) -> bool:
    """The guard."""
    start = found.start
    decline = partial(rewriting.decline, start, NAME)
    value = value_of(found.wait)
    assert value is not None
    if value.device.type not in ("cpu", "cuda"):
        return decline("device", f"there is no symmetric memory on device {value.device}")
    if start.args[1] not in ("sum", "avg"):
        return decline("reduce_op", f'the kernel sums or averages; this is "{start.args[1]}"')
    columns = value.shape[-1]
    if not isinstance(columns, int) or not 0 < columns <= MAX_COLUMNS:
        return decline(
            "too_wide", f"rows of {columns} elements; the kernel has one of at most {MAX_COLUMNS} in a program"
        )
    hidden = hidden_work(start, found.wait) if config.keep_overlap else None
    if hidden is not None:
        return decline("overlapped", f"its wait comes after {hidden}, which hides it already")
    group = rewriting.can_reach_peers(start, NAME, start.args[2])
    if group is None:
        return False
    rows = 1
    for size in value.shape[:-1]:
        rows *= hint(size)
    verdict = cost_model.all_reduce_rms_norm(rows, columns, value.dtype, group.world_size, value.device)
    if not verdict.fuse and not (config.force and not config.peer_views):
        return decline("cost_model", verdict.why)
    return True


def _rewrite(rewriting: Rewriting, found: Norm) -> None:
    """The replacement: one call, whose results go where the norm and the sum were."""
    graph, value = rewriting.graph, value_of(found.wait)
    assert value is not None
    target = torch.ops.symmpatterns.all_reduce_rms_norm.default
    source, reduce_op, group = found.start.args
    arguments: tuple[Any, ...] = (source, found.residual, found.weight, found.eps, reduce_op, group)
    with graph.inserting_before(found.total):
        call = graph.call_function(target, arguments)
        results = [graph.call_function(operator.getitem, (call, i)) for i in range(2)]
    for result, olds in zip(results, (found.norms, found.sums)):
        with value.fake_mode:  # type: ignore[attr-defined]
            result.meta["val"] = torch.empty_like(value, memory_format=torch.contiguous_format)
        for old in olds:
            old.replace_all_uses_with(result)
    call.meta["val"] = tuple(result.meta["val"] for result in results)
    with_sum = [found.total, found.wait] if found.total is not found.wait else [found.wait]
    for node in [*reversed(found.between), *with_sum, found.start]:
        graph.erase_node(node)
    if not results[1].users:
        graph.erase_node(results[1])
    rewriting.rewrote(found.start, NAME, "template", target, detail="residual" if found.residual else None)
