"""What a user's module of custom collectives looks like: operators, declared in every way, that check their input.

Each sums over the ranks by reading the peers' memory, and raises when its input is not symmetric. ``relaxed()`` lets
them sum ordinary tensors with torch.distributed, for the expected values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

import symmpatterns

addresses: list[int] = []  # of the inputs of all calls
_relaxed = False


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    global _relaxed
    _relaxed = True
    try:
        yield
    finally:
        _relaxed = False


def is_relaxed() -> bool:
    return _relaxed


def check_and_sum(x: torch.Tensor, group_name: str) -> torch.Tensor:
    if _relaxed:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=dist.distributed_c10d._resolve_process_group(group_name))
        return out
    if not symmpatterns.is_symmetric(x):
        raise RuntimeError("the input of a declared collective is not in symmetric memory")
    addresses.append(x.data_ptr())
    handle = symmpatterns.rendezvous(x, group_name)
    handle.barrier()
    out = torch.stack([buffer.contiguous() for buffer in handle.buffers]).sum(0)
    handle.barrier()  # nobody overwrites what somebody still reads
    return out


def _fake(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("allocation_test::sum_ranks", mutates_args=())
def sum_ranks(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return check_and_sum(x, group_name)


sum_ranks.register_fake(_fake)
sum_ranks.register_autograd(
    lambda ctx, gradient: (sum_ranks(gradient, ctx.group), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "group", inputs[1]),
)
symmpatterns.requires_symmetric_memory(sum_ranks, input=0)

# The same operator again and again, declared in other words, or not at all.
_library = torch.library.Library("allocation_test", "FRAGMENT")
ops: Any = torch.ops.allocation_test
SPELLINGS = ["packet", "overload", "name", "specify", "typed", "hint", "undeclared"]
symmpatterns.requires_symmetric_memory("allocation_test::by_name", "x")  # defined later
for _spelling in SPELLINGS:
    _name, _schema = f"by_{_spelling}", "(Tensor x, str group_name) -> Tensor"
    if _spelling == "typed":
        symmpatterns.library.define(f"allocation_test::{_name}", "(SymmMemTensor x, str group_name) -> Tensor")
    elif _spelling == "hint":
        symmpatterns.library.define(f"allocation_test::{_name}", _schema, symm_mem_hint="x")
    else:
        _library.define(_name + _schema)
    _library.impl(_name, check_and_sum, "CompositeExplicitAutograd")
    torch.library.register_fake(f"allocation_test::{_name}", _fake, lib=_library)
symmpatterns.requires_symmetric_memory(ops.by_packet, input="x")
symmpatterns.requires_symmetric_memory(ops.by_overload.default, input=["x"])
symmpatterns.specify_symmetric_memory(ops.by_specify, "x")
if hasattr(torch.library.Library, "register_symm_mem_args"):
    SPELLINGS.append("torch")
    _library.define("by_torch(Tensor x, str group_name) -> Tensor")
    _library.impl("by_torch", check_and_sum, "CompositeExplicitAutograd")
    torch.library.register_fake("allocation_test::by_torch", _fake, lib=_library)
    _library.register_symm_mem_args("by_torch", ["x"])

_library.define("sum_ranks_(Tensor(a!) x, str group_name) -> ()")


def _sum_ranks_(x: torch.Tensor, group_name: str) -> None:
    x.copy_(check_and_sum(x, group_name))


_library.impl("sum_ranks_", _sum_ranks_, "CompositeExplicitAutograd")
torch.library.register_fake("allocation_test::sum_ranks_", lambda x, g: None, lib=_library)
symmpatterns.requires_symmetric_memory(ops.sum_ranks_)

_library.define("sum_all(Tensor[] xs, str group_name) -> Tensor[]")
_library.impl("sum_all", lambda xs, g: [check_and_sum(x, g) for x in xs], "CompositeExplicitAutograd")
torch.library.register_fake("allocation_test::sum_all", lambda xs, g: [_fake(x, g) for x in xs], lib=_library)
symmpatterns.requires_symmetric_memory(ops.sum_all, "xs")

_library.define("contiguous_only(Tensor x, str group_name) -> Tensor", tags=(torch.Tag.needs_contiguous_strides,))


def _contiguous_only(x: torch.Tensor, group_name: str) -> torch.Tensor:
    if not _relaxed and not x.is_contiguous():
        raise RuntimeError("the input is not contiguous")
    return check_and_sum(x, group_name)


_library.impl("contiguous_only", _contiguous_only, "CompositeExplicitAutograd")
torch.library.register_fake("allocation_test::contiguous_only", _fake, lib=_library)
symmpatterns.requires_symmetric_memory(ops.contiguous_only)

_library.define("through_torch(Tensor x, str group_name) -> Tensor")


def _through_torch(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """The peers' memory through torch's own interface, and the group's own name."""
    if _relaxed:
        return check_and_sum(x, group_name)
    import torch.distributed._symmetric_memory as symm_mem

    handle = symm_mem.rendezvous(x, group_name)
    assert handle is not None
    handle.barrier()
    offset = (x.data_ptr() - handle.buffer_ptrs[handle.rank]) // x.element_size()
    parts = [handle.get_buffer(r, x.shape, x.dtype, offset) for r in range(handle.world_size)]
    out = torch.stack(parts).sum(0)
    handle.barrier()
    return out


