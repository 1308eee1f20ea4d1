"""How Inductor compiles the operators of peer views; imported by the pass, which alone puts them into graphs.

peer_buffers  a call that returns the targets; Inductor may not use them as scratch memory
peer_sources  a call behind the barrier that returns the sources; the same holds for them
store_        no kernel of its own: the loop that computes the source stores into the target, or the library's routine
              that computes it (a matmul, a custom operator with an output argument) is given the target as its output
store_parts_  the same for each part of a concatenation
store_in_turn_  the loop that computes the source stores into one of two slots, by an index that it loads
take_in_turn  the loop that reads the result loads from one of two slots in the same way
barrier_      a call that mutates the buffers it names, so their reads and writes stay on their side of it
copy_out      the loop that copies, in whatever reads it
reduce_peers  one loop body that loads every rank's part, combines them in rank order, and goes on with its consumers
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import ir, lowering
from torch._inductor.lowering import pointwise_cat, register_lowering
from torch._inductor.virtualized import V, ops

from symmpatterns import compat
from symmpatterns.generated_calls import call_directly, call_of
from symmpatterns.groups import get_group
from symmpatterns.peer_views.operators import accumulation_dtype
from symmpatterns.peer_views.plan import Plan

_operators = torch.ops.symmpatterns
_RESHAPE = (torch.ops.aten.reshape.default, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_PARTS_OF_A_LOOP = 8  # more are stored one by one, as Inductor concatenates them
_ALIGNMENT = 16  # bytes, what Inductor's kernels assume of a tensor that is not named as unaligned

compat.keep_order_of_recomputed_loops()


@register_lowering(_operators.peer_buffers.default, type_promotion_kind=None)
def _peer_buffers(plan: str, sizes: Sequence[Any], device: torch.device, group_name: str) -> list[Any]:
    given = _expressions(sizes)
    call: Any = ir.FallbackKernel.create(_operators.peer_buffers.default, plan, given, device, group_name)
    _in_python(call[0], "peer_buffers")
    return _peers_memory(call, _shifted(Plan.parse(plan), given, get_group(group_name).world_size)[0])


@register_lowering(_operators.peer_sources.default, type_promotion_kind=None)
def _peer_sources(gates: Sequence[Any], pieces: str, sizes: Sequence[Any], site: int, group_name: str) -> list[Any]:
    given = _expressions(sizes)
    call: Any = ir.FallbackKernel.create(_operators.peer_sources.default, list(gates), pieces, given, site, group_name)
    _in_python(call[0], "peer_sources")
    return _peers_memory(call, _shifted(Plan.parse(pieces), given, get_group(group_name).world_size)[1])


def _in_python(buffer: Any, function: str) -> None:
    """Has the call that returns `buffer` made without the dispatcher."""
    call_directly(call_of(buffer)[0], "symmpatterns.peer_views.direct", function)


def _expressions(sizes: Sequence[Any]) -> list[Any]:
    return [n.node.expr if isinstance(n, torch.SymInt) else n for n in sizes]


def _peers_memory(call: Sequence[Any], may_be_unaligned: Sequence[bool]) -> list[Any]:
    buffers = [ir.TensorBox.create(buffer) for buffer in call]
    for buffer, unaligned in zip(buffers, may_be_unaligned, strict=True):
        compat.mark_as_peers_memory(buffer.get_name())
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
    turns = [False] * plan.in_turn
    return targets + turns, sources + turns


@register_lowering(_operators.store_.default, type_promotion_kind=None)
def _store(target: Any, source: Any) -> None:
    target.realize()
    if not _compute_there(target, source, V.graph.current_node.args[1]):
        ir.MutationLayoutSHOULDREMOVE.realize_into(source, target)


@register_lowering(_operators.store_parts_.default, type_promotion_kind=None)
def _store_parts(target: Any, parts: Sequence[Any], dim: int) -> None:
    target.realize()
    nodes: Any = V.graph.current_node.args[1]
    places = []
    at: Any = 0
    for part in parts:
        end = at + part.get_size()[dim]
        places.append(ir.TensorBox(ir.SliceView.create(target.data, dim, at, end, clamp=False)))
        at = end
    # What is computed in its place first, and in the order of computation: see _is_untouched_since.
    rest = [
        i
        for i in sorted(range(len(parts)), key=lambda i: _position(_buffer_of(parts[i])))
        if nodes.count(nodes[i]) > 1 or not _compute_there(places[i], parts[i], nodes[i])
    ]
    if len(rest) == len(parts) and _is_one_loop(parts):
        ir.MutationLayoutSHOULDREMOVE.realize_into(pointwise_cat(list(parts), dim), target)
        return
    for i in sorted(rest):
        ir.MutationLayoutSHOULDREMOVE.realize_into(parts[i], places[i])


@register_lowering(_operators.store_in_turn_.default, type_promotion_kind=None)
def _store_in_turn(target: Any, turns: Any, source: Any) -> None:
    target.realize()
    turn, value = _turn(turns, 0), lowering.to_dtype(source, target.get_dtype())
    scatter = ir.Scatter(
        device=target.get_device(),
        dtype=target.get_dtype(),
        inner_fn=value.make_loader(),
        ranges=list(target.get_size()[1:]),
        output_indexer=lambda index: [turn(), *index],
    )
    buffer = ir.ComputedBuffer(name=None, layout=ir.MutationLayoutSHOULDREMOVE(target), data=scatter)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)


@register_lowering(_operators.take_in_turn.default, type_promotion_kind=None)
def _take_in_turn(source: Any, turns: Any) -> Any:
    turn, load = _turn(turns, 1), source.make_loader()
    return ir.Pointwise.create(
        device=source.get_device(),
        dtype=source.get_dtype(),
        inner_fn=lambda index: load([turn(), *index]),
        ranges=list(source.get_size()[1:]),
    )


def _turn(turns: Any, which: int) -> Callable[[], Any]:
    """In a loop's body: the index, 0 or 1, that is element `which` of `turns`."""
    load = turns.make_loader()
    return lambda: ops.indirect_indexing(load([which]), 2, check=False, wrap_neg=False)


