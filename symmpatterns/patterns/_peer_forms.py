"""The collectives that peer views understand: their arguments, and which pieces and results they become."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from symmpatterns import compat, cost_model
from symmpatterns.patterns._layouts import cut, joined
from symmpatterns.patterns._peer_sites import (
    Compute,
    Contribution,
    Site,
    concatenation,
    reduction,
    the_source,
    two_shot,
)
from symmpatterns.patterns._vocabulary import COLLECTIVES, WAIT, c10d, num_bytes, value_of
from symmpatterns.peer_views import Piece

_FAMILIES = {
    c10d.all_reduce.default: "peer_all_reduce",
    c10d.all_reduce_coalesced.default: "peer_all_reduce",
    c10d.all_gather_into_tensor.default: "peer_all_gather",
    c10d.all_gather_into_tensor_coalesced.default: "peer_all_gather",
    c10d.reduce_scatter_tensor.default: "peer_reduce_scatter",
    c10d.reduce_scatter_tensor_coalesced.default: "peer_reduce_scatter",
    c10d.all_to_all_single.default: "peer_all_to_all",
    c10d.broadcast.default: "peer_broadcast",
}
_NEEDS_DIMENSION = ("peer_all_gather", "peer_reduce_scatter", "peer_all_to_all")


@dataclass
class Form:
    """A collective taken apart.

    sources  the tensors that this rank contributes, `values` their fake tensors
    waits    the node of each result, after its wait; empty when the collective is used otherwise
    dims     along which an all-gather concatenates, or a reduce-scatter cuts, each of them
    splits   of an all-to-all, if they are given: the rows that go to each rank, the rows that come from each
    results  the nodes whose users get the new results: the waits, or what moves a wait's parts to another dimension
    dead     nodes that vanish with it, unless others read them
    """

    family: str
    collective: str
    reduce_op: str | None
    group_name: object
    sources: list[Node]
    values: list[torch.Tensor]
    waits: list[Node]
    dims: list[int] = field(default_factory=list)
    splits: tuple[list[object], list[object]] | None = None
    results: list[Node] = field(default_factory=list)
    dead: list[Node] = field(default_factory=list)


def recognise(start: Node) -> Form | None:
    """`start` taken apart, or None for operators that are not handled."""
    if not isinstance(start.target, torch._ops.OpOverload) or start.target not in _FAMILIES:
        return None
    family = _FAMILIES[start.target]
    collective, op_position, group_position = COLLECTIVES[start.target]
    first = start.args[0]
    is_coalesced = isinstance(first, (list, tuple))
    given = list(first) if isinstance(first, (list, tuple)) else [first]
    sources = [node for node in given if isinstance(node, Node)]
    values = [value for node in sources if (value := value_of(node)) is not None]
    form = Form(
        family,
        collective,
        None if op_position is None else str(start.args[op_position]),
        start.args[group_position],
        sources,
        values,
        _waits_of(start, len(sources)) if is_coalesced else _waits_of_one(start),
    )
    items = [user for user in start.users if user.target is operator.getitem]
    form.dead = [*form.waits, *items, *(user for item in items for user in item.users)]
    form.results = list(form.waits)
    form.dims = [0] * len(sources)
    moved: list[tuple[Node, int, list[Node]]] = []
    if family == "peer_all_gather":
        moved = [joined(wait, _world_size(start, 1)) for wait in form.waits]
        form.results = [result for result, _, _ in moved]
    elif family == "peer_reduce_scatter":
        moved = [cut(source, start, _world_size(start, 2)) for source in sources]
        form.sources = [source for source, _, _ in moved]
        form.values = [value for source in form.sources if (value := value_of(source)) is not None]
    elif family == "peer_all_to_all":
        from_each, to_each = (_sizes(start.args[position]) for position in (1, 2))
        form.splits = (to_each, from_each) if to_each or from_each else None
    for position, (_, dim, between) in enumerate(moved):
        form.dims[position] = dim
        form.dead += between
    return form


def _world_size(start: Node, position: int) -> int:
    """0 when the graph does not say it as a number."""
    world_size = start.args[position]
    return world_size if isinstance(world_size, int) else 0


def _sizes(argument: object) -> list[object]:
    """Sizes of a node's argument as numbers, symbolic ones too."""
    assert isinstance(argument, (list, tuple))
    return [each.meta.get("val") if isinstance(each, Node) else each for each in argument]


def _waits_of_one(start: Node) -> list[Node]:
    users = list(start.users)
    return users if len(users) == 1 and users[0].target in WAIT else []


