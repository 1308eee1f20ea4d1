"""Which arguments of which operators must be in symmetric memory: the declarations of pytorch RFC #162859.

``requires_symmetric_memory`` and ``specify_symmetric_memory`` say so for every call of an operator;
``with specify_symmetric_memory(op, "x"):`` says so for the calls inside the block only. Declarations take effect when a
graph is compiled, and are part of the pass's cache key.

Inside a compiled function the block is a TorchFunctionMode, which Dynamo traces: each marked call is recorded with
``symmpatterns.to_symmetric`` around its argument. A note in the nodes' metadata would be lighter, but Inductor's cache
does not look at metadata, and would give a graph with marks and one without the same compiled code.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from symmpatterns import compat
from symmpatterns.allocation import operators  # noqa: F401  registers torch.ops.symmpatterns.to_symmetric

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    Operator = torch._ops.OpOverload | torch._ops.OpOverloadPacket | Callable[..., Any] | str
    Inputs = int | str | Sequence[int | str]

GROUP_ARGUMENTS = ("group_name", "group", "process_group", "pg_name", "pg")


@dataclass(frozen=True)
class Requirement:
    """What one overload needs: the names of its symmetric arguments, and its group.

    The group is the value of `group_argument` at the call, or, where that is None, the group named `group_name`.
    """

    inputs: tuple[str, ...]
    group_argument: str | None
    group_name: str | None


@dataclass(frozen=True)
class Declaration:
    """One call of ``requires_symmetric_memory``; ``remove()`` takes it back.

    op      "ns::name" for all overloads, or "ns::name.overload"
    inputs  positions or names, as they were given
    group   name of the argument that names the group, or the name of a group; None: found in the schema
    where   file and line of the declaration
    """

    op: str
    inputs: tuple[int | str, ...]
    group: str | None
    where: str = field(compare=False)

    def remove(self) -> None:
        """Forgets the declaration; does nothing when it is forgotten already."""
        with _lock:
            if _declarations.get(self.op) is self:
                del _declarations[self.op]
            for number in [n for n, error in _contradictions.items() if error.known is self]:
                del _contradictions[number]
            _resolved.clear()

    def __str__(self) -> str:
        return f"{self.op} {', '.join(map(repr, self.inputs))}" + (f" group={self.group!r}" if self.group else "")


class _Contradiction(ValueError):
    """A declaration that says something else than an earlier one of the same operator."""

    def __init__(self, wanted: Declaration, known: Declaration) -> None:
        super().__init__(
            f"{wanted} contradicts the declaration of {known} at {known.where}: declare all symmetric inputs of an "
            "operator in one call, or take the first declaration back with its remove()"
        )
        self.wanted = wanted
        self.known = known


# torch's own operators that take symmetric memory; torch itself declares them nowhere. They exist for CUDA only, and not
# all of them in every version. Which arguments a kernel maps at the peers is in its source: neither schema nor name say
# so, and an `out` is symmetric only where peers write to it. Not here: operators that bring memory of their own
# (fused_*, _low_contention_*), and the one-sided ones (nvshmem_put, nccl_get, ...), which have no group, and whose target
# at the peer has to be the program's own, because buffers of compiled functions are used again.
_VDEV = ("input", "out", "in_splits", "out_splits_offsets")
_TORCHS = {
    "symm_mem::all_to_all_vdev": _VDEV,
    "symm_mem::all_to_all_vdev_2d": _VDEV,
    "symm_mem::all_to_all_vdev_2d_offset": ("input", "out", "in_splits_offsets", "out_splits_offsets"),
    "symm_mem::get_remote_tensors": ("x",),
    "symm_mem::multi_root_tile_reduce": ("in_tiles", "out_tile"),
    "symm_mem::multimem_all_gather_out": ("out",),
    "symm_mem::multimem_all_reduce_": ("input",),
    "symm_mem::multimem_one_shot_all_reduce": ("input",),
    "symm_mem::multimem_one_shot_all_reduce_out": ("input",),
    "symm_mem::multimem_one_shot_reduce_out": ("input",),
    "symm_mem::nccl_reduce_scatter_offset": ("input",),
    "symm_mem::nvshmem_all_to_all": ("input", "out"),
    "symm_mem::nvshmem_broadcast": ("input",),
    "symm_mem::one_shot_all_reduce": ("input",),
    "symm_mem::one_shot_all_reduce_copy": ("symm_buffer",),
    "symm_mem::one_shot_all_reduce_copy_out": ("symm_buffer",),
    "symm_mem::one_shot_all_reduce_out": ("input",),
    "symm_mem::reduce_scatter_out": ("input",),
    "symm_mem::tile_reduce": ("in_tile", "out_tile"),
    "symm_mem::two_shot_all_reduce_": ("input",),
    "symm_mem::two_shot_all_reduce_out": ("input",),
}

_declarations: dict[str, Declaration] = {}
_resolved: dict[object, Requirement | None] = {}
_lock = threading.Lock()


def requires_symmetric_memory(
    op: Operator, input: Inputs = 0, *, group: str | ProcessGroup | None = None
) -> Declaration:
    """Declares that arguments of `op` must be in symmetric memory, in whatever graph is compiled from now on.

    op     an OpOverload, an OpOverloadPacket, an operator made with torch.library.custom_op, or "ns::name", which may
           be defined later
    input  position or name of the argument, or a sequence of them; tensors and lists of tensors
    group  name of the argument that names the process group, or a process group or its name for an operator that has
           no such argument; by default an argument called group_name, group, process_group, pg_name or pg

    Declaring the same again changes nothing. Raises TypeError for what is no operator or an argument that is no tensor,
    ValueError for an argument that does not exist, an operator without a group, or a declaration that contradicts an
    earlier one, and IndexError for a position that does not exist. For an operator that is not defined yet, these are
    raised when a graph with it is compiled.
    """
    return _declare(_qualified(op), _as_tuple(input), group, _caller())[0]


def _declare(
    name: str, inputs: tuple[int | str, ...], group: str | ProcessGroup | None, where: str
) -> tuple[Declaration, bool]:
    """The declaration and whether it is new."""
    wanted = Declaration(name, inputs, _group_text(group), where)
    overloads = _overloads(name)
    resolved = [_resolve(wanted, overload) for overload in overloads]
    if overloads and not any(resolved):
        raise ValueError(_no_argument(wanted, overloads[0]))
    with _lock:
        for known in list(_declarations.values()):
            if not _overlap(known.op, name):
                continue
            if not _agree(known, wanted):
                raise _Contradiction(wanted, known)
            if known.op in (name, name.split(".")[0]):
                return known, False
        _declarations[name] = wanted
        _resolved.clear()
    return wanted, True


def _overlap(a: str, b: str) -> bool:
    """Whether two names stand for a common overload."""
    base = a.split(".")[0]
    return base == b.split(".")[0] and (a == b or base in (a, b))


def _agree(a: Declaration, b: Declaration) -> bool:
    """Whether two declarations of overlapping names ask for the same."""
    if (a.inputs, a.group) == (b.inputs, b.group):
        return True
    common = _overloads(max(a.op, b.op, key=len))
    return bool(common) and all(_resolve(a, overload) == _resolve(b, overload) for overload in common)


def _agree_on_group(a: Declaration, b: Declaration) -> bool:
    """Whether two declarations of overlapping names ask for the same but for the inputs."""
    pairs = [(_resolve(a, overload), _resolve(b, overload)) for overload in _overloads(max(a.op, b.op, key=len))]
    if not pairs:
        return a.group == b.group
    places = [[(r.group_argument, r.group_name) for r in pair if r is not None] for pair in pairs]
    return all(len(set(pair)) == 1 for pair in places if pair)


class specify_symmetric_memory(TorchFunctionMode):
    """``specify_symmetric_memory(op, "x")`` declares at once; ``with specify_symmetric_memory(op, "x"):`` for a block.

    At once it does what ``requires_symmetric_memory(op, input=("x",))`` does. The block marks the calls of `op` that
    are traced inside it, also in a compiled function with ``fullgraph=True``; calls in eager mode are left alone. What
    is declared of `op` elsewhere holds in the block as well.
    Raises what ``requires_symmetric_memory`` raises. That other inputs were declared before is an error unless a block
    follows, so it is raised when a graph with `op` is compiled.
    """

    def __init__(self, op: Operator, *inputs: int | str, group: str | ProcessGroup | None = None) -> None:
        super().__init__()
        self._number = _begin(op, inputs, group)

    def __enter__(self) -> specify_symmetric_memory:
        _withdraw(self._number)
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs is None:
            kwargs = {}
        if torch.compiler.is_compiling() and isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            places = _places(self._number, func)
            if places != "":
                inputs, position, argument, group = places.split("|")
                if argument in kwargs:
                    group = kwargs[argument]
                elif 0 <= int(position) < len(args):
                    group = args[int(position)]
                positional, kwargs = list(args), dict(kwargs)
                for each in inputs.split(","):
                    index, name = each.split(":")
                    if name in kwargs:
                        kwargs[name] = _mark(kwargs[name], group)
                    elif int(index) < len(positional):
                        positional[int(index)] = _mark(positional[int(index)], group)
                return func(*positional, **kwargs)
        return func(*args, **kwargs)


def _mark(value: Any, group: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_mark(each, group) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    if not isinstance(group, str):
        group = group.group_name
    return torch.ops.symmpatterns.to_symmetric(value, group)


# Dynamo calls the three functions below while it traces, with the real operator, and takes what they return, a number
# or a text, for a constant: declarations do not change while a function is traced.

_blocks: list[Declaration] = []  # by number: what a block says; the same again has the same number
_new: set[int] = set()  # whose declaration did not exist before
_contradictions: dict[int, _Contradiction] = {}  # what a block may say, and nobody else; until the block begins


@torch.compiler.assume_constant_result
def _begin(op: Operator, inputs: tuple[int | str, ...], group: str | ProcessGroup | None) -> int:
    """Declares at once; returns a number for the block that may follow."""
    name = _qualified(op)
    if not inputs:
        raise ValueError(f"specify_symmetric_memory({name}): name the argument that must be in symmetric memory")
    contradiction: _Contradiction | None = None
    try:
        declaration, is_new = _declare(name, _as_tuple(inputs), group, _caller())
    except _Contradiction as error:
        if not _agree_on_group(error.wanted, error.known):
            raise
        contradiction = error
        declaration, is_new = error.wanted, False
    if declaration not in _blocks:
        _blocks.append(declaration)
    number = _blocks.index(declaration)
    (_new.add if is_new else _new.discard)(number)
    if contradiction is not None:
        _contradictions[number] = contradiction
    return number


@torch.compiler.assume_constant_result
def _withdraw(number: int) -> int:
    """Takes back what `_begin` declared, because the declaration is that of a block."""
    _contradictions.pop(number, None)
    if number in _new:
        _new.discard(number)
        with _lock:
            _declarations.pop(_blocks[number].op, None)
            _resolved.clear()
    return number


@torch.compiler.assume_constant_result
def _places(number: int, func: Any) -> str:
    """ "position:name,...|position of the group|its argument|its name" for a call that the block marks, else ""."""
    declaration = _blocks[number]
    overload = func.default if isinstance(func, torch._ops.OpOverloadPacket) and "default" in func.overloads() else func
    if not isinstance(overload, torch._ops.OpOverload) or overload not in _overloads(declaration.op):
        return ""
    requirement = _resolve(declaration, overload)
    if requirement is None:
        return ""
    arguments = overload._schema.arguments
    names = [argument.name for argument in arguments]
    position = names.index(requirement.group_argument) if requirement.group_argument is not None else -1
    group = requirement.group_name if position < 0 else arguments[position].default_value
    inputs = ",".join(f"{names.index(name)}:{name}" for name in requirement.inputs)
    return f"{inputs}|{position}|{requirement.group_argument or ''}|{group or ''}"


def requirement_of(overload: torch._ops.OpOverload) -> Requirement | None:
    """What is declared of `overload`, here or with torch's ``Library.register_symm_mem_args``; None: nothing.

    Raises what ``requires_symmetric_memory`` raises, for an operator that was declared before it was defined.
    """
    for error in list(_contradictions.values()):
        if overload in _overloads(error.wanted.op):
            raise error
    registered = compat.registered_symm_mem_args(overload)
    key = (overload, registered)
    if key in _resolved:
        return _resolved[key]
    name = overload._schema.name
    declaration = _declarations.get(f"{name}.{overload._overloadname}") or _declarations.get(name)
    found = None
    if declaration is not None:
        found = _resolve(declaration, overload)
        if found is None and len(_overloads(declaration.op)) == 1:
            raise ValueError(_no_argument(declaration, overload))
    elif registered:
        # torch leaves operators without a group alone, and so do we.
        names = {argument.name for argument in overload._schema.arguments}
        if "group_name" in names:
            found = Requirement(tuple(n for n in registered if n in names), "group_name", None)
    elif name in _TORCHS:
        found = Requirement(_TORCHS[name], "group_name", None)
    _resolved[key] = found
    return found


def fingerprint() -> str:
    """All declarations as text, torch's own included; equal on ranks that will compile alike."""
    own = [f"{d.op}|{d.inputs}|{d.group}" for d in list(_declarations.values())]
    return ";".join(sorted(own)) + "/" + compat.symm_mem_args_fingerprint()


