"""What the GEMM kernels share: the order of tiles, one tile's product, its exchange between ranks, its sum.

A staged tile is contiguous: element (i, j) of a BM x BN tile lies at i * BN + j, so a tile is one run of memory on the
link whatever the shape of the matrix. Rows beyond the matrix are neither sent nor read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from symmpatterns.triton_kernels._sync import INTERPRETED, await_flag, publish_to_peers, staging_of

# --- order --------------------------------------------------------------------------------------------------------


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of the tile-th tile: down GROUP_M rows of tiles before the next column, for reuse in L2."""
    per_group = GROUP_M * tiles_n
    first_m = (tile // per_group) * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    in_group = tile % per_group
    return first_m + in_group % rows, in_group // rows


@triton.jit
def staged_offsets(BM: tl.constexpr, BN: tl.constexpr):
    """Offsets of a tile's elements within its slot of the staging memory."""
    return tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]


# --- arithmetic ---------------------------------------------------------------------------------------------------

if INTERPRETED:
    # Triton 3.9's interpreter multiplies the bit patterns of bfloat16 operands and truncates when it converts to
    # bfloat16; the compiled code does neither. These two do in float32 and integers what the hardware does.

    @triton.jit
    def _dot(a, b, acc):
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")

    @triton.jit
    def round_to(x, DTYPE: tl.constexpr):
        """fp32 to the dtype of the wire and the output, to nearest, ties to even."""
        if DTYPE == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True).to(tl.int64)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)  # a NaN stays one
            return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            return x.to(DTYPE)

else:

    @triton.jit
    def _dot(a, b, acc):
        if a.dtype == tl.float8e4nv:
            # The tensor cores of sm_90 add float8 products in fewer bits than float32: not more than 128 of them, then
            # the sum goes to a float32 register.
            return tl.dot(a, b, acc, max_num_imprecise_acc=128)
        else:
            # ieee: float32 operands are not cut to tf32; other dtypes do not care
            return tl.dot(a, b, acc, input_precision="ieee")

    @triton.jit
    def round_to(x, DTYPE: tl.constexpr):
        """fp32 to the dtype of the wire and the output, to nearest, ties to even."""
        return x.to(DTYPE)


@triton.jit
def tile_product(
    acc, a, b, first_m, first_n, first_k, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, A_DESC: tl.constexpr, B_DESC: tl.constexpr,
):  # fmt: skip
    """acc + rows first_m ... of a [M, K] @ columns first_n ... of rows first_k : first_k + K of b; fp32 [BM, BN].

    a, b: pointers, or TMA descriptors if A_DESC, B_DESC are not "": "rows" describes the matrix itself, "columns" its
    transpose. Elements beyond M, N, K count as zero (beyond M and N they are never used); a descriptor of b knows no
    end at first_k + K, so first_k > 0 or less than all rows of b needs K to be a multiple of BK then.
    """
    offs_m = first_m + tl.arange(0, BM)
    offs_n = first_n + tl.arange(0, BN)
    for k in range(0, K, BK):
        offs_k = k + tl.arange(0, BK)
        if A_DESC == "rows":
            a_tile = a.load([first_m, k])
        elif A_DESC == "columns":
            a_tile = a.load([k, first_m]).T
        else:
            a_ptrs = a + offs_m[:, None].to(tl.int64) * stride_am + offs_k[None, :].to(tl.int64) * stride_ak
            a_tile = tl.load(a_ptrs, mask=(offs_m[:, None] < M) & (offs_k[None, :] < K), other=0.0)
        if B_DESC == "rows":
            b_tile = b.load([first_k + k, first_n])
        elif B_DESC == "columns":
            b_tile = b.load([first_n, first_k + k]).T
        else:
            rows_k = first_k + offs_k
            b_ptrs = b + rows_k[:, None].to(tl.int64) * stride_bk + offs_n[None, :].to(tl.int64) * stride_bn
            b_tile = tl.load(b_ptrs, mask=(offs_k[:, None] < K) & (offs_n[None, :] < N), other=0.0)
        acc = _dot(a_tile, b_tile, acc)
    return acc


