"""From sites to graph nodes: peer_buffers at the graph's beginning, then stores, barrier and result at each site.

A two-shot all-reduce is two sites: `two_shot`.

The order that must hold, and who keeps it:

* the stores of a site come before its barrier: it mutates their targets
* the reads of a site come after its barrier: their sources come from a call behind it
* the reads of the site before come before the barrier: it mutates their sources as well
* the stores of the next site come after the barrier: it mutates their targets

So each barrier names buffers of three sites, and Inductor's dependencies do the rest. What they cannot do is read
"the old content" after a mutation: a result that is nothing but a view of a slot, and that somebody reads behind the
next barrier or outside the graph, is copied first.

On CUDA a graph of one site takes its slots in turn, if loops store and read them: the loops then find the slot by an
index in the device's memory, and the graph needs no barrier at its entry (peer_views/slots.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch.fx import Graph, Node

from symmpatterns import compat, cost_model
from symmpatterns.groups import get_group
from symmpatterns.patterns._vocabulary import aten, is_loop, something_mutates, through_views, value_of
from symmpatterns.peer_views import Piece, Plan
from symmpatterns.peer_views.plan import TURN_BYTES, contiguous_strides

_operators = torch.ops.symmpatterns

T = TypeVar("T")
Compute = Callable[[Graph, Sequence[Node]], Node]


@dataclass
class Contribution:
    """One tensor of a site.

    source   the tensor that this rank contributes
    piece    where it lies, and its `sizes`
    result   the node that stands for the result, all of whose users get the new one
    compute  makes the new result from the piece's sources
    """

    source: Node
    piece: Piece
    sizes: Sequence[object]
    result: Node
    compute: Compute


@dataclass
class Site:
    """A collective that becomes stores, a barrier and reads; `start` is its node, `dead` what else goes with it."""

    start: Node
    group_name: str
    device: torch.device
    contributions: list[Contribution]
    dead: list[Node] = field(default_factory=list)
    detail: str | None = None


def two_shot(site: Site, reduce_op: str, world_size: int) -> list[Site]:
    """Instead of an all-reduce's one site, in which every rank reads everybody's tensors: one in which a rank reads and
    reduces its block of them, and one in which it stores that block into everybody's memory."""
    graph, start = site.start.graph, site.start
    ours: list[Contribution] = []
    everyones: list[Contribution] = []
    for contribution in site.contributions:
        value, piece = (
            contribution.source.meta["val"],
            Piece("shard", contribution.piece.dtype, contribution.piece.ndim),
        )
        block = piece.block(list(value.shape), world_size)
        with graph.inserting_before(start), value.fake_mode:
            # Stands for the reduced block until there is one; `start`, which comes to read it, keeps the sites apart.
            reduced = _call(
                graph,
                _operators.reduce_peers.default,
                ([contribution.source], reduce_op),
                torch.empty((block,), dtype=value.dtype, device=value.device),
            )
        shard = replace(piece, use=reduce_op)
        ours.append(Contribution(contribution.source, shard, contribution.sizes, reduced, reduction(reduce_op)))
        gather = Piece("gather", piece.dtype, 1, 0)
        everyones.append(Contribution(reduced, gather, [block], contribution.result, the_front(list(value.shape))))
    blocks = [contribution.result for contribution in ours]
    start.update_arg(0, blocks if isinstance(start.args[0], (list, tuple)) else blocks[0])
    return [
        replace(site, start=blocks[-1], contributions=ours, dead=[]),
        replace(site, contributions=everyones),
    ]


def emit(graph: Graph, sites: Sequence[Site]) -> None:
    """Replaces every site's collective; `sites` in graph order."""
    by_group: dict[tuple[str, torch.device], list[Site]] = {}
    for site in sites:
        by_group.setdefault((site.group_name, site.device), []).append(site)
    replaced: dict[Node, Node] = {}
    positions = {node: index for index, node in enumerate(graph.nodes)}
    merged = {key: _share_barriers(members, positions) for key, members in by_group.items()}
    for (group_name, device), members in merged.items():
        _emit_group(graph, group_name, device, members, replaced)