# --- names and schemas --------------------------------------------------------------------------------------------


def _qualified(op: Any) -> str:
    """ "ns::name" or "ns::name.overload" """
    if isinstance(op, str):
        if op.count("::") != 1 or not all(part.isidentifier() for part in op.replace("::", ".").split(".")):
            raise ValueError(f"{op!r} is not the name of an operator: write 'namespace::name'")
        return op
    if isinstance(op, torch._ops.OpOverload):
        return f"{op._schema.name}.{op._overloadname}"
    if isinstance(op, torch._ops.OpOverloadPacket):
        return op._qualified_op_name
    overload = getattr(op, "_opoverload", None)  # of torch.library.custom_op
    if isinstance(overload, torch._ops.OpOverload):
        return overload._schema.name
    raise TypeError(
        "an operator is an OpOverload, an OpOverloadPacket, the result of torch.library.custom_op, or "
        f"'namespace::name', not {op!r}"
    )


def _overloads(name: str) -> list[torch._ops.OpOverload]:
    """The overloads that `name` stands for; none when it is not defined yet."""
    base, _, overload = name.partition(".")
    namespace, _, op = base.partition("::")
    packet = getattr(getattr(torch.ops, namespace), op, None)
    if packet is None:
        return []
    if overload:
        if overload not in packet.overloads():
            raise ValueError(f"{base} has no overload {overload!r}; it has {', '.join(packet.overloads())}")
        return [getattr(packet, overload)]
    names = sorted(packet.overloads(), key=lambda n: n != "default")
    return [getattr(packet, n) for n in names]


