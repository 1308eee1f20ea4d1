"""What one compiled graph keeps in the slots of one group, and where each tensor lies.

A *site* is one place of the graph where the ranks communicate: stores, one barrier, reads. It uses one slot. A *piece*
is one tensor of a site; `size` is the size of the collective's input. Each rank stores through its *targets* and,
after the barrier, reads its *sources*:

kind        region in each rank's slot    targets                              sources
pull        size                          the own region                       every rank's region
push        one `size` for each rank      in every rank's region, my place     the W places of the own region
gather:d    size, W times along d         in every rank's region, my part      the own region
scatter:d   size                          the own region                       in every rank's region, my part along d
shard       W blocks                      the own region's first elements      in every rank's region, my block
from:r      size                          the own region                       rank r's region
exchange:W  the largest rank's size       the own region                       in every rank's region, the rows for me

A shard's blocks are `Piece.block` elements of the flattened tensor, which need not divide: behind its last element the
region holds nothing of meaning.

Counts, sizes and strides are the same on all ranks, addresses are not: so all ranks compile the same code, and a graph
in Inductor's cache serves every rank. The exception is ``exchange:W``, an all-to-all among W ranks with given splits.
Its sizes are those of the input, then how many rows go to each rank, then how many come from each, and ranks differ in
all of them; a rank learns where its rows lie in its peers' memory from what they say of themselves in each call.

A graph of one site may take its slots *in turn*: its plan begins with "in turn: ". Its targets and sources have one more
dimension in front, of size 2, for two slots that are `TURN_BYTES` apart; which of them is meant is in the device's memory
(slots.py says why).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_KINDS = ("pull", "push", "gather", "scatter", "shard", "from", "exchange")
_ALIGNMENT = 256  # bytes; regions start at multiples, because vectorised kernels want aligned tensors
_PLACE_ALIGNMENT = 16  # bytes; places in a pushed region
_IN_TURN = "in turn: "

TURN_BYTES = 1 << 24  # from one to the other of two slots that are taken in turn

Size = Sequence[Any]  # ints, or symbolic sizes while a graph is traced


@dataclass(frozen=True)
class View:
    """Part of rank `peer`'s region: `size`, `stride` and `offset` in elements."""

    peer: int
    size: tuple[Any, ...]
    stride: tuple[Any, ...]
    offset: Any