@triton.jit
def finish_tile(
    acc, bias, scale_a, scale_b, stride_sa, stride_sb, first_scale, first_n, rows, N,
    DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """acc, scaled, with the bias added, rounded once to DTYPE.

    scale_a, scale_b: fp32, one for each row (from first_scale on, `rows` of them) and column, at strides that are 0 where
    one serves all; None for operands that need none. bias: a contiguous [N], or None.
    """
    offs_n = first_n + tl.arange(0, BN)
    if scale_a is not None:
        offs_m = tl.arange(0, BM)
        acc *= tl.load(scale_a + (first_scale + offs_m) * stride_sa, mask=offs_m < rows, other=0.0)[:, None]
        acc *= tl.load(scale_b + offs_n * stride_sb, mask=offs_n < N, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return round_to(acc, DTYPE)


@triton.jit
def store_tile(out, tile, first_m, first_n, M, N, stride_m, stride_n, BM: tl.constexpr, BN: tl.constexpr):
    """out[first_m : first_m + BM, first_n : first_n + BN] = tile, as far as out reaches; any strides."""
    offs_m = first_m + tl.arange(0, BM)
    offs_n = first_n + tl.arange(0, BN)
    ptrs = out + offs_m[:, None].to(tl.int64) * stride_m + offs_n[None, :].to(tl.int64) * stride_n
    tl.store(ptrs, tile, mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


# --- exchange -----------------------------------------------------------------------------------------------------


@triton.jit
def send_tile(staging_ptrs, half, peer, slot, tile, rows, WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Stores the first `rows` rows of a tile into a slot of a rank's staging memory; publish it afterwards.

    Plain stores: a TMA store of Triton 3.6 is not complete when the flag behind it is written.
    """
    there = staging_of(staging_ptrs, half, peer, WORLD_SIZE, tile.dtype)
    start = slot.to(tl.int64) * (BM * BN)
    tl.store(there + start + staged_offsets(BM, BN), tile, mask=tl.arange(0, BM)[:, None] < rows)


@triton.jit
def send_tile_to_peers(
    staging_ptrs, flag_ptrs, half, rank, slot, flag, tile, rows, ticket,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`send_tile` to every other rank, then the same flag at every other rank."""
    for distance in tl.range(1, WORLD_SIZE, num_stages=1):
        peer = (rank + distance) % WORLD_SIZE
        send_tile(staging_ptrs, half, peer, slot, tile, rows, WORLD_SIZE, BM, BN)
    publish_to_peers(flag_ptrs, half, rank, flag, ticket, WORLD_SIZE)


@triton.jit
def sending_descriptor(
    staging_ptrs, half, peer, slots, WORLD_SIZE: tl.constexpr, DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """A TMA descriptor of the slots of a rank's staging memory, one below the other.

    Made on the device: the address depends on the half, and a CUDA graph outlives the memory it was captured with.
    """
    there = staging_of(staging_ptrs, half, peer, WORLD_SIZE, DTYPE)
    return tl.make_tensor_descriptor(there, [slots * BM, BN], [BN, 1], [BM, BN])


@triton.jit
def send_tile_by_tma(slots, slot, tile, BM: tl.constexpr):
    """Starts to store a tile into a slot; only behind `finish_sends_by_tma` may it be published."""
    slots.store([slot * BM, 0], tile)


if INTERPRETED:

    @triton.jit
    def finish_sends_by_tma():
        """Interpreted stores are done when they return."""

    @triton.jit
    def idle(cycles):
        """Nothing: it would only change times."""

else:

    @triton.jit
    def idle(cycles):
        """Does nothing for so many clock cycles."""
        tl.inline_asm_elementwise(
            """{
            .reg .pred again;
            .reg .b64 began, now, wanted;
            mov.u64 began, %clock64;
            cvt.s64.s32 wanted, $1;
            IDLE:
            mov.u64 now, %clock64;
            sub.s64 now, now, began;
            setp.lt.s64 again, now, wanted;
            @again bra IDLE;
            mov.b32 $0, $1;
            }""",
            "=r,r",
            [cycles],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def finish_sends_by_tma():
        """Waits until everything this program sent through descriptors has arrived; a barrier must follow.

        Triton waits for a TMA store only until its source may be reused (cp.async.bulk.wait_group.read).
        """
        tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; mov.b32 $0, $1;",
            "=r,r,~{memory}",
            [tl.full([], 0, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def receive_tile(
    staging_ptrs, half, rank, slot, rows, WORLD_SIZE: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The first `rows` rows of a tile in a slot of the own staging memory, zeros below; await its flag before."""
    here = staging_of(staging_ptrs, half, rank, WORLD_SIZE, DTYPE)
    start = slot.to(tl.int64) * (BM * BN)
    mask = tl.arange(0, BM)[:, None] < rows
    # .cg: the L1 cache does not see what peers store
    return tl.load(here + start + staged_offsets(BM, BN), mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def reduce_tile(
    staging_ptrs, flag_ptrs, state_ptr, half, rank, index, slots_per_rank, own, rows, ticket, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """Sum (or average) over ranks of one tile: `own`, and each peer's in slot and flag peer * slots_per_rank + index.

    fp32, ranks 0, 1, ... in this order on every rank, every contribution rounded to the dtype of the wire, the own one
    too: all ranks get the same bits. Returns fp32.
    """
    total = tl.zeros([BM, BN], tl.float32)
    # num_stages=1: a pipelined loop would load before the flag is there
    for source in tl.range(0, WORLD_SIZE, num_stages=1):
        if source == rank:
            total += own.to(tl.float32)
        else:
            slot = source * slots_per_rank + index
            await_flag(flag_ptrs, half, rank, source, slot, ticket, state_ptr, timeout_ns, WORLD_SIZE)
            total += receive_tile(staging_ptrs, half, rank, slot, rows, WORLD_SIZE, own.dtype, BM, BN).to(tl.float32)
    if AVERAGE:
        total = tl.div_rn(total, tl.full([BM, BN], WORLD_SIZE, tl.float32))
    return total
