"""The RMSNorm behind an all-reduce, with the residual that is added in between, as graphs spell it.

RMSNorm arrives decomposed::

    up = convert(h, float32)                    # not for fp32
    norm = up * rsqrt(mean(up ** 2, -1, keepdim) + eps)
    norm = convert(norm * weight, dtype)        # in any order

In vLLM's graphs it is one operator still, ``vllm_ir.rms_norm`` or ``vllm_ir.fused_add_rms_norm``, which vLLM decomposes
behind our pass.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from symmpatterns.operators.all_reduce_rms_norm import DTYPES
from symmpatterns.patterns._vocabulary import CAST, WAIT, aten, something_mutates, value_of


@dataclass
class Norm:
    """What was matched.

    start, wait      the collective
    total            the node whose RMSNorm is taken, `wait` or its sum with `residual`; vLLM's operator computes both
    norms, sums      the nodes that are the norm, and those that are what it is taken of
    between          what else goes with `total`, up to the norm: nobody else reads it; users last
    """

    start: Node
    wait: Node
    total: Node
    residual: Node | None
    eps: float = 0.0
    weight: Node | None = None
    norms: list[Node] = field(default_factory=list)
    sums: list[Node] = field(default_factory=list)
    between: list[Node] = field(default_factory=list)


def norm_behind(start: Node) -> Norm | None:
    """The RMSNorm behind an all-reduce, or None."""
    if len(start.users) != 1:
        return None
    (wait,) = start.users
    value = value_of(wait)
    if wait.target not in WAIT or value is None or value.ndim == 0 or value.dtype not in DTYPES:
        return None
    found = _operator_behind(start, wait, value) or _decomposed_behind(start, wait, value)
    # The call stands where the sum stood, and reads then what the collective read before.
    return None if found is None or something_mutates(start, found.total) else found


def _decomposed_behind(start: Node, wait: Node, value: torch.Tensor) -> Norm | None:
    candidates = [Norm(start, wait, wait, None, sums=[wait])]
    if len(wait.users) == 1:
        (user,) = wait.users
        residual = _other(user, wait, aten.add.Tensor)
        if residual is not None and not user.kwargs and _is_like(residual, value) and _is_like(user, value):
            candidates.append(Norm(start, wait, user, residual, sums=[user]))
    return next((each for each in candidates if _find_norm(each, value)), None)


def _operator_behind(start: Node, wait: Node, value: torch.Tensor) -> Norm | None:
    """vLLM's ``rms_norm(x, weight, eps)`` or ``fused_add_rms_norm(x, residual, weight, eps)``, which returns the sum too."""
    for user in wait.users:
        name = user.target._schema.name if isinstance(user.target, torch._ops.OpOverload) else ""
        if user.args[:1] != (wait,) or user.kwargs:
            continue
        if name == "vllm_ir::rms_norm":
            found = Norm(start, wait, wait, None, norms=[user], sums=[wait], between=[user])
            options = list(user.args[1:])
        elif name == "vllm_ir::fused_add_rms_norm" and len(wait.users) == 1:
            items = list(user.users)
            residual, *options = user.args[1:]
            if not isinstance(residual, Node) or residual is wait or not _is_like(residual, value):
                continue
            if any(item.target is not operator.getitem or item.args[1] not in (0, 1) for item in items):
                continue
            norms, sums = ([item for item in items if item.args[1] == index] for index in range(2))
            found = Norm(start, wait, user, residual, norms=norms, sums=sums, between=items)
        else:
            continue
        weight, eps, variance_size = [*options, None][:3]  # with a size only so much of the row is looked at
        if weight is not None and not (isinstance(weight, Node) and _is_weight(weight, value, found)):
            continue
        if variance_size is None and isinstance(eps, (int, float)):
            found.weight, found.eps = weight, float(eps)
            return found
    return None


def _other(node: Node, one: Node, target: object) -> Node | None:
    """The other operand of ``target(one, other)`` or ``target(other, one)``."""
    if node.target is not target or len(node.args) != 2:
        return None
    first, second = node.args
    other = second if first is one else first
    return other if isinstance(other, Node) and other is not one else None


