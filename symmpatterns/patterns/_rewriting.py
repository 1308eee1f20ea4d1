"""One run of the pass over one graph: what families may ask, and where they say what they did.

A guard that refuses calls `decline` and returns False; a rewrite calls `rewrote`. At the end each collective of the
graph has one record: the rewrite, with what kept templates from it, or the last reason for leaving it alone, which is
the one that decided, and the earlier ones behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, Node

from symmpatterns import config, cost_model
from symmpatterns.groups import Group, SymmetricMemoryError, get_group, shares_one_host
from symmpatterns.patterns._declared import call_of, source_of
from symmpatterns.patterns._vocabulary import (
    COLLECTIVES,
    is_collective,
    name_of,
    num_bytes,
    sizes,
    through_views,
    value_of,
)
from symmpatterns.report import Record, add


@dataclass(frozen=True)
class _Outcome:
    family: str | None
    strategy: str | None = None
    replacement: str | None = None
    code: str | None = None
    reason: str | None = None
    detail: str | None = None
    producer: str | None = None


@dataclass(frozen=True)
class _Refusal:
    family: str
    code: str
    reason: str

    @property
    def is_of_a_template(self) -> bool:
        return self.family != "allocation" and not self.family.startswith("peer_")


@dataclass
class Rewriting:
    """The graph under rewriting and the outcome of each of its collectives so far.

    kernels  for a collective the kernel that its replacement will take here (operators/_kernels.py), for the report
    """

    graph: Graph
    kernels: dict[Node, str] = field(default_factory=dict)
    _collectives: dict[Node, Record] = field(default_factory=dict)
    _sent: dict[Node, tuple[int, torch.device]] = field(default_factory=dict)
    _outcomes: dict[Node, _Outcome] = field(default_factory=dict)
    _refusals: dict[Node, list[_Refusal]] = field(default_factory=dict)
    _deliveries: dict[Node, Callable[[Record], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.graph.nodes:
            if is_collective(node):
                self._collectives[node] = _describe(node)
                self._sent[node] = _sent(node)

    def decline(self, collective: Node, family: str, code: str, reason: str) -> bool:
        """Notes why `family` leaves `collective` alone. Returns False, for guards."""
        self._refusals.setdefault(collective, []).append(_Refusal(family, code, reason))
        return False

    def rewrote(
        self,
        collective: Node,
        family: str,
        strategy: str,
        replacement: object,
        detail: str | None = None,
        deliver: Callable[[Record], None] | None = None,
        producer: Node | None = None,
    ) -> None:
        """Notes that `family` replaced `collective`, and with it its `producer`; by which kernel, if `kernels` knows it.

        With `deliver` the record goes there instead of into the report: what became of it is known later only.
        """
        name = None if producer is None else name_of(producer.target)
        detail = "; ".join(text for text in (detail, self.kernels.get(collective)) if text) or None
        self._outcomes[collective] = _Outcome(family, strategy, name_of(replacement), detail=detail, producer=name)
        if deliver is not None:
            self._deliveries[collective] = deliver

    def is_rewritten(self, collective: Node) -> bool:
        """Whether some family has taken this collective already."""
        return collective in self._outcomes

    def can_reach_peers(self, collective: Node, family: str, group_name: object) -> Group | None:
        """The collective's group if its ranks can map each other's memory; else declines and returns None."""
        if not isinstance(group_name, str):
            self.decline(collective, family, "group_not_a_name", f"its group is {group_name!r}, not a group's name")
            return None
        try:
            group = get_group(group_name)
        except SymmetricMemoryError as error:
            self.decline(collective, family, "unknown_group", str(error))
            return None
        if group.world_size == 1:
            self.decline(collective, family, "single_rank", "its group has one rank: there is nothing to communicate")
            return None
        one_host = shares_one_host(group)
        if one_host is None:
            self.decline(
                collective,
                family,
                "unknown_topology",
                "nothing says whether the group's ranks share a host: start with torchrun, or set LOCAL_WORLD_SIZE to "
                "the number of ranks of this host",
            )
            return None
        if not one_host:
            self.decline(
                collective, family, "several_hosts", "its group spans several hosts, whose memory cannot be mapped"
            )
            return None
        value = value_of(collective)
        on_cuda = value is not None and value.device.type == "cuda"
        if on_cuda and not _all_peers_accessible():
            self.decline(
                collective, family, "no_peer_access", "the GPUs of this host cannot all access each other's memory"
            )
            return None
        return group

    def launches_early(self) -> bool:
        """Whether a kernel fused with a collective sends so little that it gains when kernels are launched early."""
        fused = [node for node, outcome in self._outcomes.items() if outcome.strategy in ("template", "peer_views")]
        return any(cost_model.launches_early(*self._sent[node]) for node in fused)

    def finish(self) -> None:
        """Emits one record for each collective the graph had."""
        for node, record in self._collectives.items():
            refusals = _distinct(self._refusals.get(node, []))
            outcome = self._outcomes.get(node)
            if outcome is not None:
                outcome = replace(outcome, detail=_with_templates(outcome, refusals))
            elif refusals:
                outcome = _declined(refusals)
            else:
                outcome = _Outcome(None, code="no_pattern", reason=_no_pattern(record))
            outcome = replace(outcome, producer=outcome.producer or record.producer)
            self._deliveries.get(node, add)(replace(record, **outcome.__dict__))


def _distinct(refusals: list[_Refusal]) -> list[_Refusal]:
    """Each reason once: where it was given last, by the family that gave it first, which came nearest."""
    first: dict[str, _Refusal] = {}
    for each in refusals:
        first.setdefault(each.reason, each)
    last = {each.reason: position for position, each in enumerate(refusals)}
    return [first[reason] for reason in sorted(last, key=last.__getitem__)]


def _with_templates(outcome: _Outcome, refusals: list[_Refusal]) -> str | None:
    """The detail of a rewrite, and why it is none by a template, or by another, although there was something for one."""
    details = [outcome.detail] if outcome.detail else []
    for each in refusals:
        if each.is_of_a_template:
            what = each.family if outcome.strategy == "template" else "template"
            details.append(f"no {what}: {each.code}: {each.reason}")
    return "; ".join(details) or None


def _declined(refusals: list[_Refusal]) -> _Outcome:
    """The last family that might have taken it decided; what the ones before it said comes after."""
    *earlier, last = refusals
    before = [f"{each.family}: {each.code}: {each.reason}" for each in reversed(earlier)]
    return _Outcome(last.family, code=last.code, reason="; ".join([last.reason, *before]))


def _no_pattern(record: Record) -> str:
    switches = {"template": config.template, "peer_views": config.peer_views, "allocation": config.allocation}
    off = [f"config.{name}" for name, is_on in switches.items() if not is_on]
    if len(off) == len(switches):
        return f"every way of rewriting is switched off: {', '.join(off)}"
    reason = f"no family rewrites {record.collective} after {record.producer or 'this producer'}"
    return f"{reason}; switched off: {', '.join(off)}" if off else reason


def _inputs_of(node: Node) -> list[Node]:
    """What a collective, or a declared call, communicates."""
    if node.target in COLLECTIVES:
        first = node.args[0]
        inputs = list(first) if isinstance(first, (list, tuple)) else [first]
    else:
        call = call_of(node)
        assert call is not None
        inputs = [source_of(each.node) for each in call.inputs]
    return [each for each in inputs if isinstance(each, Node)]


def _sent(node: Node) -> tuple[int, torch.device]:
    """The bytes that a rank contributes to a collective, and the device they are on."""
    values = [value for value in map(value_of, _inputs_of(node)) if value is not None]
    return sum(map(num_bytes, values)), values[0].device if values else torch.device("meta")


def _describe(node: Node) -> Record:
    op_position: int | None
    inputs = _inputs_of(node)
    if node.target in COLLECTIVES:
        collective, op_position, group_position = COLLECTIVES[node.target]
        group_name = node.args[group_position] if len(node.args) > group_position else None
    else:
        call = call_of(node)
        assert call is not None
        collective, op_position, group_name = call.name, None, call.group_name
    producer = inputs[0] if inputs else None
    value = value_of(producer) if producer is not None else None
    world_size = None
    if isinstance(group_name, str):
        try:
            world_size = get_group(group_name).world_size
        except SymmetricMemoryError:
            world_size = None
    source = through_views(producer) if producer is not None else None
    return Record(
        family=None,
        collective=collective,
        strategy=None,
        op=str(node.args[op_position]) if op_position is not None and len(node.args) > op_position else None,
        shape=sizes(value.shape) if value is not None else (),
        dtype=value.dtype if value is not None else None,
        group_name=group_name if isinstance(group_name, str) else None,
        world_size=world_size,
        producer=_producer_name(source),
    )


def _producer_name(node: Node | None) -> str | None:
    if node is None:
        return None
    return "graph input" if node.op == "placeholder" else name_of(node.target)


def _all_peers_accessible() -> bool:
    count = torch.cuda.device_count()
    pairs = ((i, j) for i in range(count) for j in range(count) if i != j)
    return all(torch.cuda.can_device_access_peer(i, j) for i, j in pairs)
