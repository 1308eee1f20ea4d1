"""The three GEMM families over a `Relay`; the arguments of each are those of the Triton kernels' `run`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from symmpatterns.copy_engine.relay import Relay
from symmpatterns.triton_kernels import barrier, block_sum
from symmpatterns.triton_kernels._plan import Scales
from symmpatterns.workspace import Workspace

_ROWS = 128  # pieces are multiples of this, but for the last


class Pieces(NamedTuple):
    """How a block of rows is cut, and who multiplies.

    parts    pieces of a block, if it has so many times _ROWS rows
    tail     rows of the last piece of what is computed last, whose copy nothing hides; 0: no different from the others
    library  the vendor's library multiplies what is sent; 0: the Triton kernel, which leaves some multiprocessors free
    """

    parts: int = 2
    tail: int = 0
    library: int = 1

    def of(self, rows: int, last: bool = False) -> tuple[tuple[int, int], ...]:
        """(first row, rows) of each piece of a block; at least one, and the same on all ranks for equal `rows`."""
        step = max(-(-rows // (self.parts * _ROWS)), 1) * _ROWS
        cut = [(first, min(step, rows - first)) for first in range(0, rows, step)] or [(0, 0)]
        if last and 0 < self.tail < cut[-1][1]:
            first, count = cut.pop()
            cut += [(first, count - self.tail), (first + count - self.tail, self.tail)]
        return tuple(cut)


def matmul_reduce_scatter(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: Workspace,
    op: str,
    scatter_dim: int = 0,
    scales: Scales = (None, None),
    partial: torch.dtype | None = None,
    *,
    pieces: Pieces,
) -> None:
    """out = this rank's block, of rows (scatter_dim 0) or columns, of the sum over ranks of a[M, K] @ b[K, N] + bias[N]."""
    rank, world_size = workspace.rank, workspace.world_size
    dtype = partial or out.dtype
    rows, columns = out.shape
    blocks = [_block(a, b, bias, scales, owner, rows, columns, scatter_dim) for owner in range(world_size)]
    cut = pieces.of(rows)
    with torch.no_grad(), Relay(workspace, world_size * rows * columns * dtype.itemsize) as relay:
        staged = _staged(relay, rank, rows, columns, dtype, cut)
        arrivals = _send_products(relay, workspace, blocks, staged, cut, dtype, bool(pieces.library))
        for (first, count), theirs, arrival in zip(cut, staged[rank], arrivals):
            relay.wait(arrival)
            _sum(blocks[rank], first, count, theirs, out.narrow(0, first, count), workspace, op, dtype)