def _share_barriers(sites: Sequence[Site], positions: dict[Node, int]) -> list[Site]:
    """Sites whose results nobody reads before the next one begins move there, and one barrier serves both."""
    answer = [sites[0]]
    for site in sites[1:]:
        before = answer[-1]
        begin = positions[site.start]
        readers = (positions[user] for c in before.contributions for user in c.result.users)
        if all(reader > begin for reader in readers) and not something_mutates(before.start, site.start):
            dead = [*before.dead, before.start, *site.dead]
            answer[-1] = Site(
                site.start,
                site.group_name,
                site.device,
                [*before.contributions, *site.contributions],
                dead,
                site.detail,
            )
        else:
            answer.append(site)
    return answer


def _emit_group(
    graph: Graph, group_name: str, device: torch.device, sites: Sequence[Site], replaced: dict[Node, Node]
) -> None:
    in_turn = _takes_turns(sites, device, get_group(group_name).world_size)
    targets, turns, sizes = _fetch(graph, group_name, device, sites, in_turn)
    barriers: list[Node] = []
    views: list[tuple[int, Node]] = []
    read_before: list[Node] = []
    for number, site in enumerate(sites):
        results = []
        sources_of = [replaced.get(c.source, c.source) for c in site.contributions]
        parts_of = [_parts_of(source, site) for source in sources_of]
        with graph.inserting_before(site.start):
            for source, parts, mine in zip(sources_of, parts_of, targets[number]):
                for target in mine:
                    if in_turn:
                        _call(graph, _operators.store_in_turn_.default, (target, *turns, source), None)
                    elif parts is None:
                        _call(graph, _operators.store_.default, (target, source), None)
                    else:
                        _call(graph, _operators.store_parts_.default, (target, *parts), None)
            gates = [*_flat(targets[number]), *turns]
            written_next = _flat(targets[number + 1]) if number + 1 < len(sites) else []
            touched = [*gates, *read_before, *written_next]
            # By name: torch looks through what a branch of torch.cond writes to by position, and expects no lists there.
            barrier = graph.call_function(
                _operators.barrier_.default, (), {"buffers": touched, "group_name": group_name}
            )
            barrier.meta["val"] = None
            barriers.append(barrier)
            sources = _sources(graph, group_name, site, number, gates, sizes[number], in_turn)
            read_before = _flat(sources)
            for contribution, theirs in zip(site.contributions, sources):
                result = contribution.compute(graph, theirs)
                results.append(result)
                if not in_turn:
                    views += [(number, each) for each in theirs if each is result or _is_view_of(result, each)]
        for contribution, result in zip(site.contributions, results):
            replaced[contribution.result] = result
            contribution.result.replace_all_uses_with(result)
        concatenations = (source for source, parts in zip(sources_of, parts_of) if parts is not None)
        _erase_unused(graph, {site.start, *site.dead, *(c.result for c in site.contributions), *concatenations})
    positions = {node: index for index, node in enumerate(graph.nodes)}
    for number, result in views:
        limit = positions[barriers[number + 1]] if number + 1 < len(barriers) else len(positions)
        copy = _copy_if_read_late(graph, result, limit, positions)
        if copy is not None:  # which another group's collective may send
            replaced.update({old: copy for old, new in replaced.items() if new is result})


def _parts_of(source: Node, site: Site) -> tuple[list[Node], int] | None:
    """(parts, dimension) if `source` is a concatenation that only the site reads, and its parts can be stored instead.

    Then nobody needs a tensor that holds all of them.
    """
    if source.target is not aten.cat.default or any(user not in (site.start, *site.dead) for user in source.users):
        return None
    dim = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
    parts, whole = source.args[0], source.meta["val"]
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int):
        return None
    nodes = [part for part in parts if isinstance(part, Node)]
    values = [value for node in nodes if (value := value_of(node)) is not None]
    if not len(values) == len(parts) > 1 or any((v.dtype, v.ndim) != (whole.dtype, whole.ndim) for v in values):
        return None  # converted by the concatenation, or empty tensors that it skips
    if something_mutates(source, site.start):
        return None
    return nodes, dim % whole.ndim


