"""How graphs gather and scatter along a dimension other than the first: with a copy on this rank's side.

::

    wait(all_gather(x))  ->  split(.., n)  ->  cat([part 0, part 1, ...], d)  ->  what the program asked for
    x  ->  split(x, n, d)  ->  cat([part 0, part 1, ...], 0)  ->  reduce_scatter(..)

Whoever stores to peers itself can leave both copies out.
"""

from __future__ import annotations

import operator

from torch.fx import Node

from symmpatterns.patterns._vocabulary import aten, something_mutates, value_of


def joined(wait: Node, world_size: int) -> tuple[Node, int, list[Node]]:
    """(result, d, nodes): `result` has along `d` what `wait`, the result of an all-gather, has along dimension 0.

    `nodes` are those between the two, which nobody else reads. ``(wait, 0, [])`` when nothing is joined.
    """
    users = list(wait.users)
    if len(users) == 1 and _cuts(users[0]) == 0:
        split = users[0]
        cats = {user for part in split.users for user in part.users}
        cat = cats.pop() if len(cats) == 1 else None
        if cat is not None and _parts_of(cat, world_size) is split:
            dim = cat.args[1] if len(cat.args) > 1 else 0
            value = value_of(cat)
            if isinstance(dim, int) and value is not None:
                return cat, dim % value.ndim, [*split.users, split]
    return wait, 0, []


def cut(source: Node, start: Node, world_size: int) -> tuple[Node, int, list[Node]]:
    """(tensor, d, nodes): `source`, which the reduce-scatter `start` takes, has along dimension 0 the parts that
    `tensor` has along `d`.

    `nodes` are between the two, and others may read them. ``(source, 0, [])`` when nothing was cut.
    """
    split = _parts_of(source, world_size)
    if split is not None and source.args[1:] in ((), (0,)):
        tensor, dim = split.args[0], _cuts(split)
        if dim is not None and isinstance(tensor, Node) and not something_mutates(split, start):
            return tensor, dim, [source, *split.users, split]
    return source, 0, []


def _cuts(node: Node) -> int | None:
    """Along which dimension `node` is a split, or None."""
    value = value_of(node.args[0]) if node.target is aten.split.Tensor and isinstance(node.args[0], Node) else None
    dim = node.args[2] if len(node.args) > 2 else 0
    return dim % value.ndim if value is not None and isinstance(dim, int) else None


def _parts_of(cat: Node, count: int) -> Node | None:
    """The split all of whose `count` parts `cat` puts together, in order, or None.

    Along another dimension than the split's only equal parts can be put together; along the same, nothing is moved.
    """
    parts = cat.args[0] if cat.target is aten.cat.default else None
    if not isinstance(parts, (list, tuple)) or len(parts) != count:
        return None
    splits = set()
    for index, part in enumerate(parts):
        if not isinstance(part, Node) or part.target is not operator.getitem or part.args[1] != index:
            return None
        splits.add(part.args[0])
    (split, *others) = splits
    values = split.meta.get("val") if isinstance(split, Node) and not others else None
    return split if values is not None and len(values) == count else None  # type: ignore[return-value]
