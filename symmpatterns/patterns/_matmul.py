"""What the matmul families share: the frame of a family, and the guard on a matmul."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch._inductor.pattern_matcher import CallFunction, Match, PatternMatcherPass, register_graph_pattern
from torch.fx import Node

from symmpatterns import config, cost_model
from symmpatterns.groups import Group
from symmpatterns.operators._kernels import choice_of
from symmpatterns.patterns._gradients import gradient_problem
from symmpatterns.patterns._product import Matmul, Product, find_product
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import aten, hidden_work, hint, value_of


def apply_template(
    rewriting: Rewriting,
    family: str,
    pattern: CallFunction,
    worthwhile: Callable[[Rewriting, Match], bool],
    rewrite: Callable[..., None],
) -> None:
    """Rewrites every match of `pattern` in the graph that is worth it, unless templates are switched off."""
    if not config.template:
        return
    matches = PatternMatcherPass(pass_name=f"symmpatterns_{family}")
    register_graph_pattern(pattern, extra_check=partial(worthwhile, rewriting), pass_dict=matches)(
        partial(rewrite, rewriting)
    )
    matches.apply(rewriting.graph)


def is_fusable(
    rewriting: Rewriting,
    family: str,
    match: Match,
    reduce_ops: Sequence[str],
    problem_of: Callable[[Product, Group], tuple[str, str] | None],
) -> bool:
    """The guard of the matmul -> collective families.

    A matmul whose product nobody else reads, a reduction out of `reduce_ops`, peers within reach, nothing that
    `problem_of` (code, reason) has against it, and a gain.
    """
    wait = match.output_node()
    start = wait.args[0]
    assert isinstance(start, Node)
    product = find_product(match.kwargs["product"])
    if product is None:
        return False
    group = _reachable_group(rewriting, family, product, start, wait, reduce_ops)
    if group is None:
        return False
    problem = problem_of(product, group)
    if problem is not None:
        return rewriting.decline(start, family, *problem)
    if product.dtypes is None:
        return rewriting.decline(start, family, "dtype", "its input is converted in a way that rounds it twice")
    return pays(rewriting, family, start, product.matmul, size_of(product.matmul), group, product.dtypes[0])


def size_of(matmul: Matmul) -> tuple[int, int, int]:
    """(M, N, K) as the cost model takes them; the rows of a batch are counted together."""
    result, a = value_of(matmul.node), value_of(matmul.a)
    assert result is not None and a is not None
    *rows, columns = (hint(size) for size in result.shape)
    return math.prod(rows), columns, hint(a.shape[-1])


def _reachable_group(
    rewriting: Rewriting, family: str, product: Product, start: Node, wait: Node, reduce_ops: Sequence[str]
) -> Group | None:
    """The group, if the product can be computed in the kernel that reduces it; else declines and returns None."""
    decline = partial(rewriting.decline, start, family)
    value = value_of(start)
    reduce_op, group_name = start.args[1], start.args[-1]
    if (problem := product.matmul.problem()) is not None:
        decline(*problem)
    elif value is None or value.device.type not in ("cpu", "cuda"):
        decline("device", f"there is no symmetric memory on device {value.device if value is not None else None}")
    elif reduce_op not in reduce_ops:
        known = " or ".join(f'"{op}"' for op in reduce_ops)
        decline("reduce_op", f'the kernel reduces with {known}, not with "{reduce_op}"')
    elif (other := _read_elsewhere(product)) is not None:
        decline("producer_has_other_users", f"{other}, so the unreduced product has to exist")
    elif len(start.users) > 1:
        decline("collective_has_other_users", f"{start.name} is used besides its wait")
    elif config.keep_overlap and (hidden := hidden_work(start, wait)) is not None:
        decline("overlapped", f"its wait comes after {hidden}, which hides it already")
    elif (problem := gradient_problem(product.last, start, wait)) is not None:
        decline(*problem)
    else:
        return rewriting.can_reach_peers(start, family, group_name)
    return None


def pays(
    rewriting: Rewriting,
    family: str,
    start: Node,
    matmul: Matmul,
    size: tuple[int, int, int],
    group: Group,
    sent: torch.dtype,
) -> bool:
    """Whether the cost model says that a product of `size` (M, N, K) pays, or is overruled by ``config.force``.

    `sent` is the dtype of what is communicated.
    """
    value, a = value_of(start), value_of(matmul.a)
    assert value is not None and a is not None
    verdict = cost_model.matmul_collective(family, *size, a.dtype, group.world_size, value.device, sent)
    if verdict.fuse or config.force:
        if value.device.type == "cuda":
            rows, columns, inner = size
            moved = rows * inner * a.dtype.itemsize if family == "all_gather_matmul" else rows * columns * sent.itemsize
            sent_bytes = moved // group.world_size
            choice = choice_of(family, size, a.dtype, sent_bytes, group.world_size, value.device)
            rewriting.kernels[start] = str(choice)
        return True
    return rewriting.decline(start, family, "cost_model", verdict.why)


def _read_elsewhere(product: Product) -> str | None:
    for node in [product.matmul.node, *product.views]:
        # What feeds the split is read once: by the split.
        if len(node.users) > 1:
            readers = ", ".join(user.name for user in list(node.users)[:3])
            return f"{node.name} is read by {readers}"
    for node in product.chunks:
        if node.target is not aten.split.Tensor and len(node.users) > 1:
            return f"{node.name} is read by {', '.join(user.name for user in node.users)}"
    return None


def replace(rewriting: Rewriting, family: str, match: Match, product: Product, operator: object, result: Node) -> None:
    """Puts `result`, a call of `operator`, in the place of the product and its collective."""
    wait = match.output_node()
    rewriting.rewrote(wait.args[0], family, "template", operator, producer=product.matmul.node)  # type: ignore[arg-type]
    wait.replace_all_uses_with(result)
    match.erase_nodes()
    for node in [*reversed(product.chunks), *reversed(product.views), product.matmul.node]:
        if not node.users:
            node.graph.erase_node(node)