def matmul_all_reduce(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: Workspace,
    op: str,
    scales: Scales = (None, None),
    partial: torch.dtype | None = None,
    *,
    pieces: Pieces,
) -> None:
    """out = the sum over ranks of a[M, K] @ b[K, N] + bias[N]; each rank sums ceil(M / W) rows and sends them to all."""
    rank, world_size = workspace.rank, workspace.world_size
    dtype = partial or out.dtype
    M, N = out.shape
    rows = -(-M // world_size)
    blocks = [_block(a, b, bias, scales, owner, rows, N, 0) for owner in range(world_size)]
    partials = -(-world_size * rows * N * dtype.itemsize // 16) * 16
    cut, last_cut = pieces.of(rows), pieces.of(rows, last=True)
    peers = [(rank + distance) % world_size for distance in range(1, world_size)]
    with torch.no_grad(), Relay(workspace, partials + world_size * rows * N * out.element_size()) as relay:
        staged = _staged(relay, rank, rows, N, dtype, cut, last_cut)
        results = relay.view(
            ("results", rows, N, dtype, out.dtype),
            lambda: [memory_of(peer, partials, (world_size * rows, N), out.dtype) for peer in relay.peers],
        )
        arrivals = _send_products(relay, workspace, blocks, staged, cut, dtype, bool(pieces.library))
        for (first, count), theirs in zip(last_cut, staged[rank]):
            relay.wait(arrivals[next(i for i, (start, size) in enumerate(cut) if first + count <= start + size)])
            mine = _clip(rank * rows + first, count, M)
            done = out[mine]
            if mine.stop > mine.start:
                _sum(blocks[rank], first, mine.stop - mine.start, theirs, done, workspace, op, dtype)
            arrived = [_clip(peer * rows + first, count, M) for peer in peers]
            relay.send(
                [(results[peer][mine], done) for peer in peers],
                [(out[here], results[rank][here]) for here in arrived],
            )


def all_gather_matmul(
    a: torch.Tensor,
    bs: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    gathered: torch.Tensor | None,
    workspace: Workspace,
    gather_dim: int = 0,
    biases: Sequence[torch.Tensor | None] | None = None,
    scale_a: torch.Tensor | None = None,
    scale_bs: Sequence[torch.Tensor | None] | None = None,
) -> None:
    """outs[i] = all_gather(a) @ bs[i] + biases[i], gathered = all_gather(a), of shards that are rows (gather_dim 0)."""
    assert gather_dim == 0
    rank, world_size = workspace.rank, workspace.world_size
    rows, K = a.shape
    a = a.contiguous()
    biases, scale_bs = biases or [None] * len(bs), scale_bs or [None] * len(bs)

    def multiply(shard: torch.Tensor, source: int) -> None:
        here = slice(source * rows, (source + 1) * rows)
        row_scales = scale_a if scale_a is None or scale_a.numel() == 1 else scale_a[here]
        for b, bias, scale_b, out in zip(bs, biases, scale_bs, outs):
            _product(shard, b, bias, (row_scales, scale_b), out[here], workspace, True)

    with torch.no_grad(), Relay(workspace, world_size * rows * K * a.element_size()) as relay:
        shards = relay.view(
            ("shards", rows, K, a.dtype),
            lambda: [memory_of(peer, 0, (world_size, rows, K), a.dtype).unbind() for peer in relay.peers],
        )
        whole = [None] * world_size if gathered is None else gathered.chunk(world_size)
        arrivals = []
        for distance in range(1, world_size):
            source = (rank - distance) % world_size
            kept = whole[source]
            received = [] if kept is None else [(kept, shards[rank][source])]
            arrivals.append(relay.send([(shards[(rank + distance) % world_size][rank], a)], received))
        multiply(a, rank)
        for distance, arrival in enumerate(arrivals, start=1):
            source = (rank - distance) % world_size
            relay.wait(arrival)
            multiply(shards[rank][source], source)
        if gathered is not None:
            gathered.narrow(0, rank * rows, rows).copy_(a)


def implementation_of(op: str, options: dict[str, int]) -> Callable[..., None]:
    """The family of that name, with `options` of Pieces; an all-gather sends its shard in one piece."""
    if op == "all_gather_matmul":
        return all_gather_matmul
    families: dict[str, Callable[..., None]] = {
        "matmul_all_reduce": matmul_all_reduce,
        "matmul_reduce_scatter": matmul_reduce_scatter,
    }
    return functools.partial(families[op], pieces=Pieces(**options))


def kernels_of(op: str, options: dict[str, int]) -> Callable[..., None]:
    """`implementation_of` for a workspace that only compiles: the Triton kernels of such a call, and no copies.

    They are the barrier, the block sums, and what multiplies a piece where the library does not.
    """
    if op == "all_gather_matmul":
        return _kernels_of_gather
    return functools.partial(_kernels_of_reduction, op, Pieces(**options))


def _kernels_of_gather(
    a: torch.Tensor,
    bs: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    workspace: Workspace,
    biases: Sequence[torch.Tensor | None],
    scale_a: torch.Tensor | None,
    scale_bs: Sequence[torch.Tensor | None],
    **form: object,
) -> None:
    barrier.run(workspace)
    shard = slice(0, a.shape[0])
    for b, bias, scale_b, out in zip(bs, biases, scale_bs, outs):
        _product(a.contiguous(), b, bias, (_part(scale_a, shard), scale_b), out[shard], workspace, True)


def _kernels_of_reduction(
    family: str,
    pieces: Pieces,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: Workspace,
    op: str,
    *form: Any,
) -> None:
    scatters = family == "matmul_reduce_scatter"
    scatter_dim, scales, partial = form if scatters else (0, *form)
    rows, columns = out.shape
    if not scatters:
        rows = -(-rows // workspace.world_size)
        out = out[_clip(workspace.rank * rows, rows, out.shape[0])]
    dtype = partial or out.dtype
    block = _block(a, b, bias, scales, workspace.rank, rows, columns, scatter_dim)
    staged = out.new_empty(workspace.world_size, rows, columns, dtype=dtype)
    barrier.run(workspace)
    for first, count in pieces.of(rows, last=not scatters):
        here = _clip(first, count, out.shape[0])
        if here.stop > here.start:
            count = here.stop - here.start
            _sum(block, first, count, staged.narrow(1, first, count), out[here], workspace, op, dtype)
            part = out.new_empty(count, columns, dtype=dtype)
            theirs = _rows_of(block.scales, first, count)
            _product(block.a[here], block.b, block.bias, theirs, part, workspace, bool(pieces.library))


class _Block(NamedTuple):
    """The operands of the block of a product that one rank owns."""

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    scales: Scales


def _block(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    scales: Scales,
    owner: int,
    rows: int,
    columns: int,
    scatter_dim: int,
) -> _Block:
    """Rows owner * rows ... of a, or columns owner * columns ... of b, with what belongs to them."""
    scale_a, scale_b = scales
    if scatter_dim == 0:
        here = slice(owner * rows, (owner + 1) * rows)
        return _Block(a[here], b, bias, (_part(scale_a, here), scale_b))
    here = slice(owner * columns, (owner + 1) * columns)
    return _Block(a, b[:, here], None if bias is None else bias[here], (scale_a, _part(scale_b, here)))


def _part(scale: torch.Tensor | None, here: slice) -> torch.Tensor | None:
    return scale if scale is None or scale.numel() == 1 else scale[here]


def _clip(first: int, count: int, limit: int) -> slice:
    return slice(min(first, limit), min(first + count, limit))


def memory_of(memory: torch.Tensor, first: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`shape` of `dtype` in a rank's memory, from byte `first` on."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    return memory[first : first + size].view(dtype).view(shape)


def _staged(
    relay: Relay,
    rank: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    cut: tuple[tuple[int, int], ...],
    own_cut: tuple[tuple[int, int], ...] | None = None,
) -> list[list[torch.Tensor]]:
    """For every rank the places of the pieces of its block in its memory: of this rank's products in the peers' (`cut`),
    [rows, columns] each, and of all ranks' in the own memory (`own_cut`, default `cut`), [W, rows, columns] each."""

    def make() -> list[list[torch.Tensor]]:
        shape = (len(relay.peers), rows, columns)
        blocks = [memory_of(peer, 0, shape, dtype) for peer in relay.peers]
        return [
            [block.narrow(1, *piece) for piece in own_cut or cut]
            if owner == rank
            else [block[rank].narrow(0, *piece) for piece in cut]
            for owner, block in enumerate(blocks)
        ]

    return relay.view(("staged", rows, columns, dtype, cut, own_cut), make)


def _send_products(
    relay: Relay,
    workspace: Workspace,
    blocks: Sequence[_Block],
    staged: Sequence[Sequence[torch.Tensor]],
    cut: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    library: bool,
) -> list[torch.cuda.Event | None]:
    """Computes the peers' blocks and sends them piece by piece; when all of them have arrived, for each piece."""
    rank, world_size = workspace.rank, workspace.world_size
    arrivals: list[torch.cuda.Event | None] = []
    for distance in range(1, world_size):
        owner = (rank + distance) % world_size
        block = blocks[owner]
        arrivals = []
        rows = block.a.shape[0]
        product = relay.hold(block.a.new_empty(rows, block.b.shape[1], dtype=dtype))
        for (first, count), target in zip(cut, staged[owner]):
            present = min(count, rows - first)
            if present > 0:
                part = product.narrow(0, first, present)
                scales = _rows_of(block.scales, first, present)
                _product(block.a.narrow(0, first, present), block.b, block.bias, scales, part, workspace, library)
                arrivals.append(relay.send([(target if present == count else target[:present], part)]))
            else:  # a short block, of rows that do not divide: the ranks meet all the same
                arrivals.append(relay.send([]))
    return arrivals


def _rows_of(scales: Scales, first: int, count: int) -> Scales:
    return _part(scales[0], slice(first, first + count)), scales[1]


def _sum(
    block: _Block,
    first: int,
    count: int,
    staged: torch.Tensor,
    out: torch.Tensor,
    workspace: Workspace,
    op: str,
    dtype: torch.dtype,
) -> None:
    """out = the sum over ranks of `count` rows of the own block; `staged` has at least so many."""
    scales = _rows_of(block.scales, first, count)
    block_sum.run(block.a.narrow(0, first, count), block.b, block.bias, scales, staged, out, workspace, op, dtype)


def _product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    scales: Scales,
    out: torch.Tensor,
    workspace: Workspace,
    library: bool,
) -> None:
    """out = a @ b + bias; by the vendor's `library` where that has a routine for it, else by the Triton kernel."""
    if not library:
        block_sum.run(a, b, bias, scales, None, out, workspace)
    elif a.dtype != out.dtype:
        if not _scaled_product(a, b, bias, scales, out):
            block_sum.run(a, b, bias, scales, None, out, workspace)
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _scaled_product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, scales: Scales, out: torch.Tensor
) -> bool:
    """out = a @ b + bias of float8 operands, if the library's routine takes them; whether it did.

    It takes b column by column, K and N that are multiples of 16, scales of the whole matrices or of each row and column,
    and gives bfloat16.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    scale_a, scale_b = scales
    if scale_a is None or scale_b is None or out.dtype != torch.bfloat16 or rows == 0:
        return False
    if bias is not None and bias.dtype != torch.bfloat16:
        return False
    if inner % 16 or columns % 16 or a.stride(1) != 1 or b.stride(0) != 1 or not out.is_contiguous():
        return False
    if scale_a.numel() != 1 or scale_b.numel() != 1:
        scale_a, scale_b = scale_a.reshape(-1, 1).expand(rows, 1), scale_b.reshape(1, -1).expand(1, columns)
        scale_a, scale_b = scale_a.contiguous(), scale_b.contiguous()
    torch.ops.aten._scaled_mm.out(a, b, scale_a, scale_b, bias, None, out.dtype, False, out=out)
    return True
