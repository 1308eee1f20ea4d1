"""What one compiled graph keeps in the slots of one group, and where each tensor lies.

A *site* is one place of the graph where the ranks communicate: stores, one barrier, reads. It uses one slot. A *piece*
is one tensor of a site; `size` is the size of the collective's input, the same on every rank. Each rank stores through
its *targets* and, after the barrier, reads its *sources*:

kind      region in each rank's slot    targets                              sources
pull      size                          the own region                       every rank's region
push      one `size` for each rank      in every rank's region, my place     the W places of the own region
gather:d  size, W times along d         in every rank's region, my part      the own region
scatter:d size                          the own region                       in every rank's region, my part along d
from:r    size                          the own region                       rank r's region

Counts, sizes and strides are the same on all ranks, addresses are not: so all ranks compile the same code, and a graph
in Inductor's cache serves every rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_KINDS = ("pull", "push", "gather", "scatter", "from")
_ALIGNMENT = 256  # bytes; regions start at multiples, because vectorised kernels want aligned tensors
_PLACE_ALIGNMENT = 16  # bytes; places in a pushed region

Size = Sequence[Any]  # ints, or symbolic sizes while a graph is traced


@dataclass(frozen=True)
class View:
    """Part of rank `peer`'s region: `size`, `stride` and `offset` in elements."""

    peer: int
    size: tuple[Any, ...]
    stride: tuple[Any, ...]
    offset: Any


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
    """One tensor of a site: `kind` and its `argument` (a dimension or a rank), dtype and number of dimensions.

    `use` says what becomes of the sources ("sum", "concatenation"); it is there for ranks to compare.
    """

    kind: str
    dtype: torch.dtype
    ndim: int
    argument: int = 0
    use: str = ""

    def __str__(self) -> str:
        kind = self.kind if self.kind in ("pull", "push") else f"{self.kind}:{self.argument}"
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

    def num_targets(self, world_size: int) -> int:
        return world_size if self.kind in ("push", "gather") else 1

    def num_sources(self, world_size: int) -> int:
        return world_size if self.kind in ("pull", "push", "scatter") else 1

    def _place(self, size: Size) -> Any:
        """Elements between two places of a pushed region."""
        grain = max(1, _PLACE_ALIGNMENT // self.dtype.itemsize)
        return (math.prod(size) + grain - 1) // grain * grain

    def region_elements(self, size: Size, world_size: int) -> Any:
        if self.kind == "push":
            return self._place(size) * world_size
        return math.prod(size) * (world_size if self.kind == "gather" else 1)

    def _part(self, size: Size, whole: Size, rank: int, peer: int) -> View:
        """The `rank`-th of equal parts of `whole` along the piece's dimension; `size` is the size of one part."""
        strides = contiguous_strides(whole)
        return View(peer, tuple(size), strides, rank * size[self.argument] * strides[self.argument])

    def views(self, size: Size, rank: int, world_size: int) -> tuple[list[View], list[View]]:
        """(targets, sources) of `rank`."""
        ranks = range(world_size)
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
        if self.kind == "scatter":
            part = [n // world_size if i == d else n for i, n in enumerate(size)]
            return own, [self._part(part, size, rank, peer) for peer in ranks]
        if not 0 <= self.argument < world_size:
            raise ValueError(f"{str(self)!r}: the group has no rank {self.argument}")
        return own, [View(self.argument, tuple(size), strides, 0)]


@dataclass(frozen=True)
class Plan:
    """The sites of one graph in one group, in order, each a tuple of pieces; `str` and `parse` are inverse."""

    sites: tuple[tuple[Piece, ...], ...]

    def __str__(self) -> str:
        return " | ".join(", ".join(map(str, site)) for site in self.sites)

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> Plan:
        return Plan(tuple(tuple(Piece.parse(piece) for piece in site.split(", ")) for site in text.split(" | ")))

    def split_sizes(self, sizes: Size) -> list[list[list[Any]]]:
        """The flat list of sizes, for each site and piece."""
        answer: list[list[list[Any]]] = []
        at = 0
        for site in self.sites:
            answer.append([])
            for piece in site:
                answer[-1].append(list(sizes[at : at + piece.ndim]))
                at += piece.ndim
        if at != len(sizes):
            raise ValueError(f"peer_buffers: plan {str(self)!r} has {at} sizes in all, and {len(sizes)} were given")
        return answer

    def offsets(self, sizes: Size, world_size: int) -> tuple[list[list[int]], int]:
        """(byte offset of each piece's region in its slot, bytes of the largest slot)."""
        answer: list[list[int]] = []
        largest = 0
        for site, site_sizes in zip(self.sites, self.split_sizes(sizes)):
            at = 0
            answer.append([])
            for piece, size in zip(site, site_sizes):
                answer[-1].append(at)
                used = piece.region_elements(size, world_size) * piece.dtype.itemsize
                at += -(-used // _ALIGNMENT) * _ALIGNMENT
            largest = max(largest, at)
        return answer, largest
