"""How Inductor compiles the marker ``to_symmetric``; imported by the pass, which alone decides where markers stand.

in place                  the buffer that Inductor was going to allocate for the producer becomes a view of pool memory
under symmetric_memory()  the producer allocates its outputs itself, so it is called inside the scope
copied                    nobody controls the allocation: a pointwise copy into pool memory, which Inductor fuses

In place, the producer's buffer gets a `SymmetricLayout`: to Inductor it is a view of the output of ``symmetric_empty``,
as the inputs of a concatenation are views of its result, and a communication buffer, which is neither the source nor
the target of in-place reuse and is never taken for another temporary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.virtualized import V

from symmpatterns import compat
from symmpatterns.generated_calls import call_directly, call_of, import_with

_operators = torch.ops.symmpatterns
aten = torch.ops.aten
IN_PLACE = "in place"
UNDER_SCOPE = "under symmetric_memory()"
META = "symmpatterns_allocation"

compat.keep_order_of_recomputed_loops()


class SymmetricLayout(ir.NonOwningLayout):
    """Of a buffer that lies in pool memory of a group."""

    def __init__(self, view: ir.ReinterpretView, group_name: str) -> None:
        layout = view.get_layout()
        ir.Layout.__init__(self, layout.device, layout.dtype, layout.size, layout.stride)
        self.view = view
        self.group_name = group_name


class GuardedSymmetricLayout(SymmetricLayout, ir.CommBufferLayout):
    """One that Inductor frees as soon as it can and never reuses: known to torch 2.13 and newer, in Python code."""

    def __init__(self, view: ir.ReinterpretView, group_name: str) -> None:
        super().__init__(view, group_name)
        self.comm_buffer_type = ir.CommBufferType.SYMM_MEM

    def make_indexer(self) -> Any:
        return ir.FixedLayout.make_indexer(self)


def _has_guarded_layouts() -> bool:
    # torch 2.11 computes in place in communication buffers, and the C++ wrapper cannot free them.
    return compat.torch_version() >= (2, 13) and not V.graph.cpp_wrapper


class Marker:
    """What the pass tells the lowering about one marker, and the lowering tells the report.

    copy     None, or why the value has to be copied whoever produces it
    settle   called with what became of the marker
    """

    def __init__(self, copy: str | None, settle: Any) -> None:
        self.copy = copy
        self._settle = settle
        self._settled = False

    def settle(self, detail: str) -> None:
        if not self._settled:  # Inductor may lower a graph twice
            self._settled = True
            self._settle(detail)


@register_lowering(_operators.to_symmetric.default, type_promotion_kind=None)
def _to_symmetric(x: Any, group_name: str, contiguous: bool = False, stride: Any = None) -> Any:
    node = V.graph.current_node
    marker: Marker | None = node.meta.get(META)
    wanted = [_expression(s) for s in node.meta["val"].stride()]
    reason = None if marker is None else marker.copy
    placed = None
    if reason is None:
        placed, reason = _absorb(x, wanted, group_name)
    if placed is None:
        placed = _copy(x, wanted, group_name)
        reason = f"copied: {reason}"
    if marker is not None:
        assert reason is not None
        marker.settle(reason)
    return placed


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _absorb(x: Any, wanted: Sequence[Any], group_name: str) -> tuple[Any, str]:
    """(the value in symmetric memory, how) or (None, why not)."""
    if _is_unrealized(x):
        if isinstance(x.data, ir.BaseView):  # a view of a value that has no buffer yet: compute it as it is wanted
            return _copy(x, wanted, group_name), IN_PLACE
        x.realize()
    view = None
    if not isinstance(x.data, ir.StorageBox):
        try:
            view = ir.ExternKernel.convert_to_reinterpret_view(x.data)
        except NotImplementedError:
            return None, "the view in front of it changes the order of elements"
    buffer = _behind_views(x).data
    if not isinstance(buffer, ir.Buffer):
        return None, f"its input is a {type(buffer).__name__}"
    layout = buffer.get_output_spec()
    if isinstance(layout, SymmetricLayout):
        if layout.group_name != group_name:
            whose = f"of group {layout.group_name!r}" if layout.group_name else "that the program keeps"
            return None, f"it is in symmetric memory {whose} already"
        return (
            (x, IN_PLACE) if _same(x.get_stride(), wanted) else (None, "another collective has it with other strides")
        )
    refusal = _refusal(buffer)
    if refusal is not None:
        return None, refusal
    if view is None and isinstance(layout, ir.FlexibleLayout):
        buffer.freeze_layout_with_exact_strides(wanted)
    elif isinstance(layout, ir.FlexibleLayout):
        buffer.freeze_layout()
    if not _same(x.get_stride() if view is None else view.get_layout().stride, wanted):
        return None, "its producer has other strides"
    if _allocates_itself(buffer):
        return (
            (x, UNDER_SCOPE)
            if _run_under_scope(buffer, group_name)
            else (None, "its producer allocates its outputs itself")
        )
    _place(buffer, group_name)
    return x, IN_PLACE


def _behind_views(x: Any) -> Any:
    """The box of the value that `x` is, or is a view of."""
    data = x.data
    while isinstance(data, (ir.BaseView, ir.TensorBox)):
        data = data.data
    return data


def _is_unrealized(x: Any) -> bool:
    data = _behind_views(x)
    return isinstance(data, ir.StorageBox) and isinstance(data.data, ir.Loops)


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(V.graph.sizevars.statically_known_equals(s, t) for s, t in zip(a, b))


def _refusal(buffer: Any) -> str | None:
    """Why a realised buffer cannot be moved into symmetric memory, whatever its strides."""
    if isinstance(buffer, (ir.InputBuffer, ir.ConstantBuffer)):
        return "graph input"
    if isinstance(buffer, ir.MultiTemplateBuffer):
        return "which template computes it is chosen later"
    if buffer.get_mutation_names():
        return "its producer writes to a buffer in place"
    if buffer.get_inputs_that_alias_output() or isinstance(buffer.get_output_spec(), ir.NonOwningLayout):
        return "its buffer is part of another"
    if type(buffer.get_output_spec()) not in (ir.FixedLayout, ir.FlexibleLayout):
        return f"its buffer has a {type(buffer.get_output_spec()).__name__}"
    return None


def _allocates_itself(buffer: Any) -> bool:
    return isinstance(buffer, (ir.ExternKernelAlloc, ir.MultiOutput)) and not buffer.should_allocate()


def _run_under_scope(buffer: Any, group_name: str) -> bool:
    """Has the call that allocates `buffer` made inside the scope; False where generated code cannot do that.

    `group_name` is the group of the collective that wants the buffer, "" where none does.
    """
    call, output = call_of(buffer)
    if V.graph.cpp_wrapper or compat.is_fx_wrapper(V.graph) or isinstance(call, ir._CollectiveKernel):
        return False
    if not isinstance(call, ir.ExternKernelAlloc) or call.get_inputs_that_alias_output() or call.get_mutation_names():
        return False
    symmetric: dict[tuple[int, ...], str] | None = getattr(call, "_symmpatterns_outputs", None)
    if symmetric is None:
        if not call.python_kernel_name:
            return False
        symmetric = call._symmpatterns_outputs = {}  # type: ignore[attr-defined]
        call._symmpatterns_operator = call.python_kernel_name  # type: ignore[attr-defined]
        compat.meets_peers(call)
        import_with(call, "from symmpatterns.fusion_aware_alloc import under_symmetric_memory")
    symmetric[output] = symmetric.get(output) or group_name
    operator = call._symmpatterns_operator  # type: ignore[attr-defined]
    call.python_kernel_name = f"under_symmetric_memory({operator}, {tuple(symmetric.items())!r})"
    return True


def _place(buffer: Any, group_name: str) -> None:
    """Makes a buffer with a fixed layout a view of pool memory."""
    memory = _symmetric_empty(buffer.get_layout(), group_name)
    guarded = _has_guarded_layouts() and group_name != ""  # that of no group may leave the graph
    kind = GuardedSymmetricLayout if guarded else SymmetricLayout
    buffer.layout = kind(ir.ReinterpretView(data=memory, layout=_fixed(buffer.get_layout())), group_name)
    # To the scheduler a view and its base are one lifetime, but nothing says yet that the base comes first. Of outputs of
    # a call with several it does not even know that they are views; the name of a view keeps the memory all the same.
    several = isinstance(buffer, ir.MultiOutput)
    strong: Any = getattr(V.graph, "additional_star_deps", None)  # torch 2.15 has none
    dependencies = strong if several and strong is not None else V.graph.additional_buffer_deps
    for writer in _writers(buffer):
        dependencies[writer.get_operation_name()].add(memory.get_name())
    unheld = several and strong is None
    if unheld:  # nothing that the scheduler knows of uses the memory
        memory.data.has_side_effects = lambda: True
    if not guarded or unheld:  # never reused and, at that price, not freed before the call ends
        V.graph.never_reuse_buffers.update((buffer.get_name(), memory.get_name()))


def _writers(buffer: Any) -> list[Any]:
    """The operations that write to a buffer: its own and, where it is a concatenation, those of its parts.

    The output of a call with several is written by the call, which is given all of them.
    """
    parts = buffer.inputs if isinstance(buffer, (ir.ConcatKernel, ir.MultiOutput)) else ()
    return [buffer, *(writer for part in parts if isinstance(part, ir.Buffer) for writer in _writers(part))]


def _fixed(layout: Any) -> Any:
    return ir.FixedLayout(layout.device, layout.dtype, list(layout.size), list(layout.stride))


def _symmetric_empty(layout: Any, group_name: str) -> Any:
    """The StorageBox of the memory that ``symmetric_empty`` returns: of the pool, or new memory if there is no group."""
    output: Any = ir.FallbackKernel.create(
        _operators.symmetric_empty.default,
        list(layout.size),
        list(layout.stride),
        layout.dtype,
        layout.device,
        group_name,
    )
    call, _ = call_of(output)
    call_directly(call, "symmpatterns.fusion_aware_alloc", "take" if group_name else "new")
    if group_name:
        compat.meets_peers(call, V.graph.current_node.name)
    output.skip_size_stride_alignment_checks = True
    memory: Any = ir.TensorBox.create(output).data
    if _has_guarded_layouts() and group_name != "":
        memory.data.layout = ir.CommBufferLayout(_fixed(layout), ir.CommBufferType.SYMM_MEM, group_name)
    return memory


def _copy(x: Any, wanted: Sequence[Any], group_name: str) -> Any:
    """`x` computed or copied into pool memory, with the strides `wanted`."""
    size = list(x.get_size())
    for dim, stride in enumerate(wanted):
        if stride == 0 and size[dim] != 1:  # expanded: one copy of what is repeated
            x = lowerings[aten.slice.Tensor](x, dim, 0, 1)
    copy: Any = ir.Pointwise.create(
        device=x.get_device(), dtype=x.get_dtype(), inner_fn=x.make_loader(), ranges=list(x.get_size())
    )
    copy.realize()
    buffer: Any = copy.data.data
    buffer.freeze_layout_with_exact_strides(wanted)
    _place(buffer, group_name)
    return copy if list(copy.get_size()) == size else lowerings[aten.expand.default](copy, size)