def _takes_turns(sites: Sequence[Site], device: torch.device, world_size: int) -> bool:
    """Whether the sites of a graph are one whose stores and reads Inductor generates, on a device that replays graphs.

    A source that a library's routine computes may lie in a slot that the graph knows (`pull`, `scatter`, `from`), and a
    result that is nothing but a slot may be given to one. Both would need a copy, which takes as long as a barrier, and so
    does a concatenation that is not made where its parts can be stored.
    """
    if not cost_model.TAKES_TURNS[device.type] or len(sites) != 1 or _are_too_large(sites[0], world_size):
        return False
    for contribution in sites[0].contributions:
        piece, source = contribution.piece, contribution.source
        if piece.kind == "exchange":  # CPU only
            return False
        if _parts_of(source, sites[0]) is not None:
            return False
        computed = through_views(source)
        if piece.num_targets(world_size) == 1 and not (is_loop(computed) or computed.op == "placeholder"):
            return False
        if contribution.compute is the_source and not _is_copied_or_in_loops(contribution.result):
            return False
    return True


def _are_too_large(site: Site, world_size: int) -> bool:
    """Whether slots that are taken in turn are known to be too small."""
    sizes = [n for contribution in site.contributions for n in contribution.sizes]
    if not all(isinstance(n, int) for n in sizes):
        return False
    return Plan((tuple(c.piece for c in site.contributions),)).offsets([sizes], world_size)[1] > TURN_BYTES


def _is_copied_or_in_loops(result: Node) -> bool:
    """Whether a result that is a slot would be copied, because it leaves the graph, or only loops read it."""
    return all(
        user.op == "output" or is_loop(user) or (_may_be_a_view(user) and _is_copied_or_in_loops(user))
        for user in result.users
    )


def _fetch(
    graph: Graph, group_name: str, device: torch.device, sites: Sequence[Site], in_turn: bool
) -> tuple[list[list[list[Node]]], list[Node], list[list[object]]]:
    """One peer_buffers call at the graph's beginning: targets by site and contribution, whose turn it is where slots are
    taken in turn, and each site's sizes."""
    plan = Plan(tuple(tuple(c.piece for c in site.contributions) for site in sites), in_turn)
    sizes = [n for site in sites for c in site.contributions for n in c.sizes]
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    target = _operators.peer_buffers.default
    fake_mode = sites[0].contributions[0].source.meta["val"].fake_mode
    with graph.inserting_before(first):
        with fake_mode:
            values = target(str(plan), sizes, device, group_name)
        in_graph = compat.sizes_in_graph(graph, sizes)
        items = _items(graph, _call(graph, target, (str(plan), in_graph, device, group_name), values), values)
    turns = [items.pop()] if in_turn else []
    world_size = get_group(group_name).world_size
    targets = [_take(items, [piece.num_targets(world_size) for piece in site]) for site in plan.sites]
    return targets, turns, [_take(in_graph, [sum(piece.num_sizes for piece in site)])[0] for site in plan.sites]


def _sources(
    graph: Graph, group_name: str, site: Site, number: int, gates: list[Node], sizes: list[object], in_turn: bool
) -> list[list[Node]]:
    """The peer_sources call behind a site's barrier, and what takes the slot in turn: sources by contribution."""
    pieces = tuple(contribution.piece for contribution in site.contributions)
    known = [n for c in site.contributions for n in c.sizes]
    target = _operators.peer_sources.default
    text = str(Plan((pieces,), in_turn))
    values = [gate.meta["val"] for gate in gates]
    with values[0].fake_mode:
        values = target(values, text, known, number, group_name)
    items = _items(graph, _call(graph, target, (gates, text, sizes, number, group_name), values), values)
    if in_turn:
        turns = items.pop()
        items = [_take_in_turn(graph, each, turns) for each in items]
    world_size = get_group(group_name).world_size
    return _take(items, [piece.num_sources(world_size) for piece in pieces])


def _take_in_turn(graph: Graph, both: Node, turns: Node) -> Node:
    target = _operators.take_in_turn.default
    with both.meta["val"].fake_mode:
        value = target(both.meta["val"], turns.meta["val"])
    return _call(graph, target, (both, turns), value)


def _items(graph: Graph, call: Node, values: Sequence[object]) -> list[Node]:
    return [_call(graph, operator.getitem, (call, i), value) for i, value in enumerate(values)]


def _take(items: list[T], counts: Sequence[int]) -> list[list[T]]:
    """Takes the first items out of the list, in groups of `counts`."""
    answer = []
    for count in counts:
        answer.append(items[:count])
        del items[:count]
    return answer


