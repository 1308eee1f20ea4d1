"""All ranks of a group meet: what each stored in peers' memory before can be read by them after.

One program of one warp. It is a call of the workspace like any other: flag `source` of the call's half, in every peer,
becomes the call's ticket. The kernel before it on the stream has ended, so its stores are ordered before the release;
the kernel behind it has not begun, so its loads are ordered after the acquire.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from symmpatterns.triton_kernels._launch import Launcher, launch_kernel, repeat
from symmpatterns.triton_kernels._sync import (
    await_flag,
    begin_call,
    count_call,
    publish_to_peers,
    raise_if_interpreted_call_failed,
)
from symmpatterns.triton_kernels._workspace import WorkspaceLike, errors_named, launch_arguments


@triton.jit(do_not_specialize=["rank", "site", "timeout_ns"])
def barrier_kernel(flag_ptrs, state_ptr, rank, site, timeout_ns, WORLD_SIZE: tl.constexpr):
    ticket, half = begin_call(state_ptr, site)
    publish_to_peers(flag_ptrs, half, rank, rank, ticket, WORLD_SIZE)
    count_call(state_ptr, ticket, 1)
    for distance in tl.range(1, WORLD_SIZE, num_stages=1):
        peer = (rank + distance) % WORLD_SIZE
        await_flag(flag_ptrs, half, rank, peer, peer, ticket, state_ptr, timeout_ns, WORLD_SIZE)


def launch(
    *,
    staging_ptrs: torch.Tensor,
    flag_ptrs: torch.Tensor,
    state: torch.Tensor,
    rank: int,
    world_size: int,
    timeout_s: float,
    site: int = 0,
    launcher: Launcher = launch_kernel,
) -> None:
    """One barrier on the current stream; `staging_ptrs` is not used. A peer that does not come is an error as in
    `matmul_all_reduce.launch`."""
    args = (flag_ptrs, state, rank, site, int(timeout_s * 1e9))
    launcher(barrier_kernel, 1, {}, args, {"WORLD_SIZE": world_size, "num_warps": 1, "num_stages": 1})
    raise_if_interpreted_call_failed(state, rank)


def run(workspace: WorkspaceLike, what: str = "barrier") -> None:
    """`launch` on a workspace, whose flags are reserved. Raises SymmetricMemoryTimeout when a peer does not come."""

    def first(launcher: Launcher) -> None:
        with errors_named(workspace, what):
            launch(launcher=launcher, **launch_arguments(workspace))

    repeat(workspace, "barrier", (), first)
