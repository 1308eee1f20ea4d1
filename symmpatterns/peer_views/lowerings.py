"""How Inductor compiles the operators of peer views; imported by the pass, which alone puts them into graphs.

peer_buffers  a call that returns the targets; Inductor may not use them as scratch memory
peer_sources  a call behind the barrier that returns the sources; the same holds for them
store_        no kernel of its own: the loop that computes the source stores into the target
barrier_      a call that mutates the buffers it names, so their reads and writes stay on their side of it
reduce_peers  one loop body that loads every rank's part, combines them in rank order, and goes on with its consumers
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V, ops

from symmpatterns.groups import get_group
from symmpatterns.peer_views.operators import accumulation_dtype
from symmpatterns.peer_views.plan import Plan

_operators = torch.ops.symmpatterns
_ALIGNMENT = 16  # bytes, what Inductor's kernels assume of a tensor that is not named as unaligned


@register_lowering(_operators.peer_buffers.default, type_promotion_kind=None)
def _peer_buffers(plan: str, sizes: Sequence[Any], device: torch.device, group_name: str) -> list[Any]:
    given = _expressions(sizes)
    call: Any = ir.FallbackKernel.create(_operators.peer_buffers.default, plan, given, device, group_name)
    return _peers_memory(call, _shifted(Plan.parse(plan), given, get_group(group_name).world_size)[0])


@register_lowering(_operators.peer_sources.default, type_promotion_kind=None)
def _peer_sources(gates: Sequence[Any], pieces: str, sizes: Sequence[Any], site: int, group_name: str) -> list[Any]:
    given = _expressions(sizes)
    call: Any = ir.FallbackKernel.create(_operators.peer_sources.default, list(gates), pieces, given, site, group_name)
    return _peers_memory(call, _shifted(Plan.parse(pieces), given, get_group(group_name).world_size)[1])


def _expressions(sizes: Sequence[Any]) -> list[Any]:
    return [n.node.expr if isinstance(n, torch.SymInt) else n for n in sizes]


def _peers_memory(call: Sequence[Any], may_be_unaligned: Sequence[bool]) -> list[Any]:
    buffers = [ir.TensorBox.create(buffer) for buffer in call]
    for buffer, unaligned in zip(buffers, may_be_unaligned, strict=True):
        # Its memory is the peers' too: Inductor may neither take it for a temporary nor compute in it.
        V.graph.never_reuse_buffers.add(buffer.get_name())
        if unaligned:
            V.graph.unaligned_buffers.add(buffer.get_name())
    return buffers


def _shifted(plan: Plan, sizes: Sequence[Any], world_size: int) -> tuple[list[bool], list[bool]]:
    """For each target and each source, whether it may begin at no multiple of 16 bytes on some rank."""
    targets: list[bool] = []
    sources: list[bool] = []
    for site, site_sizes in zip(plan.sites, plan.split_sizes(sizes)):
        for piece, size in zip(site, site_sizes):
            flag = False
            if piece.kind in ("gather", "scatter"):
                part = size[piece.argument] // world_size if piece.kind == "scatter" else size[piece.argument]
                step = math.prod(size[piece.argument + 1 :], start=part * piece.dtype.itemsize)
                flag = not V.graph.sizevars.statically_known_multiple_of(step, _ALIGNMENT)
            elif piece.kind == "exchange":
                row = math.prod(size[1 : piece.ndim], start=piece.dtype.itemsize)
                flag = not V.graph.sizevars.statically_known_multiple_of(row, _ALIGNMENT)
            # A gather's source, and the target of a scatter or an exchange, are whole regions.
            targets += [flag and piece.kind == "gather"] * piece.num_targets(world_size)
            sources += [flag and piece.kind != "gather"] * piece.num_sources(world_size)
    return targets, sources


@register_lowering(_operators.store_.default, type_promotion_kind=None)
def _store(target: Any, source: Any) -> None:
    target.realize()
    ir.MutationLayoutSHOULDREMOVE.realize_into(source, target)


@register_lowering(_operators.barrier_.default, type_promotion_kind=None)
def _barrier(buffers: Sequence[Any], group_name: str) -> None:
    # What reads them now has to be computed now. Creating the call does that too, but puts it behind the call.
    for buffer in buffers:
        V.graph.mark_buffer_mutated(buffer.get_name())
    ir.FallbackKernel.create(_operators.barrier_.default, list(buffers), group_name)


@register_lowering(_operators.reduce_peers.default, type_promotion_kind=None)
def _reduce_peers(parts: Sequence[Any], reduce_op: str) -> Any:
    loaders = [part.make_loader() for part in parts]
    dtype = parts[0].get_dtype()
    accumulator = accumulation_dtype(dtype, reduce_op)
    if dtype is torch.bool:
        combine: Any = ops.logical_or if reduce_op in ("sum", "max") else ops.logical_and
    else:
        combine = {"sum": ops.add, "avg": ops.add, "max": ops.maximum, "min": ops.minimum, "product": ops.mul}[
            reduce_op
        ]

    def load(loader: Any, index: Any) -> Any:
        value = loader(index)
        return value if accumulator == dtype else ops.to_dtype(value, accumulator, src_dtype=dtype)

    def body(index: Any) -> Any:
        result = load(loaders[0], index)
        for loader in loaders[1:]:
            result = combine(result, load(loader, index))
        if reduce_op == "avg":
            result = ops.truediv(result, ops.constant(len(loaders), accumulator))
        return result if accumulator == dtype else ops.to_dtype(result, dtype, src_dtype=accumulator)

    return ir.Pointwise.create(
        device=parts[0].get_device(), dtype=dtype, inner_fn=body, ranges=list(parts[0].get_size())
    )