def _as_tuple(inputs: Any) -> tuple[int | str, ...]:
    values: Iterable[Any] = (inputs,) if isinstance(inputs, (int, str, bytes)) else inputs
    try:
        answer = tuple(values)
    except TypeError:
        answer = (inputs,)
    for each in answer:
        if not isinstance(each, (int, str)) or isinstance(each, bool):
            raise TypeError(f"an input is the position or the name of an argument, not {each!r}")
    if not answer:
        raise ValueError("name at least one argument that must be in symmetric memory")
    return answer


def _group_text(group: Any) -> str | None:
    if group is None or isinstance(group, str):
        return group
    name = getattr(group, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(f"group is the name of an argument, a process group or its name, not {type(group).__name__}")
    return name


def _resolve(declaration: Declaration, overload: torch._ops.OpOverload) -> Requirement | None:
    """The declaration in terms of this overload; None when it lacks a named argument, as another overload may."""
    arguments = {argument.name: argument for argument in overload._schema.arguments}
    listed = list(arguments)
    signature = f"{overload._schema.name}({', '.join(listed)})"
    names = []
    for each in declaration.inputs:
        if isinstance(each, int) and not 0 <= each < len(listed):
            raise IndexError(f"input {each} does not exist: {signature} has arguments 0 to {len(listed) - 1}")
        name = listed[each] if isinstance(each, int) else each
        if name not in arguments:
            return None
        if not _holds_tensors(arguments[name].type):
            raise TypeError(f"argument {name!r} of {signature} is a {arguments[name].type}, not a tensor")
        if name not in names:
            names.append(name)
    group = declaration.group
    if group is not None:
        if group not in arguments:
            return Requirement(tuple(names), None, group)
        candidates = [group]
    else:
        candidates = [name for name in GROUP_ARGUMENTS if name in arguments]
    for name in candidates:
        if not _holds_tensors(arguments[name].type) and str(arguments[name].type) not in ("int", "float", "bool"):
            return Requirement(tuple(names), name, None)
    raise ValueError(
        f"{signature} has no argument that names its group (one of {', '.join(GROUP_ARGUMENTS)}): pass group=, the "
        "name of that argument, or the process group itself"
    )


def _no_argument(declaration: Declaration, overload: torch._ops.OpOverload) -> str:
    listed = [argument.name for argument in overload._schema.arguments]
    missing = [repr(each) for each in declaration.inputs if isinstance(each, str) and each not in listed]
    return (
        f"{overload._schema.name} has no argument {', '.join(missing)}; its arguments are {', '.join(listed)} "
        f"(declared at {declaration.where})"
    )


def _holds_tensors(kind: Any) -> bool:
    while isinstance(kind, (torch.OptionalType, torch.ListType)):
        kind = kind.getElementType()
    return isinstance(kind, torch.TensorType)


def _caller() -> str:
    """File and line of the first frame outside of this package and of torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("symmpatterns", "torch"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
