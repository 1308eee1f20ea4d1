"""The pattern families, in a program each; what every suite that promises "each family" is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

from symmpatterns import patterns
from symmpatterns.report import Record
from tests.allocation_operators import sum_ranks

FAMILIES = tuple(module.__name__.rpartition(".")[2] for module in patterns.FAMILIES)


def _shared(x: Tensor) -> Tensor:
    """A matrix that is the same on every rank, to multiply [.., N] by."""
    n = x.shape[-1]
    return torch.arange(n * n, device=x.device).to(x.dtype).view(n, n).cos()


def _matmul_all_reduce(x: Tensor, group: Any) -> Tensor:
    return funcol.all_reduce(x.sin() @ _shared(x), "sum", group)


def _matmul_reduce_scatter(x: Tensor, group: Any) -> Tensor:
    return funcol.reduce_scatter_tensor(x.sin().repeat(group.size(), 1) @ _shared(x), "sum", 0, group)


def _all_gather_matmul(x: Tensor, group: Any) -> Tensor:
    return funcol.all_gather_tensor(x.sin(), 0, group) @ _shared(x)


def _all_reduce_rms_norm(x: Tensor, group: Any) -> Tensor:
    total = funcol.all_reduce(x.sin(), "sum", group) + _shared(x)[: x.shape[0]]
    return F.rms_norm(total, x.shape[-1:]) + total


def _peer_collectives(x: Tensor, group: Any) -> Tensor:
    return torch.tanh(funcol.all_reduce(torch.softmax(x, -1), "sum", group))


def _allocation(x: Tensor, group: Any) -> Tensor:
    return sum_ranks(x.sin(), group.group_name) * 2


# family: a function of a square matrix and a group with one collective, which this family takes. All results are the
# same on every rank, but for the rank's own block of a reduce-scatter.
PROGRAMS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "matmul_all_reduce": _matmul_all_reduce,
    "matmul_reduce_scatter": _matmul_reduce_scatter,
    "all_gather_matmul": _all_gather_matmul,
    "all_reduce_rms_norm": _all_reduce_rms_norm,
    "peer_collectives": _peer_collectives,
    "allocation": _allocation,
}


def that_took(records: Sequence[Record]) -> set[str]:
    """The families behind the rewrites of a report."""
    alone = {"peer_views": "peer_collectives", "allocation": "allocation"}  # strategies of one family each
    return {alone.get(str(record.strategy), str(record.family)) for record in records}
