"""The host side of the GEMM kernels: what a plan is and how it is made, the checks of operands, and running a plan.

A plan is equal on all ranks of the group: it is a function of shapes, dtypes, world size and kind of GPU alone.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from symmpatterns.triton_kernels._launch import Launcher, repeat
from symmpatterns.triton_kernels._sync import INTERPRETED
from symmpatterns.triton_kernels._workspace import WorkspaceLike, errors_named, launch_arguments

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
FLOAT8 = torch.float8_e4m3fn
DTYPES = (*TRITON_DTYPES, FLOAT8)  # of operands
Scales = tuple[
    "torch.Tensor | None", "torch.Tensor | None"
]  # of float8 operands: fp32, [1] or one a row of a, column of b

FLAG_CAPACITY = 65536  # flags in each half of a workspace
STAGING_LIMIT = 512 << 20  # bytes of one half beyond which a large M is computed in several calls

Tile = tuple[int, int, int, int, int]  # BM, BN, BK, num_warps, num_stages
GROUP_M = 8

# By the largest number of rows they are for. bf16 and fp16: the best of a sweep on H200 at N = 8192, a program a tile
# up to 256 rows and persistent beyond. fp32 multiplies without tensor cores (IEEE): large tiles would cost registers.
SMALL_TILES: dict[int, Tile] = {
    16: (16, 64, 256, 4, 4),
    32: (32, 64, 128, 4, 4),
    64: (64, 128, 128, 4, 4),
    128: (128, 64, 128, 4, 4),
    256: (64, 256, 64, 8, 4),
}
LARGE_TILES: dict[int, Tile] = {512: (128, 128, 64, 4, 4), 1024: (128, 256, 64, 8, 4)}
FLOAT32_TILES: dict[int, Tile] = {16: (16, 64, 32, 4, 3), 64: (64, 64, 32, 4, 3)}


def scaled(tile: Tile, dtype: torch.dtype) -> Tile:
    """A tile for 16-bit operands as one for float8: as many bytes a step, so twice the elements along K."""
    BM, BN, BK, num_warps, num_stages = tile
    return (BM, BN, BK * 2, num_warps, num_stages) if dtype == FLOAT8 else tile


def tiles_for(rows: int, dtype: torch.dtype, *, large: bool) -> Tile:
    """The tile for a matrix of so many rows: the first entry that is enough, else the last; TypeError for the dtype."""
    if dtype not in DTYPES:
        raise TypeError(f"the Triton kernels take bfloat16, float16, float32 and float8_e4m3fn, not {dtype}")
    table = FLOAT32_TILES if dtype == torch.float32 else LARGE_TILES if large else SMALL_TILES
    return scaled(next((tile for limit, tile in table.items() if rows <= limit), list(table.values())[-1]), dtype)


def sent_dtypes(
    dtype: torch.dtype, partial: torch.dtype | None, out_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of products as they are sent, dtype of the result) for operands of `dtype`."""
    partial = partial or (torch.bfloat16 if dtype == FLOAT8 else dtype)
    return partial, out_dtype or partial


def spread(scales: Scales, rows: int, columns: int) -> Scales:
    """The scales with one element for each row of a and column of b, of stride 0 where one serves all."""
    scale_a, scale_b = scales
    if scale_a is None or scale_b is None:
        return None, None
    return scale_a.expand(rows), scale_b.expand(columns)


def strides_of(*vectors: torch.Tensor | None) -> tuple[int, ...]:
    return tuple(0 if vector is None else vector.stride(0) for vector in vectors)


def fitting_rows(M: int, BM: int, needs: Callable[[int], tuple[int, int]]) -> int:
    """How many of M rows one call may compute so that `needs(rows)` -> (staging bytes, flags) stays within the limits.

    Whole tiles; raises ValueError if not even one row of tiles fits.
    """
    rows = max(M, 1)
    while True:
        staging_bytes, flags = needs(rows)
        if staging_bytes <= STAGING_LIMIT and flags <= FLAG_CAPACITY:
            return rows
        if rows <= BM:
            raise ValueError(
                f"{BM} rows need {staging_bytes} bytes of staging and {flags} flags, more than {STAGING_LIMIT} and "
                f"{FLAG_CAPACITY}: the matrix is too wide for these tiles"
            )
        rows = triton.cdiv(triton.cdiv(rows, 2), BM) * BM


