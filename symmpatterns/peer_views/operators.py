"""torch.ops.symmpatterns.peer_buffers and its companions: what the peer-view rewrites are made of.

::

    targets = peer_buffers(plan, sizes, device, group)             # once a graph and group
    store_(target, x)                                              # for each target of a site
    store_parts_(target, [x, y], dim)                              # or this, where their concatenation is sent
    barrier_(buffers, group)                                       # once a site
    sources = peer_sources(targets, pieces, sizes, site, group)
    y = reduce_peers(sources, "sum")                               # or the source itself, for a gather

With a plan that takes its slots in turn, peer_buffers and peer_sources return one tensor more, `turns`: which of the two
slots is stored into now, and which is read. The barrier, which gets it among its buffers, exchanges the two.
::

    *targets, turns = peer_buffers(plan, sizes, device, group)
    store_in_turn_(target, turns, x)
    barrier_([*targets, turns], group)
    *sources, turns = peer_sources([*targets, turns], pieces, sizes, 0, group)
    y = reduce_peers([take_in_turn(source, turns) for source in sources], "sum")

All run in eager mode too, which the tests use; made for graphs, they trust their arguments more than public
functions do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from symmpatterns.groups import get_group
from symmpatterns.peer_views.plan import Plan, View
from symmpatterns.peer_views.slots import get_slots

REDUCE_OPS = ("sum", "avg", "max", "min", "product")

_library = torch.library.Library("symmpatterns", "FRAGMENT")
_library.define("peer_buffers(str plan, SymInt[] sizes, Device device, str group_name) -> Tensor[]")
_library.define("store_(Tensor(a!) target, Tensor source) -> ()")
_library.define("store_parts_(Tensor(a!) target, Tensor[] parts, int dim) -> ()")
_library.define("store_in_turn_(Tensor(a!) target, Tensor turns, Tensor source) -> ()")
_library.define("take_in_turn(Tensor source, Tensor turns) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# Names every buffer whose accesses it separates: Inductor keeps reads and writes of a mutated buffer on their side.
_library.define("barrier_(Tensor(a!)[] buffers, str group_name) -> ()")
# Its results exist only after the barrier that wrote to `gates`, so nothing can read them before. (Reads of a buffer
# that the barrier mutates would do, but for Inductor's C++ backend, which forgets the mutation when it fuses loops of
# different shape: SchedulerNode.recompute_size_and_body in torch 2.13.)
_library.define(
    "peer_sources(Tensor[] gates, str pieces, SymInt[] sizes, int site, str group_name) -> Tensor[]",
)
# Not aten.clone: passes behind ours (vLLM has one) take clones out that nobody writes to, and the slot would be read late.
_library.define("copy_out(Tensor source) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.pointwise))
_library.define("reduce_peers(Tensor[] parts, str reduce_op) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def peer_buffers(plan: str, sizes: Sequence[int], device: torch.device, group_name: str) -> list[Tensor]:
    """For each site and piece of `plan` (see plan.py) the targets, for one call, and `turns` if it says so; collective.

    Memory is agreed on and grown here, at run time. Raises ValueError for a plan that does not fit `sizes`,
    SymmetricMemoryError when memory cannot be shared, DivergenceError when ranks ask for different plans.
    """
    return list(get_slots(group_name, device).fetch(plan, sizes))


def store_(target: Tensor, source: Tensor) -> None:
    """Writes `source` into `target`, which may be a peer's memory."""
    target.copy_(source)


def store_parts_(target: Tensor, parts: Sequence[Tensor], dim: int) -> None:
    """Writes the concatenation of `parts`, which have `target`'s dtype, along `dim` into `target`."""
    if not -target.ndim <= dim < target.ndim:
        raise IndexError(f"store_parts_: dim is {dim}; the target has {target.ndim} dimensions")
    if sum(part.shape[dim] for part in parts) != target.shape[dim]:
        raise ValueError(f"store_parts_: the parts do not fill dimension {dim} of {list(target.shape)}")
    at = 0
    for part in parts:
        target.narrow(dim, at, part.shape[dim]).copy_(part)
        at += part.shape[dim]


def store_in_turn_(target: Tensor, turns: Tensor, source: Tensor) -> None:
    """Writes `source` into the one of the two slots in `target` [2, ...] whose turn it is; `turns` int64 [2]."""
    _check_turns("store_in_turn_", target, turns)
    target.index_copy_(0, turns[:1], source.to(target.dtype).expand(target.shape[1:]).unsqueeze(0))


def take_in_turn(source: Tensor, turns: Tensor) -> Tensor:
    """What lies in the one of the two slots in `source` [2, ...] that is to be read now; `turns` int64 [2]."""
    _check_turns("take_in_turn", source, turns)
    return source.index_select(0, turns[1:]).squeeze(0)


def _check_turns(what: str, both: Tensor, turns: Tensor) -> None:
    if both.ndim == 0 or both.shape[0] != 2:
        raise ValueError(f"{what}: takes two slots in dimension 0, not {list(both.shape)}")
    if turns.dtype != torch.int64 or turns.shape != (2,):
        raise ValueError(f"{what}: turns are int64 [2], not {turns.dtype} {list(turns.shape)}")


def barrier_(buffers: Sequence[Tensor], group_name: str) -> None:
    """Waits for every rank of the group; what they stored before can be read after."""
    get_slots(group_name, _device_of("barrier_", buffers)).barrier()


def peer_sources(
    gates: Sequence[Tensor], pieces: str, sizes: Sequence[int], site: int, group_name: str
) -> list[Tensor]:
    """The sources of site number `site` of the graph whose peer_buffers ran last; to be read after its barrier."""
    return list(get_slots(group_name, _device_of("peer_sources", gates)).sources(pieces, sizes, site))


