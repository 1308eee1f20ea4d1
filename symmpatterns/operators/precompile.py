"""Has the kernels of a rewritten graph's operators compiled while Inductor goes on with the graph.

The operators are called as the graph will call them, but on tensors without memory, and with a workspace that launches
nothing: they take their decisions, and what they would launch is compiled in a thread beside this one
(triton_kernels/_background.py). Nothing is collective here. Where that foresees the wrong kernel, because rank 0's tables
differ or Inductor lays a tensor out differently, the first launch compiles the right one, as all of them did otherwise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node, map_arg

from symmpatterns import compat, config, tables
from symmpatterns.groups import Group, get_group
from symmpatterns.operators.all_gather_matmul import _all_gather_matmul
from symmpatterns.operators.all_reduce_rms_norm import _all_reduce_rms_norm
from symmpatterns.operators.matmul_all_reduce import _matmul_all_reduce
from symmpatterns.operators.matmul_reduce_scatter import _matmul_reduce_scatter
from symmpatterns.peer_views import Plan
from symmpatterns.workspace import Workspace

_log = logging.getLogger("symmpatterns")
_DEVICE = "cuda"
_SIGNATURES = 4096  # of calls that are remembered at a time
_begun: set[str] = set()


class CompilingWorkspace(Workspace):
    """Stands for a group's workspace where kernels are compiled only. It has tables of the same kind, without memory."""

    def __init__(self, group: Group, nowhere: compat.WithoutMemory) -> None:
        # Not the base class's, which is collective.
        self.nowhere = nowhere
        self.group, self.rank, self.world_size, self.device = group, group.rank, group.world_size, nowhere.device
        table = (2, group.world_size), (group.world_size, 1), torch.int64
        self.staging_ptrs, self.flag_ptrs = nowhere.tensor(*table), nowhere.tensor(*table)
        self.state = nowhere.tensor((16,), (1,), torch.int32)
        self.site = 1
        self.ready, self.choices = {}, {}
        self.launches = None

    def reserve(self, staging_bytes: int, flags: int) -> None:
        """There is no memory to grow."""

    def agree(self, fields: tuple[str, ...], site: tuple[object, ...], steps: int = 1) -> int:
        return self.site

    def from_first_rank(self, what: str, payload: str) -> str:
        return payload

    @contextlib.contextmanager
    def call(self, what: str, site: int = 0) -> Iterator[None]:  # type: ignore[override]
        yield


# The operators by name, with the position of the group's name among their arguments.
_OPERATORS: dict[str, tuple[Callable[..., object], int]] = {
    "symmpatterns::matmul_all_reduce": (_matmul_all_reduce, 3),
    "symmpatterns::matmul_reduce_scatter": (_matmul_reduce_scatter, 4),
    "symmpatterns::all_gather_matmul": (_all_gather_matmul, 3),
    "symmpatterns::all_reduce_rms_norm": (_all_reduce_rms_norm, 5),
}


def begin(graph: Graph) -> None:
    """Begins to compile what the calls of our operators in `graph` will launch, as far as that is known already.

    That is so of calls on CUDA with static sizes. Never raises: a kernel that is not compiled here is compiled later.
    """
    for node in graph.nodes:
        name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else None
        try:
            if name in _OPERATORS:
                _begin_operator(node, *_OPERATORS[name])
            elif name == "symmpatterns::peer_buffers":
                _begin_barrier(*node.args)
        except Exception:
            _log.debug("the kernels of %s are not compiled ahead", node, exc_info=True)


def _begin_operator(node: Node, operator: Callable[..., object], group_position: int) -> None:
    values: list[Any] = [each.meta.get("val") for each in node.all_input_nodes]
    if not all(isinstance(value, torch.Tensor) and _is_static(value) for value in values):
        return

    def call(workspace: CompilingWorkspace) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), lambda each: workspace.nowhere.like(each.meta["val"]))
        operator(*args, **kwargs, workspace=workspace)

    signature = f"{node.target} {map_arg((node.args, node.kwargs), lambda each: _form(each.meta['val']))}"
    _begin(signature, values[0].device, node.args[group_position], call)


def _begin_barrier(plan: str, sizes: object, device: torch.device, group_name: str) -> None:
    """The one kernel of ours that peer views launch."""
    takes_turns = Plan.parse(plan).in_turn

    def call(workspace: CompilingWorkspace) -> None:
        from symmpatterns.triton_kernels import barrier

        barrier.run(workspace, turns=[workspace.nowhere.tensor((2,), (1,), torch.int64)] if takes_turns else [])

    _begin(f"barrier {device} {group_name} {takes_turns}", device, group_name, call)


def _begin(signature: str, device: torch.device, group_name: Any, call: Callable[[CompilingWorkspace], None]) -> None:
    """``call(workspace)``, whose launches become compilations, unless one with this signature and configuration was made."""
    group = get_group(group_name)
    signature = f"{signature} {config.fingerprint()} {tables.fingerprint()}"
    if device.type != _DEVICE or group.is_fake or group.world_size == 1 or signature in _begun or not _can_compile():
        return
    compat.settle_triton_cache(device)
    with compat.without_memory(device) as nowhere:
        call(CompilingWorkspace(group, nowhere))
    if len(_begun) >= _SIGNATURES:
        _begun.clear()
    _begun.add(signature)


def _can_compile() -> bool:
    if not torch.cuda.is_initialized() or importlib.util.find_spec("triton") is None:
        return False
    return not compat.triton_interprets() and compat.may_compile_beside_inductor()


def _form(value: torch.Tensor) -> str:
    return f"{list(value.shape)} {value.stride()} {value.storage_offset()} {value.dtype} {value.device}"


def _is_static(value: torch.Tensor) -> bool:
    return all(isinstance(n, int) for n in (*value.shape, *value.stride(), value.storage_offset()))
