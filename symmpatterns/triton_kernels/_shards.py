"""Sending, awaiting and copying the shards of a gathered matrix.

Shard s lies in the staging memory as rows of row_elements elements, from row s * shard_m on. A block of BM rows is sent
in PIECES pieces along K, each with its own flag: flag (s * blocks + block) * PIECES + piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from symmpatterns.triton_kernels._sync import await_flag, publish, publish_to_peers, staging_of


@triton.jit
def send_piece(
    a, staging_ptrs, half, rank, first_m, shard_m, first_k, end_k, row_elements, stride_am, stride_ak,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TO_SELF: tl.constexpr,
):  # fmt: skip
    """Stores rows first_m ... of columns first_k to end_k of the own shard at every peer, with
    TO_SELF at this rank too; publish the piece then."""
    offs_m = first_m + tl.arange(0, BM)
    there = (rank * shard_m + offs_m).to(tl.int64)[:, None] * row_elements
    for k in tl.range(first_k, end_k, BK, num_stages=1):
        offs_k = k + tl.arange(0, BK)
        mask = (offs_m[:, None] < shard_m) & (offs_k[None, :] < end_k)
        block = tl.load(
            a + offs_m[:, None].to(tl.int64) * stride_am + offs_k[None, :].to(tl.int64) * stride_ak, mask=mask
        )
        for distance in tl.range(0 if TO_SELF else 1, WORLD_SIZE, num_stages=1):
            peer = (rank + distance) % WORLD_SIZE
            staging = staging_of(staging_ptrs, half, peer, WORLD_SIZE, block.dtype)
            tl.store(staging + there + offs_k[None, :], block, mask=mask)


@triton.jit
def copy_block(
    source, target, first_m, rows, K, row_elements, stride_sk, stride_m, stride_k, BM: tl.constexpr, BK: tl.constexpr
):
    """target[first_m : first_m + BM, :K] = the same rows of source, as far as `rows` reaches."""
    offs_m = first_m + tl.arange(0, BM)
    for k in tl.range(0, K, BK, num_stages=1):
        offs_k = k + tl.arange(0, BK)
        mask = (offs_m[:, None] < rows) & (offs_k[None, :] < K)
        here = offs_m[:, None].to(tl.int64) * row_elements + offs_k[None, :].to(tl.int64) * stride_sk
        block = tl.load(source + here, mask=mask, cache_modifier=".cg")
        there = offs_m[:, None].to(tl.int64) * stride_m + offs_k[None, :].to(tl.int64) * stride_k
        tl.store(target + there, block, mask=mask)


@triton.jit
def await_block(
    flag_ptrs, state_ptr, half, rank, source, block, blocks, ticket, timeout_ns,
    WORLD_SIZE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Returns when all pieces of one block of rows of `source`'s shard have arrived."""
    first_flag = (source * blocks + block) * PIECES
    for piece in tl.range(0, PIECES, num_stages=1):
        await_flag(flag_ptrs, half, rank, source, first_flag + piece, ticket, state_ptr, timeout_ns, WORLD_SIZE)


@triton.jit
def send_shard(
    a, staging_ptrs, flag_ptrs, half, rank, program, senders, shard_m, K, row_elements, stride_am, stride_ak, ticket,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PIECES: tl.constexpr, TO_SELF: tl.constexpr,
):  # fmt: skip
    """Sends and publishes this program's part of the own shard to all peers, with TO_SELF to this rank too."""
    blocks = tl.cdiv(shard_m, BM)
    piece_k = tl.cdiv(tl.cdiv(K, PIECES), BK) * BK
    for step in tl.range(program, blocks * PIECES, senders, num_stages=1):
        first_k = (step % PIECES) * piece_k
        end_k = min(first_k + piece_k, K)
        send_piece(
            a, staging_ptrs, half, rank, (step // PIECES) * BM, shard_m, first_k, end_k, row_elements,
            stride_am, stride_ak, WORLD_SIZE, BM, BK, TO_SELF,
        )  # fmt: skip
        flag = rank * blocks * PIECES + step
        publish_to_peers(flag_ptrs, half, rank, flag, ticket, WORLD_SIZE)
        if TO_SELF:
            publish(flag_ptrs, half, rank, flag, ticket, WORLD_SIZE)


@triton.jit
def copy_shards(
    a, gathered, staging, flag_ptrs, state_ptr, half, rank, program, senders, shard_m, step_g, K, row_elements,
    stride_am, stride_ak, stride_gm, stride_gk, ticket, timeout_ns,
    WORLD_SIZE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """This program's part of `gathered`, in which shard s begins s * step_g elements from the first."""
    blocks = tl.cdiv(shard_m, BM)
    for step in tl.range(program, blocks * WORLD_SIZE, senders, num_stages=1):
        source = (rank + step // blocks) % WORLD_SIZE
        block = step % blocks
        target = gathered + source.to(tl.int64) * step_g
        if source == rank:
            copy_block(a, target, block * BM, shard_m, K, stride_am, stride_ak, stride_gm, stride_gk, BM, BK)
        else:
            await_block(flag_ptrs, state_ptr, half, rank, source, block, blocks, ticket, timeout_ns, WORLD_SIZE, PIECES)
            shard = staging + (source * shard_m).to(tl.int64) * row_elements
            copy_block(shard, target, block * BM, shard_m, K, row_elements, 1, stride_gm, stride_gk, BM, BK)