def _device_of(what: str, tensors: Sequence[Tensor]) -> torch.device:
    if not tensors:
        raise ValueError(f"{what}: takes at least one tensor")
    return tensors[0].device


def accumulation_dtype(dtype: torch.dtype, reduce_op: str) -> torch.dtype:
    """In what the ranks' parts are combined: fp32 for floating point up to fp32, else their own dtype."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize <= 4 else dtype


def reduce_peers(parts: Sequence[Tensor], reduce_op: str) -> Tensor:
    """The `parts` combined in their order with "sum", "avg", "max", "min" or "product", and rounded once; contiguous."""
    _device_of("reduce_peers", parts)
    check_reduction(parts[0].dtype, reduce_op)
    dtype = parts[0].dtype
    if dtype is torch.bool:
        combine: Any = torch.logical_or if reduce_op in ("sum", "max") else torch.logical_and
    else:
        named = {"sum": torch.add, "avg": torch.add, "max": torch.maximum, "min": torch.minimum, "product": torch.mul}
        combine = named[reduce_op]
    result = parts[0].to(accumulation_dtype(dtype, reduce_op), copy=True)
    for part in parts[1:]:
        result = combine(result, part.to(result.dtype))
    if reduce_op == "avg":
        result = result / len(parts)
    return result.to(dtype).contiguous()


def copy_out(source: Tensor) -> Tensor:
    """A copy of `source`, which lies in a slot or a pool, that may be kept."""
    return source.clone()


def check_reduction(dtype: torch.dtype, reduce_op: str) -> None:
    """Raises ValueError or TypeError for a reduction that the ranks' parts cannot be combined with."""
    if reduce_op not in REDUCE_OPS:
        raise ValueError(f"reduce_peers: reduce_op is one of {', '.join(REDUCE_OPS)}, not {reduce_op!r}")
    if dtype.is_complex or (reduce_op == "avg" and not dtype.is_floating_point):
        raise TypeError(f'reduce_peers: "{reduce_op}" is not defined here for {dtype}')


@torch.library.register_fake("symmpatterns::peer_buffers", lib=_library)
def _(plan: str, sizes: Sequence[Any], device: torch.device, group_name: str) -> list[Tensor]:
    group = get_group(group_name)
    parsed = Plan.parse(plan)
    answer = []
    for site, site_sizes in zip(parsed.sites, parsed.split_sizes(sizes)):
        for piece, size in zip(site, site_sizes):
            targets, _ = parsed.views(piece, size, group.rank, group.world_size)
            answer += [_fake_view(view, piece.dtype, device) for view in targets]
    return answer + _fake_turns(parsed, device)


@torch.library.register_fake("symmpatterns::peer_sources", lib=_library)
def _(gates: Sequence[Tensor], pieces: str, sizes: Sequence[Any], site: int, group_name: str) -> list[Tensor]:
    group = get_group(group_name)
    parsed = Plan.parse(pieces)
    answer = []
    for piece, size in zip(parsed.sites[0], parsed.split_sizes(sizes)[0]):
        _, sources = parsed.views(piece, size, group.rank, group.world_size)
        answer += [_fake_view(view, piece.dtype, gates[0].device) for view in sources]
    return answer + _fake_turns(parsed, gates[0].device)


def _fake_turns(plan: Plan, device: torch.device) -> list[Tensor]:
    return [torch.empty(2, dtype=torch.int64, device=device)] if plan.in_turn else []


def _fake_view(view: View, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(view.size, view.stride, dtype=dtype, device=device)


@torch.library.register_fake("symmpatterns::store_", lib=_library)
def _(target: Tensor, source: Tensor) -> None:
    return None


@torch.library.register_fake("symmpatterns::store_parts_", lib=_library)
def _(target: Tensor, parts: Sequence[Tensor], dim: int) -> None:
    return None


@torch.library.register_fake("symmpatterns::store_in_turn_", lib=_library)
def _(target: Tensor, turns: Tensor, source: Tensor) -> None:
    return None


@torch.library.register_fake("symmpatterns::take_in_turn", lib=_library)
def _(source: Tensor, turns: Tensor) -> Tensor:
    return source.new_empty(source.shape[1:])


@torch.library.register_fake("symmpatterns::barrier_", lib=_library)
def _(buffers: Sequence[Tensor], group_name: str) -> None:
    return None


@torch.library.register_fake("symmpatterns::reduce_peers", lib=_library)
def _(parts: Sequence[Tensor], reduce_op: str) -> Tensor:
    check_reduction(parts[0].dtype, reduce_op)
    return parts[0].new_empty(parts[0].shape)


@torch.library.register_fake("symmpatterns::copy_out", lib=_library)
def _(source: Tensor) -> Tensor:
    return source.clone()


_library.impl("peer_buffers", peer_buffers, "CompositeExplicitAutograd")
_library.impl("peer_sources", peer_sources, "CompositeExplicitAutograd")
_library.impl("store_", store_, "CompositeExplicitAutograd")
_library.impl("store_parts_", store_parts_, "CompositeExplicitAutograd")
_library.impl("store_in_turn_", store_in_turn_, "CompositeExplicitAutograd")
_library.impl("take_in_turn", take_in_turn, "CompositeExplicitAutograd")
_library.impl("barrier_", barrier_, "CompositeExplicitAutograd")
_library.impl("reduce_peers", reduce_peers, "CompositeExplicitAutograd")
_library.impl("copy_out", copy_out, "CompositeExplicitAutograd")
