"""Which implementation a call of an operator takes; all ranks of a group take the same.

A choice is an entry of the tuning tables (tables.py): a `variant` and its `options`.

    kernel       one Triton kernel computes and communicates (triton_kernels/); options override its plan
    copy_engine  pieces of rows, sent by copies beside the products (copy_engine/); options are those of its `Pieces`

Rank 0's tables count: its choice goes to the others at the first call with a shape.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symmpatterns import compat, host_backend, tables
from symmpatterns.groups import SymmetricMemoryError
from symmpatterns.workspace import Workspace


class Choice(NamedTuple):
    """A variant and its options; `str` is how reports name it."""

    variant: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return " ".join([self.variant, *(f"{name}={value}" for name, value in self.options.items())])


_KERNEL = Choice("kernel", {})
# Bytes that a rank sends to each peer from which copy engines pay where nothing was measured. A step of the relay takes
# some 20 us, which a gather hides behind the own shard's product; an all-reduce has twice as many, and never gains much.
_COPY_BYTES = {"all_gather_matmul": 4 << 20, "matmul_reduce_scatter": 16 << 20}


def choice_of(
    family: str, size: tuple[int, int, int], dtype: torch.dtype, sent_bytes: int, world_size: int, device: torch.device
) -> Choice:
    """This process's choice for a rank's matmul of `size` (M, N, K); `sent_bytes` go to each peer.

    Raises ValueError for an entry of a table that no implementation understands.
    """
    name = tables.device_name(device)
    entry = tables.nearest("choices", family, size, dtype, device=name, world_size=world_size)
    if entry is not None:
        try:
            choice = Choice(entry["choice"]["variant"], dict(entry["choice"].get("options", {})))
            _check(choice)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"tuning table: {entry} is no choice ({error}); it has a variant and options") from error
    elif device.type == "cuda" and sent_bytes >= _COPY_BYTES.get(family, sent_bytes + 1):
        choice = Choice("copy_engine", {})
    else:
        choice = _KERNEL
    return choice


def _check(choice: Choice) -> None:
    if choice.variant == "copy_engine":
        names = {"parts", "tail", "library"}
        if not set(choice.options) <= names or not all(isinstance(v, int) for v in choice.options.values()):
            raise ValueError("options of copy_engine are parts, tail and library, integers")
    elif choice.variant != "kernel":
        raise ValueError("the variants are kernel and copy_engine")


def matmul_implementation(
    op: str,
    kernels: str,
    tensor: Tensor,
    workspace: Workspace,
    size: tuple[int, int, int],
    sent_bytes: int,
    *,
    can_copy: bool = True,
) -> Callable[..., None]:
    """The function that computes a GEMM operator, with the same arguments for each kind of kernels.

    Collective at the first call with these arguments. `can_copy`: whether the operands' form is one that copy_engine/ takes.
    """
    plain = implementation_of(op, kernels, tensor)
    if kernels == "aten":
        return plain
    mine = choice_of(op, size, tensor.dtype, sent_bytes, workspace.world_size, tensor.device)
    # The pieces' products are summed in a Triton epilogue, and Triton multiplies float32 without tensor cores.
    if mine.variant == "copy_engine" and (not can_copy or tensor.dtype == torch.float32):
        mine = _KERNEL
    # Not by the call's whole signature: one rank alone may add a bias, and would ask alone.
    key = (op, kernels, tensor.dtype, size, sent_bytes, can_copy)
    if key not in workspace.choices:
        what = f"the kernel of a call of {op}"
        workspace.choices[key] = workspace.from_first_rank(what, json.dumps(mine))
    return bound(op, plain, Choice(*json.loads(workspace.choices[key])))


def bound(op: str, plain: Callable[..., None], choice: Choice) -> Callable[..., None]:
    """The function that a choice stands for; `plain` is the family's one-kernel form."""
    if choice.variant == "copy_engine":
        from symmpatterns.copy_engine import families

        return families.implementation_of(op, choice.options)
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in choice.options.items()}
    return functools.partial(plain, **options) if options else plain


def implementation_of(op: str, kernels: str, tensor: Tensor) -> Callable[..., None]:
    """The function of one kind of kernels that computes `op`.

    Raises SymmetricMemoryError without Triton, or when Triton is asked for CPU tensors and does not interpret.
    """
    if kernels == "aten":
        return getattr(host_backend, op)
    try:
        module = importlib.import_module(f"symmpatterns.triton_kernels.{op}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise SymmetricMemoryError(f"{op}: Triton is not installed: pip install 'triton>=3.6'") from error
    if not tensor.is_cuda and not compat.triton_interprets():
        raise SymmetricMemoryError(
            f"{op}: config.host_kernels is 'triton' and Triton does not interpret: set TRITON_INTERPRET=1 in the "
            "environment before Triton is imported, or use 'aten'"
        )
    return module.run