def in_both_slots(view: View, dtype: torch.dtype) -> View:
    """`view` of the first of two slots that are taken in turn, and the same place in the second, in a new dimension 0."""
    return View(view.peer, (2, *view.size), (TURN_BYTES // dtype.itemsize, *view.stride), view.offset)


def contiguous_strides(size: Size) -> tuple[Any, ...]:
    """Row-major strides, in elements; an empty dimension counts as one."""
    strides: list[Any] = []
    step: Any = 1
    for n in reversed(size):
        strides.append(step)
        step = step * (max(n, 1) if isinstance(n, int) else n)
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Piece:
    """One tensor of a site: `kind` and its `argument` (a dimension, rank or count), dtype and number of dimensions.

    `use` says what becomes of the sources ("sum", "concatenation"); it is there for ranks to compare.
    """

    kind: str
    dtype: torch.dtype
    ndim: int
    argument: int = 0
    use: str = ""

    def __str__(self) -> str:
        kind = self.kind if self.kind in ("pull", "push", "shard") else f"{self.kind}:{self.argument}"
        return f"{kind} {str(self.dtype).removeprefix('torch.')} {self.ndim} {self.use}".rstrip()

    @staticmethod
    def parse(text: str) -> Piece:
        try:
            kind, dtype, ndim, *use = text.split()
            kind, _, argument = kind.partition(":")
            piece = Piece(kind, getattr(torch, dtype), int(ndim), int(argument or 0), *use)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{text!r} is no piece of a plan: {error}") from None
        if kind not in _KINDS:
            raise ValueError(f"{text!r} is no piece of a plan: its kind is one of {', '.join(_KINDS)}")
        if kind in ("gather", "scatter") and not 0 <= piece.argument < piece.ndim:
            raise ValueError(f"{text!r} is no piece of a plan: the tensor has no dimension {piece.argument}")
        return piece

    @property
    def num_sizes(self) -> int:
        """How many numbers its `size` has."""
        return self.ndim + (2 * self.argument if self.kind == "exchange" else 0)

    def splits(self, size: Size) -> tuple[Size, Size]:
        """(rows for each rank, rows from each rank) of an exchange."""
        return size[self.ndim : self.ndim + self.argument], size[self.ndim + self.argument :]

    def num_targets(self, world_size: int) -> int:
        return world_size if self.kind in ("push", "gather") else 1

    def num_sources(self, world_size: int) -> int:
        return world_size if self.kind in ("pull", "push", "scatter", "shard", "exchange") else 1

    def _place(self, size: Size) -> Any:
        """Elements between two places of a pushed region."""
        grain = max(1, _PLACE_ALIGNMENT // self.dtype.itemsize)
        return (math.prod(size) + grain - 1) // grain * grain

    def block(self, size: Size, world_size: int) -> Any:
        """Elements of one of the `world_size` equal blocks that cover a tensor; they begin at multiples of 16 bytes."""
        grain = max(1, _PLACE_ALIGNMENT // self.dtype.itemsize)
        return (math.prod(size) + world_size * grain - 1) // (world_size * grain) * grain

    def region_elements(self, size: Size, world_size: int) -> Any:
        if self.kind == "push":
            return self._place(size) * world_size
        if self.kind == "shard":
            return self.block(size, world_size) * world_size
        if self.kind == "exchange":
            rows = max(size[0], *(sum(splits) for splits in self.splits(size)))
            return math.prod(size[1 : self.ndim], start=rows)
        return math.prod(size) * (world_size if self.kind == "gather" else 1)

    def _part(self, size: Size, whole: Size, rank: int, peer: int) -> View:
        """The `rank`-th of equal parts of `whole` along the piece's dimension; `size` is the size of one part."""
        strides = contiguous_strides(whole)
        return View(peer, tuple(size), strides, rank * size[self.argument] * strides[self.argument])

    def views(
        self, size: Size, rank: int, world_size: int, sizes: Sequence[Size] = ()
    ) -> tuple[list[View], list[View]]:
        """(targets, sources) of `rank`, whose size it is; `sizes` of all ranks, which only an exchange needs.

        Without them its sources are the own region's rows, which have the right size.
        """
        ranks = range(world_size)
        if self.kind == "exchange":
            return self._exchanged(size, rank, sizes)
        strides = contiguous_strides(size)
        d = self.argument
        if self.kind == "push":
            step = self._place(size)
            targets = [View(peer, tuple(size), strides, rank * step) for peer in ranks]
            return targets, [View(rank, tuple(size), strides, source * step) for source in ranks]
        if self.kind == "gather":
            whole = [n * world_size if i == d else n for i, n in enumerate(size)]
            targets = [self._part(size, whole, rank, peer) for peer in ranks]
            return targets, [View(rank, tuple(whole), contiguous_strides(whole), 0)]
        own = [View(rank, tuple(size), strides, 0)]
        if self.kind == "pull":
            return own, [View(peer, tuple(size), strides, 0) for peer in ranks]
        if self.kind == "shard":
            block = self.block(size, world_size)
            return own, [View(peer, (block,), (1,), rank * block) for peer in ranks]
        if self.kind == "scatter":
            part = [n // world_size if i == d else n for i, n in enumerate(size)]
            return own, [self._part(part, size, rank, peer) for peer in ranks]
        if not 0 <= self.argument < world_size:
            raise ValueError(f"{str(self)!r}: the group has no rank {self.argument}")
        return own, [View(self.argument, tuple(size), strides, 0)]

    def _exchanged(self, size: Size, rank: int, sizes: Sequence[Size]) -> tuple[list[View], list[View]]:
        shape = tuple(size[: self.ndim])
        strides = contiguous_strides(shape)
        sources = []
        for peer, rows in enumerate(self.splits(size)[1]):
            before = self.splits(sizes[peer])[0][:rank] if sizes else self.splits(size)[1][:peer]
            home = peer if sizes else rank
            sources.append(View(home, (rows, *shape[1:]), strides, math.prod(shape[1:], start=sum(before))))
        return [View(rank, shape, strides, 0)], sources

    def problem(self, sizes: Sequence[Size]) -> str | None:
        """Why the ranks' sizes do not fit together, or None."""
        if self.kind != "exchange":
            differing = [rank for rank, size in enumerate(sizes) if size != sizes[0]]
            return f"rank {differing[0]} has sizes {sizes[differing[0]]} and rank 0 {sizes[0]}" if differing else None
        splits = [self.splits(size) for size in sizes]
        for rank, size in enumerate(sizes):
            sent = splits[rank][0]
            if min(size) < 0 or sum(sent) != size[0]:
                return f"rank {rank} sends {sent} rows of {size[0]}"
            if size[1 : self.ndim] != sizes[0][1 : self.ndim]:
                return f"rank {rank} has rows of {size[1 : self.ndim]} and rank 0 of {sizes[0][1 : self.ndim]}"
            for peer, expected in enumerate(splits[rank][1]):
                if splits[peer][0][rank] != expected:
                    return (
                        f"rank {rank} expects {expected} rows from rank {peer}, which sends it {splits[peer][0][rank]}"
                    )
        return None


@dataclass(frozen=True)
class Plan:
    """The sites of one graph in one group, in order, each a tuple of pieces; `str` and `parse` are inverse."""

    sites: tuple[tuple[Piece, ...], ...]
    in_turn: bool = False

    def __str__(self) -> str:
        return _IN_TURN * self.in_turn + " | ".join(", ".join(map(str, site)) for site in self.sites)

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> Plan:
        sites = text.removeprefix(_IN_TURN).split(" | ")
        plan = Plan(
            tuple(tuple(Piece.parse(piece) for piece in site.split(", ")) for site in sites), text.startswith(_IN_TURN)
        )
        if plan.in_turn and (len(plan.sites) > 1 or plan.ranks_differ):
            raise ValueError(f"{text!r} is no plan: one site whose sizes are equal on all ranks can be taken in turn")
        return plan

    def views(
        self, piece: Piece, size: Size, rank: int, world_size: int, sizes: Sequence[Size] = ()
    ) -> tuple[list[View], list[View]]:
        """`piece.views`, in both slots where the plan takes them in turn."""
        targets, sources = piece.views(size, rank, world_size, sizes)
        if not self.in_turn:
            return targets, sources
        return [in_both_slots(v, piece.dtype) for v in targets], [in_both_slots(v, piece.dtype) for v in sources]

    @functools.cached_property
    def ranks_differ(self) -> bool:
        """Whether sizes are a rank's own."""
        return any(piece.kind == "exchange" for site in self.sites for piece in site)

    def split_sizes(self, sizes: Size) -> list[list[list[Any]]]:
        """The flat list of sizes, for each site and piece."""
        answer: list[list[list[Any]]] = []
        at = 0
        for site in self.sites:
            answer.append([])
            for piece in site:
                answer[-1].append(list(sizes[at : at + piece.num_sizes]))
                at += piece.num_sizes
        if at != len(sizes):
            raise ValueError(f"peer_buffers: plan {str(self)!r} has {at} sizes in all, and {len(sizes)} were given")
        return answer

    def by_piece(self, sizes: Sequence[Size]) -> list[list[list[list[Any]]]]:
        """All ranks' flat lists of sizes: for each site and piece, the size that each rank has."""
        split = [self.split_sizes(each) for each in sizes]
        return [[[each[i][j] for each in split] for j in range(len(site))] for i, site in enumerate(self.sites)]

    def offsets(self, sizes: Sequence[Size], world_size: int) -> tuple[list[list[int]], int]:
        """(byte offset of each piece's region in its slot, bytes of the largest slot); `sizes` of all ranks, or one
        of them where they do not differ."""
        answer: list[list[int]] = []
        largest = 0
        for site, site_sizes in zip(self.sites, self.by_piece(sizes)):
            at = 0
            answer.append([])
            for piece, its_sizes in zip(site, site_sizes):
                answer[-1].append(at)
                used = max(piece.region_elements(size, world_size) for size in its_sizes) * piece.dtype.itemsize
                at += -(-used // _ALIGNMENT) * _ALIGNMENT
            largest = max(largest, at)
        return answer, largest