_library.impl("through_torch", _through_torch, "CompositeExplicitAutograd")
torch.library.register_fake("allocation_test::through_torch", _fake, lib=_library)
symmpatterns.requires_symmetric_memory(ops.through_torch)


@torch.library.custom_op("allocation_test::produce", mutates_args=())
def produce(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * 3, x.sum(0)


@produce.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[1:])


@torch.library.custom_op("allocation_test::from_elsewhere", mutates_args=())
def from_elsewhere(x: torch.Tensor) -> torch.Tensor:
    """Memory that torch did not allocate."""
    return torch.from_numpy(x.cpu().numpy() * 4).to(x.device)


@from_elsewhere.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_library.define("is_symmetric(Tensor x) -> Tensor")
_library.impl("is_symmetric", lambda x: torch.tensor(symmpatterns.is_symmetric(x)), "CompositeExplicitAutograd")
torch.library.register_fake("allocation_test::is_symmetric", lambda x: x.new_empty((), dtype=torch.bool), lib=_library)


# Producers that are given the memory of their outputs.
given: list[bool] = []  # whether each was symmetric


def _write(out: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    given.append(symmpatterns.is_symmetric(out))
    return out.copy_(value)


_library.define("fill(Tensor x, Tensor(a!) out) -> ()")
_library.impl("fill", lambda x, out: None if _write(out, x * 7) is out else None, "CompositeExplicitAutograd")
torch.library.register_fake("allocation_test::fill", lambda x, out: None, lib=_library)

HAS_OUT_TAG = hasattr(torch.Tag, "out")
if HAS_OUT_TAG:
    _library.define("one(Tensor x) -> Tensor")
    _library.define("one.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)", tags=(torch.Tag.out,))
    _library.impl("one", lambda x: x * 5, "CompositeExplicitAutograd")
    _library.impl("one.out", lambda x, out: _write(out, x * 5), "CompositeExplicitAutograd")
    torch.library.register_fake("allocation_test::one", torch.empty_like, lib=_library)
    _library.define("two(Tensor x) -> (Tensor, Tensor)")
    _library.define(
        "two.out(Tensor x, *, Tensor(a!) out0, Tensor(b!) out1) -> (Tensor(a!), Tensor(b!))", tags=(torch.Tag.out,)
    )
    _library.impl("two", lambda x: (x * 5, x * 6), "CompositeExplicitAutograd")
    _library.impl(
        "two.out", lambda x, out0, out1: (_write(out0, x * 5), _write(out1, x * 6)), "CompositeExplicitAutograd"
    )
    torch.library.register_fake(
        "allocation_test::two", lambda x: (torch.empty_like(x), torch.empty_like(x)), lib=_library
    )
