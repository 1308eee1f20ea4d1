"""A matrix product as a graph spells it, and what stands between it and its collective."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from symmpatterns.patterns._vocabulary import CAST, RESHAPE, aten, value_of
from symmpatterns.replacements import FLOAT8, MATMUL_DTYPES

# The names under which each matmul takes its left and right factor and what it adds.
_FACTORS: dict[object, tuple[str, str, str]] = {
    aten.mm.default: ("self", "mat2", ""),
    aten.mm.dtype: ("self", "mat2", ""),
    aten.addmm.default: ("mat1", "mat2", "self"),
    aten.bmm.default: ("self", "mat2", ""),
    aten.baddbmm.default: ("batch1", "batch2", "self"),
    aten._scaled_mm.default: ("self", "mat2", "bias"),
    aten._int_mm.default: ("self", "mat2", ""),
}
BATCHED = (aten.bmm.default, aten.baddbmm.default)
# They only arrange elements anew, so they may as well stand behind an all-reduce.
_ARRANGEMENTS = {
    *RESHAPE,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.clone.default,
}


@dataclass(frozen=True)
class Matmul:
    """One call of a matmul: ``a @ b (+ bias)``, of float8 operands with their scales."""

    node: Node
    arguments: dict[str, Any] = field(repr=False)

    @property
    def a(self) -> Node:
        return self.arguments[_FACTORS[self.node.target][0]]

    @property
    def b(self) -> Node:
        return self.arguments[_FACTORS[self.node.target][1]]

    @property
    def bias(self) -> Node | None:
        return self.arguments.get(_FACTORS[self.node.target][2])

    @property
    def scales(self) -> tuple[Node | None, Node | None]:
        return self.arguments.get("scale_a"), self.arguments.get("scale_b")

    @property
    def is_batched(self) -> bool:
        return self.node.target in BATCHED

    def problem(self) -> tuple[str, str] | None:
        """(code, reason) when the kernels cannot compute it: its dtypes, its scales, what it adds."""
        result, a, name = value_of(self.node), value_of(self.a), str(self.node.target).removesuffix(".default")
        if result is None or a is None:
            return "no_metadata", f"{name} carries no shape information"
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in MATMUL_DTYPES)
        if self.node.target is aten._int_mm.default:
            return "dtype", f"{name} multiplies integers; the kernel takes {wanted}, and float8_e4m3fn with scales"
        b = value_of(self.b)
        is_known = a.dtype in MATMUL_DTYPES or (a.dtype == FLOAT8 and self.node.target is aten._scaled_mm.default)
        if result.dtype not in MATMUL_DTYPES or not is_known or b is None or b.dtype != a.dtype:
            of = a.dtype if b is None or b.dtype == a.dtype else f"{a.dtype} and {b.dtype}"
            return "dtype", f"{name} gives {result.dtype} from {of}; the kernel takes {wanted}"
        if any(self.arguments.get(each, 1) != 1 for each in ("alpha", "beta")):
            return "scaled_addmm", "addmm with alpha or beta other than 1 is not fused"
        if a.dtype == FLOAT8 and not self._has_plain_scales(result):
            return (
                "scale_form",
                "only float32 scales of a whole matrix, or of each row of a and each column of b, are fused",
            )
        if self.bias is not None and self._bias_shape() is None:
            return "bias_form", "only a bias of one row, in the dtype of the result, is added in the kernel"
        return None

    def _has_plain_scales(self, result: torch.Tensor) -> bool:
        if self.arguments.get("scale_result") is not None:
            return False
        for scale, dim in zip(self.scales, (0, 1)):
            value = None if scale is None else value_of(scale)
            if value is None or value.dtype != torch.float32:
                return False
            is_one = all(size == 1 for size in value.shape)
            is_vector = value.ndim == 2 and value.shape[dim] == result.shape[dim] and value.shape[1 - dim] == 1
            if not is_one and not is_vector:
                return False
        return True

    def _bias_shape(self) -> list[Any] | None:
        """The bias as a row [N], or of a batch as [B, N] or a row for all; None for another bias."""
        value, result = value_of(self.bias) if self.bias is not None else None, value_of(self.node)
        if value is None or result is None or value.dtype != result.dtype or value.ndim == 0:
            return None
        lead = list(value.shape[:-1])
        if value.shape[-1] != result.shape[-1]:
            return None
        if all(size == 1 for size in lead):
            return [result.shape[-1]]
        if self.is_batched and value.ndim == 3 and lead == [result.shape[0], 1]:
            return [result.shape[0], result.shape[-1]]
        return None

    def emit_bias(self) -> Node | None:
        """The bias in the shape that the operators take; new nodes go to the graph's insertion point."""
        if self.bias is None:
            return None
        bias, value, shape = self.bias, value_of(self.bias), self._bias_shape()
        assert value is not None and shape is not None
        while value.ndim > len(shape):  # a dimension of one element too many
            dim = 1 if len(shape) == 2 else 0
            bias = bias.graph.call_function(aten.squeeze.dim, (bias, dim))
            value = bias.meta["val"] = value.squeeze(dim)
        return bias


