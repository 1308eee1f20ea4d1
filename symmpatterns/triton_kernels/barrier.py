"""All ranks of a group meet: what each stored in peers' memory before can be read by them after.

One program of one warp. It is a call of the workspace like any other: flag `source` of the call's half, in every peer,
becomes the call's ticket. The kernel before it on the stream has ended, so its stores are ordered before the release;
the kernel behind it has not begun, so its loads are ordered after the acquire.

Slots that are taken in turn (peer_views/slots.py) are counted here as well: the two words of `turns` change places. Only
this rank's kernels read them, those before and behind this one on the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from symmpatterns.triton_kernels._launch import Launcher, early, launch_kernel, repeat
from symmpatterns.triton_kernels._sync import begin_call, meet, raise_if_interpreted_call_failed
from symmpatterns.triton_kernels._workspace import WorkspaceLike, errors_named, launch_arguments


@triton.jit(do_not_specialize=["rank", "site", "timeout_ns"])
def barrier_kernel(
    flag_ptrs,
    state_ptr,
    turns_ptr,
    rank,
    site,
    timeout_ns,
    WORLD_SIZE: tl.constexpr,
    LANES: tl.constexpr,
    TAKES_TURNS: tl.constexpr,
):
    ticket, half = begin_call(state_ptr, site)
    if TAKES_TURNS:
        stored, read = tl.load(turns_ptr), tl.load(turns_ptr + 1)
    meet(flag_ptrs, half, rank, ticket, state_ptr, timeout_ns, WORLD_SIZE, LANES)
    if TAKES_TURNS:  # all threads have met since they loaded both
        tl.store(turns_ptr, read)
        tl.store(turns_ptr + 1, stored)


def launch(
    *,
    staging_ptrs: torch.Tensor,
    flag_ptrs: torch.Tensor,
    state: torch.Tensor,
    rank: int,
    world_size: int,
    timeout_s: float,
    site: int = 0,
    turns: Sequence[torch.Tensor] = (),
    launcher: Launcher = launch_kernel,
) -> None:
    """One barrier on the current stream; `staging_ptrs` is not used, `turns` is one int64 [2] or nothing. A peer that does
    not come is an error as in `matmul_all_reduce.launch`."""
    args = (flag_ptrs, state, turns[0] if turns else flag_ptrs, rank, site, int(timeout_s * 1e9))
    constants = {"WORLD_SIZE": world_size, "LANES": triton.next_power_of_2(world_size), "TAKES_TURNS": bool(turns)}
    launcher(barrier_kernel, 1, {}, args, {**constants, "num_warps": 1, "num_stages": 1, **early(state, 0)})
    raise_if_interpreted_call_failed(state, rank)


def run(
    workspace: WorkspaceLike,
    what: str = "barrier",
    turns: Sequence[torch.Tensor] = (),
    stream: torch.cuda.Stream | None = None,
) -> None:
    """`launch` on a workspace, whose flags are reserved, and on `stream`, if not on the current one.

    Raises SymmetricMemoryTimeout when a peer does not come.
    """

    def first(launcher: Launcher) -> None:
        with errors_named(workspace, what):
            launch(launcher=launcher, turns=turns, **launch_arguments(workspace))

    repeat(workspace, ("barrier", *(each.data_ptr() for each in turns)), (), first, stream)