class Sizes(TypedDict):
    """The fields that every family's plan has, as `sizes` makes them."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    programs: int
    rows: int
    staging_bytes: int
    flags: int
    use_tma: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one shape is computed; must be equal on all ranks of the group.

    BM, BN, BK     tile of the output and step along K, in elements
    programs       size of the grid, at most what is resident at once; 0: a program a tile
    rows           a launch computes so many rows at a time, each time as one call of the protocol
    staging_bytes  of one half of the workspace; flags: of one half. Reserve both before the launch.
    use_tma        read operands by TMA where their strides allow it
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    programs: int
    rows: int
    staging_bytes: int
    flags: int
    use_tma: bool

    def constants(self, world_size: int, a_desc: str, b_desc: str) -> dict[str, Any]:
        """The compile-time arguments that all kernels have."""
        return {
            "WORLD_SIZE": world_size, "BM": self.BM, "BN": self.BN, "BK": self.BK, "GROUP_M": GROUP_M,
            "A_DESC": a_desc, "B_DESC": b_desc, "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


def sizes(
    M: int,
    table: Tile,
    needs: Callable[[int, int, int], tuple[int, int]],
    *,
    programs: int,
    tile: tuple[int, int, int] | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    rows: int | None = None,
    use_tma: bool = True,
) -> Sizes:
    """The common fields of a plan for M rows, from the table's tile and what overrides it.

    ``needs(rows, BM, BN)`` -> (staging bytes, flags) of a call that computes so many rows. Raises ValueError if not even
    one row of tiles fits into a workspace.
    """
    BM, BN, BK = table[:3] if tile is None else tile
    rows = fitting_rows(M, BM, lambda rows: needs(rows, BM, BN)) if rows is None else min(rows, max(M, 1))
    staging_bytes, flags = needs(min(rows, M), BM, BN)
    return {
        "BM": BM,
        "BN": BN,
        "BK": BK,
        "num_warps": num_warps or table[3],
        "num_stages": num_stages or table[4],
        # The interpreter runs a rank's programs one after the other: a resident grid is one program there.
        "programs": min(programs, 1) if INTERPRETED else programs,
        "rows": rows,
        "staging_bytes": staging_bytes,
        "flags": flags,
        "use_tma": use_tma,
    }


def check_call(plan: Plan, op: str = "sum") -> None:
    """Raises ValueError for a reduction the kernels do not know, or a plan that cannot run here."""
    if op not in ("sum", "avg"):
        raise ValueError(f"op must be 'sum' or 'avg', not {op!r}")
    if INTERPRETED and plan.programs > 1:
        raise ValueError(f"in the interpreter a resident plan runs one program, not {plan.programs}: it would deadlock")


def describe(matrix: torch.Tensor, block: tuple[int, int], *, allowed: bool = True) -> tuple[object, str]:
    """(kernel argument, "rows" | "columns" | ""): a TMA descriptor of a 2-D matrix where TMA can read it.

    TMA wants one dimension contiguous, the other stride and the address in multiples of 16 bytes, and no empty
    dimension. Ranks may differ in this: it does not touch the protocol.
    """
    rows, columns = matrix.shape[-2:]
    item = matrix.element_size()
    if allowed and matrix.dim() == 2 and rows and columns and matrix.data_ptr() % 16 == 0:
        stride_m, stride_n = matrix.stride()
        if stride_n == 1 and stride_m * item % 16 == 0 and stride_m >= columns:
            return TensorDescriptor(matrix, [rows, columns], [stride_m, 1], list(block)), "rows"
        if stride_m == 1 and stride_n * item % 16 == 0 and stride_n >= rows:
            return TensorDescriptor(matrix, [columns, rows], [stride_n, 1], [block[1], block[0]]), "columns"
    return matrix, ""


def check_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    shape: tuple[int, int] | None = None,
    out_shape: tuple[int, int] | None = None,
    scales: Scales = (None, None),
    partial: torch.dtype | None = None,
) -> None:
    """Raises TypeError or ValueError unless the kernels can take these operands.

    `shape` is that of the left factor if it is not a's (a gathered a), `out_shape` that of the result if it is not the
    product's (a scattered one); the operands are matrices, or a batch if neither is given. Products are rounded to
    `partial` (default: out's dtype).
    """
    may_batch = shape is None and out_shape is None
    if a.dim() not in ((2, 3) if may_batch else (2,)) or b.dim() != a.dim() or out.dim() != a.dim():
        raise ValueError(f"the operands must be matrices; a is {a.dim()}-D, b {b.dim()}-D, out {out.dim()}-D")
    rows, inner = a.shape[-2:] if shape is None else shape
    lead = list(a.shape[:-2])
    if inner != b.shape[-2] or list(b.shape[:-2]) != lead:
        raise ValueError(f"{[*lead, rows, inner]} and b {list(b.shape)} cannot be multiplied: {inner} != {b.shape[-2]}")
    wanted = [*lead, rows, b.shape[-1]] if out_shape is None else list(out_shape)
    if list(out.shape) != wanted:
        raise ValueError(f"out is {list(out.shape)}, the result {wanted}")
    if a.dtype not in DTYPES:
        raise TypeError(f"the Triton kernels take bfloat16, float16, float32 and float8_e4m3fn, not {a.dtype}")
    partial = partial or out.dtype
    if partial not in TRITON_DTYPES or out.dtype not in (partial, torch.float32):
        raise TypeError(f"products of {partial} cannot be summed to {out.dtype}")
    if b.dtype != a.dtype:
        raise TypeError(f"b is {b.dtype}, a is {a.dtype}: convert one of them")
    if a.dtype != FLOAT8 and bias is not None and bias.dtype not in (a.dtype, partial):
        raise TypeError(f"bias is {bias.dtype}, a is {a.dtype}: convert one of them")
    for name, tensor in {"b": b, "out": out, "bias": bias, "scale_a": scales[0], "scale_b": scales[1]}.items():
        if tensor is not None and tensor.device != a.device:
            raise ValueError(f"{name} is on {tensor.device}, a is on {a.device}: move one of them")
    row = [*lead, b.shape[-1]]
    if bias is not None and (list(bias.shape) != row or not bias.is_contiguous()):
        raise ValueError(f"bias must be a contiguous {row}, not {list(bias.shape)} strides {bias.stride()}")
    for name, scale, count in (("scale_a", scales[0], rows), ("scale_b", scales[1], b.shape[-1])):
        if (scale is not None) != (a.dtype == FLOAT8):
            raise TypeError(f"{name}: {FLOAT8} operands have scales, others have none; a is {a.dtype}")
        if scale is not None and (scale.dtype != torch.float32 or list(scale.shape) not in ([1], [count]) or lead):
            raise ValueError(
                f"{name} must be float32 [1] or [{count}], and no batch; not {scale.dtype} {list(scale.shape)}"
            )
    if a.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError("CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported")
    if a.device.type == "cuda":
        if INTERPRETED:
            raise RuntimeError(
                "these kernels were loaded for Triton's interpreter (TRITON_INTERPRET=1): unset it for CUDA"
            )
        if a.device.index != torch.cuda.current_device():
            raise ValueError(f"a is on {a.device}, the current device is cuda:{torch.cuda.current_device()}")
        if a.dtype == FLOAT8 and torch.cuda.get_device_capability(a.device) < (8, 9):
            raise RuntimeError(
                f"{torch.cuda.get_device_name(a.device)} multiplies no {FLOAT8}: it needs sm_89 or newer"
            )


def with_scratch_memory(start: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`start` with memory of torch for what the kernel builds on the device (descriptors of the peers' memory).

    Triton's allocator is set in a copy of the context: a program that has set one of its own keeps it.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def run(*args: Any, **kwargs: Any) -> Any:
        triton.set_allocator(allocate)
        return start(*args, **kwargs)

    return lambda *args, **kwargs: contextvars.copy_context().run(run, *args, **kwargs)


def run_planned(
    workspace: WorkspaceLike,
    name: str,
    options: Hashable,
    operands: Sequence[torch.Tensor | None],
    choose: Callable[[], Plan],
    launch: Callable[..., None],
) -> None:
    """``launch(plan=choose(), launcher=..., ...)`` on a workspace, which grows if it must (collective then).

    Repeated calls take the short way of `_launch.repeat`, which says what `options` and `operands` have to decide.
    Raises SymmetricMemoryTimeout when a peer does not come (interpreter; a compiled kernel traps), and what `choose`,
    `launch` and `reserve` raise.
    """

    def first(launcher: Launcher) -> None:
        plan = choose()
        workspace.reserve(plan.staging_bytes, plan.flags)
        with errors_named(workspace, name):
            launch(plan=plan, launcher=launcher, **launch_arguments(workspace))

    repeat(workspace, (name, options), operands, first)