def as_matmul(node: object) -> Matmul | None:
    """`node` as a matmul, if it is one, whether or not the kernels can compute it."""
    if not isinstance(node, Node) or node.target not in _FACTORS:
        return None
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return Matmul(node, {**dict(zip(names, node.args)), **node.kwargs})


@dataclass(frozen=True)
class Product:
    """A matmul, and the nodes between it and the collective.

    views   what arranges its elements anew, and at most one conversion of the dtype, in order
    chunks  the split, getitems and cat that bring the chunks along `dim` to the front, or nothing
    dim     the dimension of the arranged product along which a reduce-scatter scatters; 0 for an all-reduce
    """

    matmul: Matmul
    views: list[Node]
    chunks: list[Node]
    dim: int

    @property
    def last(self) -> Node:
        """The arranged product, before it is cut into chunks."""
        return self.views[-1] if self.views else self.matmul.node

    @property
    def arrangements(self) -> list[Node]:
        """`views` but for the conversion."""
        return [view for view in self.views if view.target not in CAST]

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype] | None:
        """(what partial products are rounded to and sent in, what their sum is rounded to): as the graph rounds them.

        The sum is taken in float32. A conversion to float32 before the collective adds nothing to a 16-bit product, so
        the product itself is sent; one from float32 rounds what was accumulated in float32. Other conversions would
        round twice: None.
        """
        product, last = value_of(self.matmul.node), value_of(self.last)
        if product is None or last is None or last.dtype not in MATMUL_DTYPES:
            return None
        if last.dtype in (product.dtype, torch.float32):
            return product.dtype, last.dtype
        return (last.dtype, last.dtype) if product.dtype == torch.float32 else None

    def emit_options(self) -> dict[str, Any]:
        """The keyword arguments of the operator that computes it; new nodes go to the graph's insertion point."""
        a = value_of(self.matmul.a)
        assert a is not None and self.dtypes is not None
        sent, out = self.dtypes
        bias, (scale_a, scale_b) = self.matmul.emit_bias(), self.matmul.scales
        options = {"bias": bias, "scale_a": scale_a, "scale_b": scale_b}
        options["partial_dtype"] = None if sent == (torch.bfloat16 if a.dtype == FLOAT8 else a.dtype) else sent  # type: ignore[assignment]
        options["out_dtype"] = None if out == sent else out  # type: ignore[assignment]
        return {name: value for name, value in options.items() if value is not None}


def find_product(node: object) -> Product | None:
    """The matmul whose product, arranged anew, converted and perhaps cut into chunks, is `node`; None if there is none."""
    if not isinstance(node, Node):
        return None
    node, dim, chunks = undo_chunks(node)
    views: list[Node] = []
    conversions = 0
    while (node.target in _ARRANGEMENTS or node.target in CAST) and isinstance(node.args[0], Node):
        conversions += node.target in CAST
        views.insert(0, node)
        node = node.args[0]
    matmul = as_matmul(node)
    return None if matmul is None or conversions > 1 else Product(matmul, views, chunks, dim)


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
