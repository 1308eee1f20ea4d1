"""Fuse or not: never the slower side.

host  Measured (bench/results): the fused CPU operators beat a GEMM followed by a gloo collective at every size of the
      grid, because gloo needs about a millisecond for the smallest message.
cuda  Until a measured table for the GPU exists, a bound. With F the GPU's matrix rate and B the link's rate, a fused
      kernel can at best hide the shorter of GEMM and transfer behind the longer. A fused GEMM is assumed to run at
      `_GEMM_QUALITY` of the vendor library, so fusing has to promise more than that is worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_GEMM_QUALITY = 0.95
_LAUNCH_US = 8.0  # a collective's kernel and its synchronisation, which fusing saves
_FLOPS = {torch.bfloat16: 700e12, torch.float16: 700e12, torch.float32: 50e12}  # Hopper-class rates, per second
_LINK_BYTES = 340e9  # bytes per second and direction, all SMs storing, NVLink 4
_MEMORY_BYTES = 4.0e12


@dataclass(frozen=True)
class Verdict:
    """`fuse`, and `why` as a sentence."""

    fuse: bool
    why: str


# Bytes each rank sends, as a share of the matrix that is communicated, for W ranks.
_SHARE = {
    "matmul_all_reduce": lambda w: 2 * (w - 1) / w,
    "matmul_reduce_scatter": lambda w: (w - 1) / w,
    "all_gather_matmul": lambda w: (w - 1) / w,
}


def matmul_collective(
    family: str, m: int, n: int, k: int, dtype: torch.dtype, world_size: int, device: torch.device
) -> Verdict:
    """Whether [m, k] @ [k, n] and its collective are worth fusing; sizes as the rank's GEMM has them."""
    if device.type == "cpu":
        return Verdict(True, "measured on CPU: faster than the GEMM and gloo at every size")
    itemsize = torch.empty((), dtype=dtype).element_size()
    gemm_us = 1e6 * max(2 * m * n * k / _FLOPS[dtype], (m * k + k * n + m * n) * itemsize / _MEMORY_BYTES)
    moved = m * k if family == "all_gather_matmul" else m * n
    transfer_us = 1e6 * _SHARE[family](world_size) * moved * itemsize / _LINK_BYTES
    unfused = gemm_us + transfer_us + _LAUNCH_US
    fused = max(gemm_us / _GEMM_QUALITY, transfer_us) + 0.25 * min(gemm_us, transfer_us)
    estimate = f"estimated {fused:.1f} us fused and {unfused:.1f} us apart"
    return Verdict(fused < unfused, f"{estimate} for {m}x{n}x{k} on {world_size} ranks")


# One rank's contribution, in bytes. Up to this size every rank stores its part into every other's memory and reads its
# own; above it every rank stores once and reads the others.
_PUSH_BYTES = {"cpu": 0, "cuda": 16 << 20}


def peer_views(collective: str, num_bytes: int, world_size: int, device: torch.device) -> Verdict:
    """Whether `collective` of `num_bytes` a rank is faster as stores, a barrier and reads of Inductor's own kernels."""
    if device.type == "cpu":
        return Verdict(True, "measured on CPU: faster than gloo at every size")
    # Each reader of a one-shot all-reduce reads W whole tensors where a ring moves 2 (W - 1) / W of one.
    if collective == "all_reduce" and world_size > 2 and num_bytes * (world_size - 2) > 8 << 20:
        return Verdict(False, f"{num_bytes} bytes of each of {world_size} ranks are too much for every rank to read")
    return Verdict(True, "a barrier costs less than a collective's kernel, and its reads and stores are fused")


def all_reduce_pushes(num_bytes: int, world_size: int, device: torch.device) -> bool:
    """Whether an all-reduce stores to every peer and reads its own memory, instead of the other way round."""
    return num_bytes <= _PUSH_BYTES[device.type]