def _erase_unused(graph: Graph, nodes: set[Node]) -> None:
    """Erases those of `nodes` that nobody uses, users before what they use."""
    unused = [node for node in nodes if not node.users]
    while unused:
        for node in unused:
            nodes.remove(node)
            graph.erase_node(node)
        unused = [node for node in nodes if not node.users]


def _flat(groups: Sequence[Sequence[Node]]) -> list[Node]:
    return [node for group in groups for node in group]


def _call(graph: Graph, target: Callable[..., object], arguments: tuple[object, ...], value: object) -> Node:
    node = graph.call_function(target, arguments)  # type: ignore[arg-type]
    node.meta["val"] = value
    return node


def reduction(reduce_op: str) -> Compute:
    """The result is the sources, reduced."""

    def compute(graph: Graph, sources: Sequence[Node]) -> Node:
        like = sources[0].meta["val"]
        with like.fake_mode:
            value = like.new_empty(like.shape)
        return _call(graph, _operators.reduce_peers.default, (list(sources), reduce_op), value)

    return compute


def the_source(graph: Graph, sources: Sequence[Node]) -> Node:
    """The result is the one source."""
    (source,) = sources
    return source


def concatenation(graph: Graph, sources: Sequence[Node]) -> Node:
    """The result is the sources one after the other along dimension 0."""
    with sources[0].meta["val"].fake_mode:
        value = torch.cat([source.meta["val"] for source in sources])
    return _call(graph, aten.cat.default, (list(sources),), value)


def the_front(shape: Sequence[object]) -> Compute:
    """The result is the first elements of the one source, as a tensor of `shape`."""

    def compute(graph: Graph, sources: Sequence[Node]) -> Node:
        (source,) = sources
        like = source.meta["val"]
        strides = contiguous_strides(shape)
        with like.fake_mode:
            value = torch.empty_strided(tuple(shape), strides, dtype=like.dtype, device=like.device)  # type: ignore[arg-type]
        numbers = compat.sizes_in_graph(graph, [*shape, *strides])
        return _call(graph, aten.as_strided.default, (source, numbers[: len(strides)], numbers[len(strides) :]), value)

    return compute


def _is_view_of(node: Node, other: Node) -> bool:
    return other in node.all_input_nodes and _may_be_a_view(node)


def _copy_if_read_late(graph: Graph, result: Node, limit: int, positions: dict[Node, int]) -> Node | None:
    """Puts a copy, which it returns, in the place of `result` for all its readers, if that is called for."""
    readers = [user for user in result.users if not _only_orders(user, result)]
    if not _is_read_late(readers, result, limit, positions):
        return None
    with graph.inserting_after(result):
        value = result.meta["val"]
        with value.fake_mode:
            copied = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        copy = _call(graph, _operators.copy_out.default, (result,), copied)
    for user in list(result.users):
        if user is not copy and not _only_orders(user, result):
            user.replace_input_with(result, copy)
    return copy


def _only_orders(user: Node, buffer: Node) -> bool:
    """Whether `user` names the buffer for its place in the order (a barrier) or as the target of a store."""
    if user.target is _operators.barrier_.default:
        return True
    is_store = user.target in (_operators.store_.default, _operators.store_parts_.default)
    return is_store and user.args[0] is buffer


def _is_read_late(users: Sequence[Node], buffer: Node, limit: int, positions: dict[Node, int]) -> bool:
    """Whether a user, or one of a view of it, comes at `limit` or later, leaves the graph, or reads asynchronously; or
    whether Inductor may have it write to the buffer, which is a peer's perhaps, and call that its result."""
    for user in users:
        if user.op != "call_function" or positions[user] >= limit or _is_asynchronous(user):
            return True
        if compat.may_write_in_place(user, buffer):
            return True
        if _may_be_a_view(user) and _is_read_late(list(user.users), user, limit, positions):
            return True
    return False


def _is_asynchronous(node: Node) -> bool:
    """Whether the node reads its inputs at some time until its wait: a collective, or a message to another rank."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "_c10d_functional"


def _may_be_a_view(node: Node) -> bool:
    """Whether the node's result may share memory with its input."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    if target in (aten._unsafe_view.default, torch.ops.prims.convert_element_type.default):
        return True
    return any(result.alias_info is not None for result in target._schema.returns)
