"""Fuse or not: never the slower side.

host  Everything is fused. bench/results has matmul -> all-reduce and two peer-view programs against gloo, ahead at every
      size; the other families are assumed to be like them.
cuda  The measured tables (tables.py) hold fused against best unfused times; bench/measured.py makes the shipped one from
      bench/results. A site takes the verdict of the measured point nearest to it, for the same GPU and world size, for
      launches from Python or, with config.cuda_graphs or where Inductor makes them itself, from CUDA graphs. More than
      two ranks take what was measured on four where their own number was not. Where nothing near was measured, a bound
      decides: with F the GPU's matrix rate and B the link's rate, a fused kernel can at best hide the shorter of GEMM
      and transfer behind the longer, its GEMM runs at `_GEMM_QUALITY` of the vendor library, and a quarter of the
      shorter stays exposed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from symmpatterns import compat, config, early_launch, tables

_TOLERANCE = 1.02  # a fused kernel this much slower counts as equal: runs differ by more
# Launched from Python, a gather's copies take the host up to 100 us longer than what they replace
# (bench/results/host_time-nvidia-h200-w2.csv), which shows in programs that the host bounds: it has to be clearly quicker.
_HOST_TOLERANCE = 0.9
_GEMM_QUALITY = 0.95
_LAUNCH_US = 8.0  # a collective's kernel and its synchronisation, which fusing saves
_FLOPS = {  # Hopper-class rates, per second
    torch.float8_e4m3fn: 1400e12,
    torch.bfloat16: 700e12,
    torch.float16: 700e12,
    torch.float32: 50e12,
}
_LINK_BYTES = 340e9  # bytes per second and direction, all SMs storing, NVLink 4
_MEMORY_BYTES = 4.0e12
# In CUDA graphs, of few rows (bench/results/all_reduce_ways-nvidia-h200.csv): the kernel that scales before the measured
# norm, and Inductor's kernel that adds and normalises. Of many rows they take as long as their 2 and 3 passes over memory.
_SCALE_US, _NORM_US = 1.1, 2.2
_CLEARLY = 0.97  # a sum of parts has to be so much less
# In whole layers of 8B and 70B the collective in the norm took 0.97 to 1.01 times as long, up to 4096 rows, and as long at
# 8192 (bench/results/llama_norm-nvidia-h200-w2.csv).
_NORM_ROWS = 4096
_NORM_NEAR = 1.0  # a product that hides less of its transfer decides otherwise: only much the same size counts
_MEASURED_RANKS = 4  # the only number above two that was measured: larger groups are closer to it than to two


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


def _in_cuda_graphs() -> bool:
    return config.cuda_graphs or compat.inductor_uses_cuda_graphs()


def _nearest(
    family: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    world_size: int,
    device: torch.device,
    launch: str | None = None,
    other_groups: bool = True,
) -> dict[str, Any] | None:
    """The measured point nearest to a site, if any is near; `launch`: default, as the site will be launched.

    With `other_groups` a group of more than two ranks takes that of `_MEASURED_RANKS`, if it has none itself.
    """
    if launch is None:
        launch = "graph" if _in_cuda_graphs() else "eager"
    name = tables.device_name(device)
    for ranks in (world_size, _MEASURED_RANKS) if world_size > 2 and other_groups else (world_size,):
        point = tables.nearest("measured", family, (m, n, k), dtype, device=name, world_size=ranks, launch=launch)
        if point is not None:
            return point
    return None


def matmul_collective(
    family: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    world_size: int,
    device: torch.device,
    sent: torch.dtype | None = None,
) -> Verdict:
    """Whether [m, k] @ [k, n] of `dtype` and its collective are worth fusing; sizes as the rank's GEMM has them.

    `sent` is the dtype of what is communicated (default: `dtype`).
    """
    if device.type == "cpu":
        return Verdict(True, "on CPU every size is fused")
    point = _nearest(family, m, n, k, dtype, world_size, device)
    if point is not None:
        size, fused, other = "x".join(map(str, point["size"])), point["fused_us"], point["best_other_us"]
        where = f"at {size} ({point['launch']} launches)"
        by_copies = family == "all_gather_matmul" and point["launch"] == "eager"
        tolerance = _HOST_TOLERANCE if by_copies else _TOLERANCE
        return Verdict(fused <= tolerance * other, f"measured {where}: {fused:g} us fused, {other:g} us apart")
    sent_size = (sent or dtype).itemsize
    read_and_written = (m * k + k * n) * dtype.itemsize + m * n * sent_size
    gemm_us = 1e6 * max(2 * m * n * k / _FLOPS[dtype], read_and_written / _MEMORY_BYTES)
    moved = m * k if family == "all_gather_matmul" else m * n
    transfer_us = 1e6 * _SHARE[family](world_size) * moved * sent_size / _LINK_BYTES
    unfused = gemm_us + transfer_us + _LAUNCH_US
    fused = max(gemm_us / _GEMM_QUALITY, transfer_us) + 0.25 * min(gemm_us, transfer_us)
    estimate = f"estimated {fused:.1f} us fused and {unfused:.1f} us apart"
    return Verdict(fused < unfused, f"{estimate} for {m}x{n}x{k} on {world_size} ranks")


def norm_is_better(
    m: int, n: int, k: int, dtype: torch.dtype, world_size: int, device: torch.device, sent: torch.dtype
) -> Verdict:
    """Whether a matmul -> all-reduce with an RMSNorm behind it is quicker with the collective fused into the norm.

    The library's product and one kernel that reduces and normalises, against one kernel that multiplies and reduces
    and a norm of Inductor's: two kernels either way. Compared at the nearest size at which the matmul was measured alone
    and fused in CUDA graphs, if it is near, up to `_NORM_ROWS` rows; no elsewhere. (Launched from Python the host decides,
    and rows of different hosts say nothing.)
    """
    if device.type == "cpu" or not _in_cuda_graphs():
        return Verdict(False, "only what CUDA graphs launch is compared")
    if m > _NORM_ROWS:
        return Verdict(False, f"of more than {_NORM_ROWS} rows, no layer was measured so")
    point = _nearest("matmul_all_reduce", m, n, k, dtype, world_size, device, "graph", other_groups=False)
    if point is None or "alone_us" not in point or tables.distance(point, (m, n, k)) > _NORM_NEAR:
        return Verdict(False, "no such product was measured alone and fused")
    rows, columns, _ = point["size"]
    norm_us = _norm_us(rows, columns, sent, world_size, device)
    if norm_us is None:
        return Verdict(False, f"no norm of {rows}x{columns} was measured")
    pass_us = 1e6 * rows * columns * sent.itemsize / _MEMORY_BYTES
    apart = point["alone_us"] + norm_us - max(_SCALE_US, 2 * pass_us)
    together = point["fused_us"] + max(_NORM_US, 3 * pass_us)
    size = "x".join(map(str, point["size"]))
    return Verdict(
        apart < _CLEARLY * together,
        f"its RMSNorm is fused with the collective instead: from what was measured at {size} (graph launches), "
        f"{apart:.1f} us, and {together:.1f} us with the matmul fused",
    )


def _norm_us(rows: int, columns: int, dtype: torch.dtype, world_size: int, device: torch.device) -> float | None:
    """Of scale -> all-reduce -> add -> RMSNorm, the quicker of template and peer views; between two measured numbers of
    rows a straight line. Rows of columns that were not measured count as fewer of the next larger number, with as many
    bytes; fewer rows than were measured count as the fewest that were. None for more."""
    name = tables.device_name(device)
    norms = tables.by_rows(
        "measured", "all_reduce_rms_norm", columns, 1, dtype, name, world_size=world_size, launch="graph"
    )
    points = [(norm["size"][0], min(norm["fused_us"], norm["best_other_us"])) for norm in norms]
    if not points:
        return None
    like = rows * columns / norms[0]["size"][1]
    if like <= points[0][0]:
        return points[0][1]
    for (fewer, less), (more, longer) in zip(points, points[1:]):
        if fewer <= like <= more:
            return less + (longer - less) * (like - fewer) / (more - fewer)
    return None


_NORM_BYTES = 128 << 10  # of one rank's contribution, on CPU


def all_reduce_rms_norm(rows: int, columns: int, dtype: torch.dtype, world_size: int, device: torch.device) -> Verdict:
    """Whether all-reduce -> RMSNorm of [rows, columns] is faster as one operator than as peer views.

    On CPU (two ranks on two cores): 1.2 times as fast at 1 x 4096 in bf16, 1.25 times at 16 x 4096, the same at 64 x 1024
    and at 64 x 4096, slower from 256 x 4096 on.
    """
    if device.type == "cpu":
        size = rows * columns * dtype.itemsize
        return Verdict(
            size <= _NORM_BYTES, f"measured: peer views are as fast above {_NORM_BYTES} bytes; this is {size}"
        )
    # Each rank sends its rows to all others: what was measured on four says nothing of eight.
    point = _nearest("all_reduce_rms_norm", rows, columns, 1, dtype, world_size, device, other_groups=False)
    if point is None:
        return Verdict(
            False, f"nothing near {rows}x{columns} on {world_size} ranks was measured, and peer views are safe"
        )
    fused, other = point["fused_us"], point["best_other_us"]
    return Verdict(fused <= other, f"measured at {point['size'][:2]}: {fused:g} us, {other:g} us otherwise")


# Whether a graph of one site takes its slots in turn, so that it need not pass a barrier at its entry. On CPU no graph
# passes one: the process counts the sites.
TAKES_TURNS = {"cpu": False, "cuda": True}

# One rank's contribution, in bytes. Up to this size every rank stores its part into every other's memory and reads its
# own; above it every rank stores once and reads the others. Two H200: storing takes 0.95 to 0.97 of the time up to 64 MiB.
_PUSH_BYTES = {"cpu": 0, "cuda": 64 << 20}

# A one-shot all-reduce, in which every rank reads everybody's tensor, moves W - 1 tensors to each rank; a two-shot one moves
# 2 (W - 1) / W, with a second barrier. Two-shot is chosen where one-shot reads more than `_ONE_SHOT_BYTES` beyond what two
# ranks would, on four ranks above 512 KiB of each: on four H200 it took 19.6 us at 1 MiB, against 20.5, and 70 at 8 MiB,
# against 96 (NCCL 80). Above `_TWO_SHOT_BYTES` what a saved launch is worth is gone (64 MiB: 422 us, NCCL 408). CPU: never.
# In a trial with three and four ranks on two cores, 3 KiB to 16 MiB, it took 0.76 to 1.5 times as long, with no size from
# which it pays.
_ONE_SHOT_BYTES: dict[str, float] = {"cpu": math.inf, "cuda": 1 << 20}
_TWO_SHOT_BYTES = 32 << 20


def launches_early(num_bytes: int, device: torch.device) -> bool:
    """Whether a graph with a collective of `num_bytes` a rank is to launch its small kernels early.

    Only for CUDA graphs: launched from Python, Inductor's kernels then go through Triton's launcher, which takes the host
    longer than its own.
    """
    return _in_cuda_graphs() and early_launch.pays(num_bytes, device)


_MEASURED_KIB = (128, 65536)
_HOST_BOUND_KIB = 8192


def peer_views(collective: str, num_bytes: int, world_size: int, device: torch.device) -> Verdict:
    """Whether `collective` of `num_bytes` a rank is faster as stores, a barrier and reads of Inductor's own kernels."""
    if device.type == "cpu":
        return Verdict(True, "on CPU every size is fused")
    kib = min(max(num_bytes >> 10, _MEASURED_KIB[0]), _MEASURED_KIB[1])
    # Larger ones keep the GPU busy for longer than the host needs to launch them.
    launch = "graph" if kib > _HOST_BOUND_KIB else None
    point = _nearest(f"peer_views_{collective}", kib, 1, 1, torch.bfloat16, world_size, device, launch)
    if point is not None:
        fused, other = point["fused_us"], point["best_other_us"]
        where = f"at {point['size'][0]} KiB ({point['launch']} launches)"
        return Verdict(fused <= _TOLERANCE * other, f"measured {where}: {fused:g} us fused, {other:g} us apart")
    if collective == "all_reduce" and all_reduce_is_two_shot(num_bytes, world_size, device):
        if num_bytes > _TWO_SHOT_BYTES:
            return Verdict(False, f"{num_bytes} bytes of each of {world_size} ranks outweigh what fusing could save")
        return Verdict(True, "each rank reduces one block and sends it to the others, without a collective's kernel")
    return Verdict(True, "a barrier costs less than a collective's kernel, and its reads and stores are fused")


def all_reduce_pushes(num_bytes: int, world_size: int, device: torch.device) -> bool:
    """Whether an all-reduce stores to every peer and reads its own memory, instead of the other way round."""
    return num_bytes <= _PUSH_BYTES[device.type]


def all_reduce_is_two_shot(num_bytes: float, world_size: int, device: torch.device) -> bool:
    """Whether each rank reduces a block and sends it to the others, instead of reading everybody's whole tensor.

    `num_bytes` is infinite for a size that the graph does not know: one-shot would be far slower where it is large, and
    two-shot is only a barrier slower where it is small.
    """
    beyond_two = num_bytes * (world_size - 2) if world_size > 2 else 0
    return beyond_two > _ONE_SHOT_BYTES[device.type]
