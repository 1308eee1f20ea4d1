"""Which kernel, tile and grid matmul -> all-reduce takes: where choices.json has nothing else.

Measured on two H200 (docs/performance.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from symmpatterns.triton_kernels._plan import Tile, scaled, tiles_for


class Choice(NamedTuple):
    """per_sm: programs a multiprocessor; stagger: clock cycles between the beginnings of neighbouring programs."""

    tile: Tile
    per_sm: int = 1
    stagger: int = 0


# Up to so many bytes sent by a rank, one exchange that sends more is quicker than two that send less.
ONE_SHOT_BYTES = 4 << 20
# From so many rows, or with so long a loop over K, large tiles win that only TMA can send without a pause.
_TMA_ROWS = 8192
_TMA_K = 8192
# Two programs a multiprocessor: one multiplies while the other sends. They fit on sm_90 and sm_100 with any number of
# registers (128 threads each) and 97 of 228 KiB of shared memory each.
_PAIRED: Tile = (128, 128, 64, 4, 3)
_PAIRED_ROWS = 512
_TMA: Tile = (128, 256, 64, 8, 3)


def variant_for(
    M: int, N: int, K: int, dtype: torch.dtype, partial: torch.dtype, world_size: int, capability: int
) -> str:
    """The variant of matmul_all_reduce for a shape: operands of `dtype`, products sent in `partial`.

    `capability` is the major compute capability of the GPUs.
    """
    if (world_size - 1) * M * N * partial.itemsize <= ONE_SHOT_BYTES:
        return "one_shot"
    has_tma = capability in (9, 10) and torch.float32 not in (dtype, partial)
    large = M >= _TMA_ROWS or (K >= _TMA_K and M >= 4 * _PAIRED_ROWS)
    return "two_shot_tma" if has_tma and world_size == 2 and large else "two_shot"


def choice_for(variant: str, M: int, dtype: torch.dtype, capability: int) -> Choice:
    """The tile and grid for a variant; TypeError for a dtype that the kernels do not take."""
    table = tiles_for(M, dtype, large=variant != "one_shot")
    if variant == "one_shot" or dtype == torch.float32:
        return Choice(table)
    if variant == "two_shot_tma":
        return Choice(scaled(_TMA, dtype), stagger=200 if M < _TMA_ROWS else 0)
    if capability in (9, 10) and M >= _PAIRED_ROWS:
        return Choice(scaled(_PAIRED, dtype), per_sm=2, stagger=90 if M < 2 * _PAIRED_ROWS else 170)
    return Choice(table)