def _is_one_loop(parts: Sequence[Any]) -> bool:
    """Whether one loop over the concatenation, which tells the parts apart by index, is better than a loop for each."""
    if parts[0].get_device().type == "cpu" or len(parts) > _PARTS_OF_A_LOOP:
        return False  # C++ loops over each part share a kernel, and are vectorised
    buffers = [_buffer_of(part) for part in parts]
    return not any(isinstance(b, ir.ComputedBuffer) and isinstance(b.data, ir.Reduction) for b in buffers)


def _buffer_of(x: Any) -> Any:
    """The buffer, or the loop that has none yet, beneath a tensor and its views."""
    data = x.data
    while isinstance(data, (ir.BaseView, ir.MutableBox)):
        data = data.data
    return data


def _position(buffer: Any) -> int:
    """Of the operation that computes a buffer, among all of the graph; -1 if there is none."""
    return next((i for i, operation in enumerate(V.graph.operations) if operation is buffer), -1)


def _compute_there(target: Any, source: Any, node: Any) -> bool:
    """Has `source` computed in `target`, if a call computes it that takes its output as an argument; whether it has.

    `node` is the graph's node for `source`.
    """
    # Nobody else may read the result: it will be overwritten when the slot is used again.
    while len(node.users) == 1 and node.target in _RESHAPE:
        node = node.args[0]
    call: Any = _buffer_of(source)
    if len(node.users) != 1 or type(call) is not ir.ExternKernelOut or node not in call.origins:
        return False
    if type(call.layout) not in (ir.FixedLayout, ir.FlexibleLayout) or call.output_view is not None:
        return False
    if (call.get_dtype(), call.get_device()) != (target.get_dtype(), target.get_device()):
        return False
    if compat.is_fx_wrapper(V.graph):
        return False
    if not ir.is_storage_and_layout(source) or not ir.is_storage_and_layout(target):
        return False
    # Between them there is at most a reshape, if all three are row-major and without gaps. (This fixes their layouts.)
    storage, place = ir.as_storage_and_layout(target)
    _, view = ir.as_storage_and_layout(source)
    whole: Any = call.layout
    if not (_is_dense(place) and _is_dense(view) and _is_dense(whole)):
        return False
    same = V.graph.sizevars.statically_known_equals
    if not (same(view.offset, 0) and same(whole.offset, 0) and _same(view.size, place.size)):
        return False
    if not same(math.prod(view.size), math.prod(whole.size)) or not _is_untouched_since(call, target):
        return False
    layout = ir.FixedLayout(place.device, place.dtype, list(whole.size), list(whole.stride), place.offset)
    call.output_view = ir.ReinterpretView(data=storage, layout=layout)
    call.layout = ir.MutationLayoutSHOULDREMOVE(call.output_view)
    return True


def _is_untouched_since(call: Any, target: Any) -> bool:
    """Whether nothing behind `call` reads its result, or reads or writes `target`'s memory: a barrier, for instance,
    behind which alone the slot is this rank's to write."""
    memory, position = target.get_name(), _position(call)
    if not 0 <= _position(_buffer_of(target)) < position:
        return False
    for operation in V.graph.operations[position + 1 :]:
        if not isinstance(operation, (ir.ComputedBuffer, ir.InputsKernel)):
            return False
        used = set(operation.get_read_names())  # get_reads fails for reductions (torch 2.11 to 2.15)
        for output in operation.get_outputs():
            used.update(output.get_mutation_names())
        if {memory, call.get_name()} & used:
            return False
    return True


def _is_dense(layout: Any) -> bool:
    return _same(layout.stride, ir.FlexibleLayout.contiguous_strides(layout.size))


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(V.graph.sizevars.statically_known_equals(s, t) for s, t in zip(a, b))


@register_lowering(_operators.barrier_.default, type_promotion_kind=None)
def _barrier(buffers: Sequence[Any], group_name: str) -> None:
    # What reads them now has to be computed now. Creating the call does that too, but puts it behind the call.
    for buffer in buffers:
        V.graph.mark_buffer_mutated(buffer.get_name())
    ir.FallbackKernel.create(_operators.barrier_.default, list(buffers), group_name)
    call: Any = V.graph.operations[-1]
    assert call.op_overload is _operators.barrier_.default
    call_directly(call, "symmpatterns.peer_views.direct", "barrier_")


@register_lowering(_operators.copy_out.default, type_promotion_kind=None)
def _copy_out(source: Any) -> Any:
    return lowering.clone(source)


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
