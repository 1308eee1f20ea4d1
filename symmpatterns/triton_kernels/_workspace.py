"""How the launchers meet a workspace (symmetric_memory.Workspace, or anything with the same few attributes)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from symmpatterns import config
from symmpatterns.groups import DivergenceError, SymmetricMemoryTimeout
from symmpatterns.triton_kernels._sync import INTERPRETED, FlagDivergedError, FlagTimeoutError


class WorkspaceLike(Protocol):
    """The part of a workspace that the kernels use."""

    group: Any
    rank: int
    world_size: int
    staging_ptrs: torch.Tensor
    flag_ptrs: torch.Tensor
    state: torch.Tensor
    site: int  # number of the call site that is running
    launches: dict[Any, Any] | None  # kept by _launch.repeat; None: kernels are compiled, and nothing is launched

    def reserve(self, staging_bytes: int, flags: int) -> None: ...


def num_sms(tensor: torch.Tensor) -> int:
    """Programs that are resident at once, one a multiprocessor; the interpreter runs one."""
    if INTERPRETED or not tensor.is_cuda:
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def launch_arguments(workspace: WorkspaceLike) -> dict[str, Any]:
    """The keyword arguments that every family's `launch` takes from a workspace."""
    return {
        "staging_ptrs": workspace.staging_ptrs,
        "flag_ptrs": workspace.flag_ptrs,
        "state": workspace.state,
        "rank": workspace.rank,
        "world_size": workspace.world_size,
        "timeout_s": float(config.timeout_s),
        "site": workspace.site,
    }


@contextlib.contextmanager
def errors_named(workspace: WorkspaceLike, what: str) -> Iterator[None]:
    """Turns a kernel's FlagError into the library's errors, which name the operator and the group."""
    try:
        yield
    except FlagDivergedError as error:
        raise DivergenceError(f"{what}: group {workspace.group.name!r}: {error}") from error
    except FlagTimeoutError as error:
        raise SymmetricMemoryTimeout(
            f"{what}: group {workspace.group.name!r}: {error}; {workspace.group.waited_for(error.peer)}"
        ) from error
