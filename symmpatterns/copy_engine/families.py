"""The three GEMM families over a `Relay`; the arguments of each are those of the Triton kernels' `run`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from symmpatterns.copy_engine.relay import Relay
from symmpatterns.triton_kernels import block_sum
from symmpatterns.triton_kernels._plan import Scales
from symmpatterns.workspace import Workspace

_ROWS = 128  # pieces are multiples of this, but for the last
_Cut = tuple[tuple[int, int], ...]  # (first row, rows) of the pieces of a block


class Pieces(NamedTuple):
    """How a block of rows is cut, and who multiplies.

    parts    pieces of a block, if it has so many times _ROWS rows
    tail     rows of the last piece of what is computed last, whose copy nothing hides; 0: no different from the others
    library  the vendor's library multiplies what is sent; 0: the Triton kernel, which leaves some multiprocessors free
    """

    parts: int = 2
    tail: int = 0
    library: int = 1

    @functools.lru_cache(maxsize=1024)  # noqa: B019  (a tuple of numbers)
    def of(self, rows: int, last: bool = False) -> _Cut:
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
    cut = pieces.of(rows)
    with torch.no_grad(), Relay(workspace, world_size * rows * columns * dtype.itemsize) as relay:
        if scatter_dim == 0:
            blocks = _blocks_of_rows(a, b, bias, scales, rows, [cut] * world_size)
        else:
            blocks = _blocks_of_columns(a, b, bias, scales, columns, cut)
        staged = _staged(relay, rank, rows, columns, dtype, cut)
        arrivals = _send_products(relay, workspace, blocks, staged, cut, dtype, bool(pieces.library))
        results = out.split([count for _, count in cut])
        for piece, theirs, result, arrival in zip(blocks[rank], staged[rank], results, arrivals):
            relay.wait(arrival)
            _sum(piece, theirs, result, workspace, op, dtype)


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
    partials = -(-world_size * rows * N * dtype.itemsize // 16) * 16
    cut, last_cut = pieces.of(rows), pieces.of(rows, last=True)
    peers = [(rank + distance) % world_size for distance in range(1, world_size)]
    done = _lengths(M, rows, (last_cut,) * world_size)
    with torch.no_grad(), Relay(workspace, partials + world_size * rows * N * out.element_size()) as relay:
        cuts = [last_cut if owner == rank else cut for owner in range(world_size)]
        blocks = _blocks_of_rows(a, b, bias, scales, rows, cuts)
        staged = _staged(relay, rank, rows, N, dtype, cut, last_cut)
        own = slice(rank * len(last_cut), (rank + 1) * len(last_cut))  # this rank's pieces, which all receive

        def places(owner: int, memory: torch.Tensor) -> Sequence[torch.Tensor]:
            pieces = memory_of(memory, partials, (M, N), out.dtype).split(done)
            return pieces if owner == rank else pieces[own]

        results = relay.view(
            ("results", M, N, dtype, out.dtype, done),
            lambda: [places(owner, memory) for owner, memory in enumerate(relay.peers)],
        )
        outs = out.split(done)
        arrivals = _send_products(relay, workspace, blocks, staged, cut, dtype, bool(pieces.library))
        for index, ((first, count), piece, theirs) in enumerate(zip(last_cut, blocks[rank], staged[rank])):
            relay.wait(arrivals[next(i for i, (start, size) in enumerate(cut) if first + count <= start + size)])
            mine = outs[own][index]
            if mine.shape[0] > 0:
                _sum(piece, theirs, mine, workspace, op, dtype)
            arrived = [peer * len(last_cut) + index for peer in peers]
            relay.send(
                [(results[peer][index], mine) for peer in peers],
                [(outs[here], results[rank][here]) for here in arrived],
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
    results = [out.view(world_size, rows, out.shape[1]).unbind() for out in outs]
    row_scales = [scale_a] * world_size if scale_a is None or scale_a.numel() == 1 else scale_a.split(rows)

    def multiply(shard: torch.Tensor, source: int) -> None:
        for b, bias, scale_b, result in zip(bs, biases, scale_bs, results):
            _product(Piece(shard, b, bias, (row_scales[source], scale_b)), result[source], workspace, True)

    with torch.no_grad(), Relay(workspace, world_size * rows * K * a.element_size()) as relay:
        shards = relay.view(
            ("shards", rows, K, a.dtype),
            lambda: [memory_of(peer, 0, (world_size, rows, K), a.dtype).unbind() for peer in relay.peers],
        )
        whole = None if gathered is None else gathered.view(world_size, rows, K).unbind()
        arrivals = []
        for distance in range(1, world_size):
            source = (rank - distance) % world_size
            kept = [] if whole is None else [(whole[source], shards[rank][source])]
            if whole is not None and distance == world_size - 1:
                kept.append((whole[rank], a))
            arrivals.append(relay.send([(shards[(rank + distance) % world_size][rank], a)], kept, ready=True))
        multiply(a, rank)
        for distance, arrival in enumerate(arrivals, start=1):
            source = (rank - distance) % world_size
            relay.wait(arrival)
            multiply(shards[rank][source], source)


def implementation_of(op: str, options: dict[str, int]) -> Callable[..., None]:
    """The family of that name, with `options` of Pieces; an all-gather sends its shard in one piece."""
    if op == "all_gather_matmul":
        return all_gather_matmul
    families: dict[str, Callable[..., None]] = {
        "matmul_all_reduce": matmul_all_reduce,
        "matmul_reduce_scatter": matmul_reduce_scatter,
    }
    return functools.partial(families[op], pieces=Pieces(**options))


class Piece(NamedTuple):
    """The operands of some rows of a product."""

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    scales: Scales


# Views are made many at a time: each call of torch's costs the host as much as it costs to start a kernel.


def _blocks_of_rows(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    scales: Scales,
    rows: int,
    cuts: Sequence[_Cut],
) -> list[list[Piece]]:
    """For each owner the pieces, cut as `cuts` says, of its `rows` rows of the product, as far as a has them."""
    lengths = _lengths(a.shape[0], rows, tuple(cuts))
    scale_a, scale_b = scales
    by_row = scale_a is not None and scale_a.numel() > 1
    row_scales = scale_a.split(lengths) if scale_a is not None and by_row else [scale_a] * len(lengths)
    pieces = iter([Piece(part, b, bias, (scale, scale_b)) for part, scale in zip(a.split(lengths), row_scales)])
    return [[next(pieces) for _ in cut] for cut in cuts]


def _blocks_of_columns(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, scales: Scales, columns: int, cut: _Cut
) -> list[list[Piece]]:
    """For each owner the pieces, cut as `cut` says, of the product with its columns of b."""
    (whole,) = _blocks_of_rows(a, b, bias, scales, a.shape[0], [cut])
    parts = b.split(columns, 1)
    biases = [None] * len(parts) if bias is None else bias.split(columns)
    scale_b = scales[1]
    by_column = scale_b is not None and scale_b.numel() > 1
    column_scales = scale_b.split(columns) if scale_b is not None and by_column else [scale_b] * len(parts)
    return [
        [Piece(piece.a, part, bias_part, (piece.scales[0], scale)) for piece in whole]
        for part, bias_part, scale in zip(parts, biases, column_scales)
    ]


@functools.lru_cache(maxsize=1024)
def _lengths(M: int, rows: int, cuts: tuple[_Cut, ...]) -> tuple[int, ...]:
    """How many of M rows each piece has, of one block of `rows` rows after the other; the last ones may have none."""
    starts = [owner * rows + first for owner, cut in enumerate(cuts) for first, _ in cut]
    counts = [count for cut in cuts for _, count in cut]
    return tuple(min(max(M - start, 0), count) for start, count in zip(starts, counts))


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
    cut: _Cut,
    own_cut: _Cut | None = None,
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
    blocks: Sequence[Sequence[Piece]],
    staged: Sequence[Sequence[torch.Tensor]],
    cut: _Cut,
    dtype: torch.dtype,
    library: bool,
) -> list[int | None]:
    """Computes the peers' blocks and sends them piece by piece; when all of them have arrived, for each piece."""
    rank, world_size = workspace.rank, workspace.world_size
    arrivals: list[int | None] = []
    for distance in range(1, world_size):
        owner = (rank + distance) % world_size
        arrivals = []
        present = [piece.a.shape[0] for piece in blocks[owner]]
        first = blocks[owner][0]
        product = relay.hold(first.a.new_empty(sum(present), first.b.shape[1], dtype=dtype)).split(present)
        for count, piece, part, target, (_, wanted) in zip(present, blocks[owner], product, staged[owner], cut):
            if count > 0:
                _product(piece, part, workspace, library)
                arrivals.append(relay.send([(target if count == wanted else target[:count], part)]))
            else:  # a short block, of rows that do not divide: the ranks meet all the same
                arrivals.append(relay.send([]))
    return arrivals


def _sum(
    piece: Piece, staged: torch.Tensor, out: torch.Tensor, workspace: Workspace, op: str, dtype: torch.dtype
) -> None:
    """out = the sum over ranks of a piece of the own block; `staged` has at least its rows."""
    block_sum.run(*piece, staged, out, workspace, op, dtype)


def _product(piece: Piece, out: torch.Tensor, workspace: Workspace, library: bool) -> None:
    """out = a @ b + bias; by the vendor's `library` where that has a routine for it, else by the Triton kernel."""
    a, b, bias, scales = piece
    if not library:
        block_sum.run(*piece, None, out, workspace)
    elif a.dtype != out.dtype:
        if not _scaled_product(a, b, bias, scales, out):
            block_sum.run(*piece, None, out, workspace)
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
