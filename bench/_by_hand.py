"""What an author could write with torch's own symmetric-memory operators (CUDA): no compiler puts them there.

The program before and behind the collective is compiled by Inductor, and the one before it writes into symmetric memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from _common import compiled_alone
from torch import Tensor

import symmpatterns

Function = Callable[..., Any]


def _scaled(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor) -> None:
    out.copy_(x * 1.5)


def _added_and_normalised(total: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(total + residual, (weight.shape[0],), weight)


def _normalised(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor) -> None:
    out.copy_(torch.nn.functional.rms_norm(x + residual, (weight.shape[0],), weight))


def _doubled(gathered: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return gathered * 2


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def implementations(workload: str, dynamic: bool | None) -> dict[str, Function]:
    """By name; empty for a workload that torch has no such operator for. `dynamic`: as `torch.compile` takes it."""
    name = _world().group_name
    operators = torch.ops.symm_mem
    if workload == "all_reduce":
        return {
            "symm_mem one-shot": _chain(
                _scaled,
                lambda t: operators.one_shot_all_reduce(t, "sum", name),
                _added_and_normalised,
                "one_shot",
                dynamic,
            ),
            "symm_mem two-shot": _chain(
                _scaled,
                lambda t: operators.two_shot_all_reduce_(t, "sum", name),
                _added_and_normalised,
                "two_shot",
                dynamic,
            ),
        }
    if workload == "all_gather":

        def gather(t: Tensor) -> Tensor:  # on a stream of its own until somebody waits
            return torch.ops._c10d_functional.wait_tensor(operators._low_contention_all_gather(t, name))

        return {"symm_mem": _chain(_normalised, gather, _doubled, "gather", dynamic)}
    return {}


def _chain(before: Any, collective: Function, behind: Any, name: str, dynamic: bool | None) -> Function:
    import torch.distributed._symmetric_memory as symm_mem

    before, behind = (compiled_alone(each, name, dynamic) for each in (before, behind))
    staging: dict[Any, Tensor] = {}

    def call(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        key = (x.shape, x.dtype)
        if key not in staging:
            staging[key] = symm_mem.empty(*x.shape, dtype=x.dtype, device=x.device)
            symm_mem.rendezvous(staging[key], _world())
        with symmpatterns.config.patch(enabled=False):
            before(x, residual, weight, staging[key])
            return behind(collective(staging[key]), residual, weight)

    return call