def _waits_of(start: Node, count: int) -> list[Node]:
    """Each result of a coalesced collective, after its wait; empty when one has none, or is used otherwise."""
    items = _items(start, count)
    users = [list(item.users) for item in items]
    if not items or any(len(each) != 1 for each in users):
        return []
    waits = [each[0] for each in users]
    if all(wait.target in WAIT for wait in waits):
        return waits
    common = waits[0]
    if common.target is not compat.common_wait() or any(wait is not common for wait in waits):
        return []
    return _items(common, count) if list(common.args[0]) == items else []  # type: ignore[arg-type]


def _items(several: Node, count: int) -> list[Node]:
    """The elements of an operator's list, if each is taken once and the list is used for nothing else; else empty."""
    found = {user.args[1]: user for user in several.users if user.target is operator.getitem}
    return [found[i] for i in range(count)] if len(found) == len(several.users) == count else []


def shape_problem(form: Form, world_size: int) -> tuple[str, str] | None:
    """(code, reason) when the sizes do not fit, else None."""
    for value, dim in zip(form.values, form.dims):
        if form.family in _NEEDS_DIMENSION and value.ndim == 0:
            return "scalar", "a tensor without dimensions has nothing to gather along, or to cut"
        if form.family == "peer_reduce_scatter" or (form.family == "peer_all_to_all" and form.splits is None):
            size = value.shape[dim]
            if not _divides(size, world_size):
                return "uneven", f"size {size} is not known to divide by the {world_size} ranks of the group"
    if form.splits is not None:
        return _splits_problem(form.splits, form.values[0], world_size)
    return None


def _splits_problem(
    splits: tuple[list[object], list[object]], value: torch.Tensor, world_size: int
) -> tuple[str, str] | None:
    """A rank sees its own splits only, and all ranks have to decide alike: so it must not matter what they are."""
    if any(len(each) != world_size for each in splits):
        return "uneven", f"its splits {splits} are not one for each of {world_size} ranks"
    if any(free_unbacked_symbols(n) for each in splits for n in each):
        return "unbacked_shape", "its splits are known only after earlier work of the graph has run"
    if value.device.type == "cpu":
        return None
    part = value.shape[0] // world_size
    if all(statically_known_true(n == part) for each in splits for n in each):
        return None
    return "uneven", "its splits are not known to be equal, and where they end is not known without waiting for the GPU"


def _divides(size: int | torch.SymInt, by: int) -> bool:
    return statically_known_true(size % by == 0)


def sites_of(form: Form, start: Node, world_size: int, one_shot: bool) -> list[Site]:
    """What the collective becomes; with `one_shot` each as one site."""
    contributions = []
    detail = None
    for source, value, dim, result in zip(form.sources, form.values, form.dims, form.results):
        piece, compute = _piece_of(form, start, value, dim, world_size)
        detail = str(piece).split()[0]
        sizes: list[object] = list(value.shape)
        if piece.kind == "exchange":
            assert form.splits is not None
            sizes += [*form.splits[0], *form.splits[1]]
        contributions.append(Contribution(source, piece, sizes, result, compute))
    assert isinstance(form.group_name, str)
    device = form.values[0].device
    site = Site(start, form.group_name, device, contributions, form.dead, detail)
    if form.family == "peer_all_reduce" and not one_shot:
        is_known = all(isinstance(n, int) for value in form.values for n in value.shape)
        size = sum(map(num_bytes, form.values)) if is_known else math.inf
        if cost_model.all_reduce_is_two_shot(size, world_size, device):
            assert form.reduce_op is not None
            return two_shot(replace(site, detail="shard"), form.reduce_op, world_size)
    return [site]


def _piece_of(form: Form, start: Node, value: torch.Tensor, dim: int, world_size: int) -> tuple[Piece, Compute]:
    if form.family == "peer_all_reduce":
        pushes = cost_model.all_reduce_pushes(num_bytes(value), world_size, value.device)
        assert form.reduce_op is not None
        kind = "push" if pushes else "pull"
        return Piece(kind, value.dtype, value.ndim, use=form.reduce_op), reduction(form.reduce_op)
    if form.family == "peer_all_gather":
        return Piece("gather", value.dtype, value.ndim, dim), the_source
    if form.family == "peer_reduce_scatter":
        assert form.reduce_op is not None
        return Piece("scatter", value.dtype, value.ndim, dim, form.reduce_op), reduction(form.reduce_op)
    if form.family == "peer_all_to_all":
        if form.splits is not None and value.device.type == "cpu":
            return Piece("exchange", value.dtype, value.ndim, world_size, "concatenation"), concatenation
        return Piece("scatter", value.dtype, value.ndim, 0, "concatenation"), concatenation
    source = start.args[1]
    assert isinstance(source, int)
    return Piece("from", value.dtype, value.ndim, source), the_source