def _is_like(node: Node, value: torch.Tensor) -> bool:
    own = value_of(node)
    return own is not None and own.dtype == value.dtype and own.device == value.device and own.shape == value.shape


def _find_norm(found: Norm, value: torch.Tensor) -> bool:
    casts = (
        [user for user in found.total.users if _casts_to(user, torch.float32)] if value.dtype != torch.float32 else []
    )
    for up in casts or [found.total]:
        for user in up.users:
            square_root = _inverse_root(user, up, found)
            if square_root is None:
                continue
            products = [each for each in square_root.users if _other(each, square_root, aten.mul.Tensor) is up]
            if len(products) != 1 or len(square_root.users) != 1:
                continue
            if up is not found.total and set(up.users) != {user, products[0]}:
                return False  # somebody else reads the cast, so it stays, and its input with it
            found.between = [*([up] if up is not found.total else []), *found.between]
            return _find_end(found, products[0], value)
    return False


def _casts_to(node: Node, dtype: torch.dtype) -> bool:
    value = value_of(node)
    return node.target in CAST and value is not None and value.dtype == dtype


def _inverse_root(square: Node, up: Node, found: Norm) -> Node | None:
    """rsqrt(mean(square) + eps), where `square` is that of `up`; notes eps and what lies between."""
    is_power = square.target is aten.pow.Tensor_Scalar and square.args[1] == 2
    is_product = square.target is aten.mul.Tensor and square.args == (up, up)
    mean = _only_user(square) if is_power or is_product else None
    value = value_of(up)
    assert value is not None
    if mean is None or mean.target is not aten.mean.dim or len(mean.args) != 3 or mean.kwargs or not mean.args[2]:
        return None
    dims = mean.args[1]
    if not isinstance(dims, (list, tuple)) or dims not in ([-1], [value.ndim - 1], (-1,), (value.ndim - 1,)):
        return None
    shifted = _only_user(mean)
    if shifted is None or shifted.target not in (aten.add.Tensor, aten.add.Scalar) or shifted.kwargs:
        return None
    numbers = [each for each in shifted.args if isinstance(each, (int, float))]
    root = _only_user(shifted)
    if len(numbers) != 1 or len(shifted.args) != 2 or root is None or root.target is not aten.rsqrt.default:
        return None
    found.eps = float(numbers[0])
    found.between = [square, mean, shifted, root]
    return root


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _find_end(found: Norm, product: Node, value: torch.Tensor) -> bool:
    """Follows casts and at most one weight from `product`; the last node of the right dtype is the result."""
    chain, weights = [product], [found.weight]
    while (user := _only_user(chain[-1])) is not None:
        weight = _weight_of(user, chain[-1], value, found) if weights[-1] is None else None
        if weight is None and not _casts_to(user, value.dtype):
            break
        chain.append(user)
        weights.append(weight or weights[-1])
    while chain and not _is_like(chain[-1], value):
        chain.pop()
    if not chain:
        return False
    found.norms, found.weight = [chain[-1]], weights[len(chain) - 1]
    found.between += chain
    return True


def _weight_of(node: Node, normalised: Node, value: torch.Tensor, found: Norm) -> Node | None:
    """The weight that `node` multiplies with, if it exists before the sum does; a cast of it is looked through."""
    weight = _other(node, normalised, aten.mul.Tensor)
    if weight is not None and weight.target in CAST and isinstance(weight.args[0], Node):
        weight = weight.args[0]
    return weight if weight is not None and _is_weight(weight, value, found) else None


def _is_weight(weight: Node, value: torch.Tensor, found: Norm) -> bool:
    """Whether it is a vector for rows of `value`, and exists before the sum does."""
    own = value_of(weight)
    if own is None or own.ndim != 1 or own.dtype != value.dtype or own.device != value.device:
        return False
    is_early = weight.op == "placeholder" or weight < found.total
    return is_early and bool(own.shape[0] == value.shape[-1])
