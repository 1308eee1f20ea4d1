"""What the matmul families share: finding the matmul behind a collective, and the guard on it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from symmpatterns import config, cost_model
from symmpatterns.groups import Group
from symmpatterns.patterns._gradients import gradient_problem
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import REDUCE_SCATTER, RESHAPE, aten, hidden_work, hint, name_of, value_of
from symmpatterns.replacements import MATMUL_DTYPES


@dataclass(frozen=True)
class Product:
    """``a @ b (+ bias)`` as a graph computes it, and the nodes between it and the collective.

    views   reshapes behind the matmul, in order
    chunks  the split, getitems and cat that bring the chunks along `dim` to the front, or nothing
    dim     the dimension of the reshaped product along which a reduce-scatter scatters; 0 for an all-reduce
    """

    matmul: Node
    views: list[Node]
    chunks: list[Node]
    dim: int

    @property
    def a(self) -> Node:
        return self._operands[0]

    @property
    def b(self) -> Node:
        return self._operands[1]

    @property
    def bias(self) -> Node | None:
        return None if self.matmul.target is aten.mm.default else self.matmul.args[0]  # type: ignore[return-value]

    @property
    def _operands(self) -> Sequence[Any]:
        return self.matmul.args if self.matmul.target is aten.mm.default else self.matmul.args[1:3]

    @property
    def last(self) -> Node:
        """The reshaped product, before it is cut into chunks."""
        return self.views[-1] if self.views else self.matmul


def find_product(node: object) -> Product | None:
    """The matmul whose product, reshaped and perhaps cut into chunks, is `node`; None if there is none."""
    if not isinstance(node, Node):
        return None
    node, dim, chunks = undo_chunks(node)
    views: list[Node] = []
    while node.target in RESHAPE and isinstance(node.args[0], Node):
        views.insert(0, node)
        node = node.args[0]
    if node.target not in (aten.mm.default, aten.addmm.default):
        return None
    return Product(node, views, chunks, dim)


def undo_chunks(node: Node) -> tuple[Node, int, list[Node]]:
    """(x, d, nodes) when `node` is ``cat(split(x, n, d), 0)``, all chunks in order; else (node, 0, [])."""
    if node.target is not aten.cat.default or (len(node.args) > 1 and node.args[1] != 0):
        return node, 0, []
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or not all(
        isinstance(p, Node) and p.target is operator.getitem for p in parts
    ):
        return node, 0, []
    splits = {p.args[0] for p in parts}  # type: ignore[union-attr]
    if len(splits) != 1 or [p.args[1] for p in parts] != list(range(len(parts))):  # type: ignore[union-attr]
        return node, 0, []
    (split,) = splits
    if not isinstance(split, Node) or split.target is not aten.split.Tensor or len(split.users) != len(parts):
        return node, 0, []
    source = split.args[0]
    value = value_of(source) if isinstance(source, Node) else None
    if value is None:
        return node, 0, []
    dim = split.args[2] if len(split.args) > 2 else 0
    assert isinstance(source, Node) and isinstance(dim, int)
    return source, dim % value.ndim, [split, *parts, node]


def is_fusable(
    rewriting: Rewriting, family: str, product: Product, start: Node, wait: Node, reduce_ops: Sequence[str]
) -> Group | None:
    """The guard that matmul -> collective families share; declines with a reason and returns None, or the group."""
    decline = partial(rewriting.decline, start, family)
    matmul, producer = product.matmul, name_of(product.matmul.target)
    result, a_value = value_of(matmul), value_of(product.a)
    reduce_op, group_name = start.args[1], start.args[-1]
    if result is None or a_value is None:
        decline("no_metadata", f"{producer} carries no shape information")
    elif result.dtype not in MATMUL_DTYPES or a_value.dtype != result.dtype:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in MATMUL_DTYPES)
        decline("dtype", f"{producer} gives {result.dtype} from {a_value.dtype}; the kernel takes {wanted}")
    elif result.device.type not in ("cpu", "cuda"):
        decline("device", f"there is no symmetric memory on device {result.device}")
    elif reduce_op not in reduce_ops:
        known = " or ".join(f'"{op}"' for op in reduce_ops)
        decline("reduce_op", f'the kernel reduces with {known}, not with "{reduce_op}"')
    elif any(matmul.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        decline("scaled_addmm", "addmm with alpha or beta other than 1 is not fused")
    elif not _is_row(product.bias, result.dtype):
        decline("bias_form", "only a bias of one row, in the dtype of the result, is added in the kernel")
    elif (other := _read_elsewhere(product)) is not None:
        decline("producer_has_other_users", f"{other}, so the unreduced product has to exist")
    elif len(start.users) > 1:
        decline("collective_has_other_users", f"{start.name} is used besides its wait")
    elif config.keep_overlap and (hidden := hidden_work(start, wait)) is not None:
        decline("overlapped", f"its wait comes after {hidden}, which hides it already")
    elif start.target in REDUCE_SCATTER and (problem := gradient_problem(product.last, wait)) is not None:
        decline(*problem)
    else:
        return rewriting.can_reach_peers(start, family, group_name)
    return None


def pays(rewriting: Rewriting, family: str, start: Node, size: tuple[object, object, object], group: Group) -> bool:
    """Whether the cost model says that a product of `size` (M, N, K) pays, or is overruled by ``config.force``."""
    value = value_of(start)
    assert value is not None
    m, n, k = (hint(s) for s in size)
    verdict = cost_model.matmul_collective(family, m, n, k, value.dtype, group.world_size, value.device)
    if verdict.fuse or config.force:
        return True
    return rewriting.decline(start, family, "cost_model", verdict.why)


def _is_row(bias: Node | None, dtype: torch.dtype) -> bool:
    value = None if bias is None else value_of(bias)
    return bias is None or (value is not None and value.ndim == 1 and value.dtype == dtype)


def _read_elsewhere(product: Product) -> str | None:
    for node in [product.matmul, *product.views]:
        # What feeds the split is read once: by the split.
        if len(node.users) > 1:
            readers = ", ".join(user.name for user in list(node.users)[:3])
            return f"{node.name} is read by {readers}"
    for node in product.chunks:
        if node.target is not aten.split.Tensor and len(node.users) > 1:
            return f"{node.name} is read by {', '.join(user.name for user in node.users)}"
    return None


def erase(product: Product) -> None:
    """Removes the nodes of a product that a rewrite has replaced."""
    for node in [*reversed(product.chunks), *reversed(product.views), product.matmul]:
        if not node.users:
            node.graph.erase_node(node)
