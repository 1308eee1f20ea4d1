"""Generated programs: any producer, any collective, any consumer; matmuls beside collectives, several groups, gradients.

A program is a few steps on a growing list of matrices of one shape; each step takes earlier ones, so results are read
at once and late, several times and not at all. It is drawn from a seed, the same on every rank, and compared with
itself in eager mode, with gloo.

    python -m tests.programs 0 500 --ranks 2          # runs these seeds; prints those that fail, for programs.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

import symmpatterns
from symmpatterns import compat, config
from symmpatterns.report import Record
from symmpatterns.testing import run_ranks
from tests.allocation_operators import relaxed, sum_ranks

warnings.filterwarnings("ignore", category=FutureWarning)

COLUMNS = 6
Group = Any  # a process group of as many ranks as the world


@dataclass(frozen=True)
class Shape:
    """What the programs of one kind look like."""

    steps: int = 5
    dtype: torch.dtype = torch.float32
    dynamic: bool = False
    matmuls: bool = True  # also matmuls beside collectives, declared collectives, and a second group
    gradients: bool = False
    ships: bool = False  # in the configuration that ships: nothing forced, overlap kept


PRODUCERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pointwise": lambda a, b: F.gelu(a) + b,
    "softmax": lambda a, b: torch.softmax(a, -1) * b,
    "rms_norm": lambda a, b: F.rms_norm(a, (a.shape[-1],)),
    "layer_norm": lambda a, b: F.layer_norm(a + b, (a.shape[-1],)),
    "embedding": lambda a, b: F.embedding((b[:, 0].abs() * 10).long() % a.shape[0], a),
    "cat": lambda a, b: torch.cat([a[1:], b[:1]]),
    "transposed": lambda a, b: (a.t() * 2).t().contiguous() - b,
    "columns": lambda a, b: a - b.mean(0, keepdim=True),
    "where": lambda a, b: torch.where(a > b, a, b * 2),
    "view": lambda a, b: a.view(-1).flip(0).view_as(b),
    "nothing": lambda a, b: a,
}
MORE_PRODUCERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "in place": lambda a, b: a.clone().mul_(0.5).add_(b),
    "scan": lambda a, b: torch.cumsum(a, 0) * 0.1 - b,
    "sorted": lambda a, b: a.sort(-1).values + b,
    "scattered": lambda a, b: a.scatter_add(1, (b.abs() * 10).long() % a.shape[1], b),
    "product": lambda a, b: a @ torch.tanh(b[: a.shape[1]].sum(0, keepdim=True).expand(a.shape[1], -1)),
    "strided": lambda a, b: torch.stack([a, b], 1)[:, 1],
    "pooled": lambda a, b: a + b.amax(-1, keepdim=True) - a.sum(),
    "expanded": lambda a, b: b[:1].expand_as(a),
    "masked": lambda a, b: a.masked_fill(b < 0, 0.25),
    "gathered": lambda a, b: torch.gather(a, 1, (b.abs() * 10).long() % a.shape[1]),
    "selected": lambda a, b: a.index_select(0, (b[:, 0].abs() * 10).long() % a.shape[0]),
    "largest": lambda a, b: torch.topk(a, a.shape[1] - 2).values.repeat(1, 2)[:, : a.shape[1]] - b,
    "quantised": lambda a, b: _scaled(*_quantised(a)).to(a.dtype) + b,
    "attention": lambda a, b: F.scaled_dot_product_attention(a[None], b[None], b[None])[0],
    "convolution": lambda a, b: F.conv1d(a.unsqueeze(1), b[:1, :3].unsqueeze(1), padding=1).squeeze(1),
    "own rows": lambda a, b: a * _own_rows(a).softmax(0).amax() + b,
}
NOT_DIFFERENTIABLE = ("embedding", "scattered", "sorted", "gathered", "selected", "largest", "quantised")
# Where a value rounded otherwise gives quite another result, as bfloat16 is in compiled programs, by symmpatterns or not.
WITH_JUMPS = (
    "embedding", "where", "scattered", "gathered", "selected", "masked", "quantised", "all_reduce ints",
    "all_gather flags", "all_gather quantised", "vocab-parallel embedding",
)  # fmt: skip
COLLECTIVES: dict[str, Callable[[Tensor, Group], Tensor]] = {
    "all_reduce sum": lambda t, g: funcol.all_reduce(t, "sum", g),
    "all_reduce max": lambda t, g: funcol.all_reduce(t, "max", g),
    "all_gather rows": lambda t, g: funcol.all_gather_tensor(t, 0, g)[-t.shape[0] :],
    "all_gather columns": lambda t, g: funcol.all_gather_tensor(t, 1, g)[:, ::2][:, : t.shape[1]],
    "reduce_scatter rows": lambda t, g: funcol.reduce_scatter_tensor(t.repeat(g.size(), 1), "sum", 0, g),
    "reduce_scatter columns": lambda t, g: funcol.reduce_scatter_tensor(
        torch.cat([t + n for n in range(g.size())], 1), "sum", 1, g
    ),
    "all_to_all": lambda t, g: funcol.all_to_all_single(t, None, None, g),
    "broadcast": lambda t, g: funcol.broadcast(t, 1, g),
    "all_reduce ints": lambda t, g: funcol.all_reduce((t * 4).int(), "sum", g) * 0.25,
    "all_reduce rows": lambda t, g: funcol.all_reduce(t.sum(-1), "sum", g)[:, None] + t,
    "all_reduce min": lambda t, g: funcol.all_reduce(t, "min", g),
    "all_reduce avg": lambda t, g: funcol.all_reduce(t, "avg", g),
    "all_reduce product": lambda t, g: funcol.all_reduce(torch.tanh(t), "product", g),
    "all_reduce scalar": lambda t, g: funcol.all_reduce(t.mean(), "sum", g) * t,
    "all_reduce coalesced": lambda t, g: _sum(funcol.all_reduce_coalesced([t, t.sum()], "sum", g)),
    "all_gather in 3-D": lambda t, g: funcol.all_gather_tensor(_in_3d(t, g), 2, g)[..., :: g.size()].reshape(t.shape),
    "all_gather coalesced": lambda t, g: _sum(
        part[: t.shape[0]] for part in funcol.all_gather_into_tensor_coalesced([t, t.sum(-1, keepdim=True)], g)
    ),
    "all_gather flags": lambda t, g: torch.where(funcol.all_gather_tensor(t > 0, 0, g)[-t.shape[0] :], t, -t),
    "all_gather quantised": lambda t, g: _scaled(*_gathered(*_quantised(t), g))[: t.shape[0]],
    "reduce_scatter in 3-D": lambda t, g: funcol.reduce_scatter_tensor(
        _in_3d(t, g).repeat(1, 1, g.size()), "max", 2, g
    ).reshape(t.shape),
    "reduce_scatter coalesced": lambda t, g: _sum(
        funcol.reduce_scatter_tensor_coalesced([t.repeat(g.size(), 1), t.repeat(1, g.size())], "sum", [0, 1], g)
    ),
    "all_to_all splits": lambda t, g: funcol.all_to_all_single(t, _splits(t, g), _splits(t, g), g),
}
# The last argument is a matrix [COLUMNS, COLUMNS].
MATMULS: dict[str, Callable[[Tensor, Group, Tensor], Tensor]] = {
    "mm, all_reduce": lambda t, g, w: funcol.all_reduce(t @ w, "sum", g),
    "addmm, all_reduce": lambda t, g, w: funcol.all_reduce(F.linear(t, w, w[0]), "sum", g),
    "mm in 3-D, all_reduce avg": lambda t, g, w: funcol.all_reduce(
        F.linear(t.view(g.size(), -1, t.shape[1]), w), "avg", g
    ).view_as(t),
    "mm, reduce_scatter rows": lambda t, g, w: funcol.reduce_scatter_tensor(t.repeat(g.size(), 1) @ w, "sum", 0, g),
    "mm, reduce_scatter columns": lambda t, g, w: funcol.reduce_scatter_tensor(t @ w.repeat(1, g.size()), "sum", 1, g),
    "all_gather rows, mm": lambda t, g, w: (funcol.all_gather_tensor(t, 0, g) @ w)[: t.shape[0]],
    "all_gather rows, two mm": lambda t, g, w: _two_products(funcol.all_gather_tensor(t, 0, g), w, t.shape[0]),
    "all_gather columns, mm": lambda t, g, w: funcol.all_gather_tensor(t, 1, g) @ w.repeat(g.size(), 1),
    "mm used twice": lambda t, g, w: _used_twice(t @ w, g),
    "all_reduce, rms_norm": lambda t, g, w: F.rms_norm(funcol.all_reduce(t, "sum", g), (t.shape[1],), w[0]),
    "all_reduce, add, rms_norm": lambda t, g, w: _normalised(funcol.all_reduce(t * 2, "sum", g) + t, w),
    "all_reduce, rms_norm by hand": lambda t, g, w: _by_hand(funcol.all_reduce(t + w[0], "avg", g), w),
    "declared": lambda t, g, w: sum_ranks(t * w[0], g.group_name),
    "declared of a product": lambda t, g, w: sum_ranks(t @ w, g.group_name),
    "vocab-parallel embedding": lambda t, g, w: funcol.all_reduce(_embedded(t, g, w), "sum", g),
    "two all_reduces": lambda t, g, w: funcol.all_reduce(t * w[1], "sum", g) - funcol.all_reduce(t - w[2], "max", g),
}
# What has a derivative in eager mode too.
DIFFERENTIABLE: dict[str, Callable[[Tensor, Group, Tensor], Tensor]] = {
    "all_gather rows": lambda t, g, w: funcol.all_gather_tensor_autograd(t, 0, g)[-t.shape[0] :],
    "reduce_scatter rows": lambda t, g, w: funcol.reduce_scatter_tensor_autograd(t.repeat(g.size(), 1), "sum", 0, g),
    "all_to_all": lambda t, g, w: funcol.all_to_all_single_autograd(t, None, None, g),
    "mm, reduce_scatter rows": lambda t, g, w: funcol.reduce_scatter_tensor_autograd(
        t.repeat(g.size(), 1) @ w, "sum", 0, g
    ),
    "all_gather rows, mm": lambda t, g, w: (funcol.all_gather_tensor_autograd(t, 0, g) @ w)[: t.shape[0]],
    "all_gather rows, two mm": lambda t, g, w: _two_products(funcol.all_gather_tensor_autograd(t, 0, g), w, t.shape[0]),
    "declared": lambda t, g, w: sum_ranks(t * w[0], g.group_name),
}


def _quantised(t: Tensor) -> tuple[Tensor, Tensor]:
    scale = t.float().abs().amax(-1, keepdim=True).clamp(min=1e-3) / 448
    return (t.float() / scale).to(torch.float8_e4m3fn), scale


def _scaled(q: Tensor, scale: Tensor) -> Tensor:
    return q.float() * scale


def _gathered(q: Tensor, scale: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """gloo does not send float8."""
    rows = funcol.all_gather_tensor(q.view(torch.uint8), 0, group).view(q.dtype)
    return rows, funcol.all_gather_tensor(scale, 0, group)


def _own_rows(t: Tensor) -> Tensor:
    """Another number of rows on every rank."""
    return torch.arange(3 + 3000 * dist.get_rank(), device=t.device).to(t.dtype).sin()


def _sum(parts: Iterable[Tensor]) -> Tensor:
    first, *others = parts
    return sum(others, first)


def _in_3d(t: Tensor, group: Group) -> Tensor:
    return t.view(group.size(), -1, t.shape[1])


def _splits(t: Tensor, group: Group) -> list[int]:
    """As many rows for rank p of rank r as for r of p, and not the same for all."""
    size, rank = group.size(), group.rank()
    return [t.shape[0] - size + 1 if (rank + peer) % size == 0 else 1 for peer in range(size)]


def _embedded(t: Tensor, group: Group, w: Tensor) -> Tensor:
    """Rows of `w`, this rank's part of a table, for tokens made of `t`; zero for tokens of the other ranks."""
    rows = w.shape[0]
    tokens = (t[:, 0].abs() * 100).long() % (rows * group.size()) - rows * group.rank()
    mine = (tokens >= 0) & (tokens < rows)
    return torch.where(mine[:, None], F.embedding(tokens.clamp(0, rows - 1), w), 0)


def _two_products(gathered: Tensor, w: Tensor, rows: int) -> Tensor:
    return (gathered @ w)[:rows] + torch.tanh(gathered @ w.t())[-rows:] + gathered[:rows]


def _normalised(total: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(total, (total.shape[1],), w[0]) + total.relu()


def _by_hand(total: Tensor, w: Tensor) -> Tensor:
    up = total.float()
    return (up * torch.rsqrt(up.pow(2).mean(-1, keepdim=True) + 1e-5)).to(total.dtype) * w[1]


def _used_twice(product: Tensor, group: Group) -> Tensor:
    return funcol.all_reduce(product, "sum", group) + product


# family: a collective that it takes
TAKEN_BY = {
    "matmul_all_reduce": "mm, all_reduce",
    "matmul_reduce_scatter": "mm, reduce_scatter rows",
    "all_gather_matmul": "all_gather rows, mm",
    "all_reduce_rms_norm": "all_reduce, add, rms_norm",
    "peer_collectives": "all_reduce max",
    "allocation": "declared",
}


@dataclass(frozen=True)
class Program:
    """steps     (producer, collective, numbers of three earlier matrices, whether over the second group), one a new matrix
    returned  numbers of the matrices that are results

    Matrices 0 and 1 are given. A call takes two matrices, a square one and two groups.
    """

    steps: Sequence[tuple[str, str, int, int, int, bool]]
    returned: Sequence[int]

    def __call__(self, a: Tensor, b: Tensor, w: Tensor, groups: Sequence[Group]) -> list[Tensor]:
        values = [a, b]
        for producer, collective, first, second, third, other in self.steps:
            sent = ALL_PRODUCERS[producer](values[first], values[second])
            if not TAKES_STRIDES:
                sent = sent.contiguous()
            result = ALL_COLLECTIVES[a.requires_grad][collective](sent, groups[int(other)], w)
            values.append(torch.tanh(result.to(a.dtype)) + values[third])
        return [values[i] for i in self.returned]

    def __str__(self) -> str:
        lines = [
            f"#{2 + i} = {c}({p}(#{x}, #{y})){' over the second group' if other else ''} + #{z}"
            for i, (p, c, x, y, z, other) in enumerate(self.steps)
        ]
        return "\n".join([*lines, f"returns {list(self.returned)}"])


TAKES_STRIDES = compat.torch_version() >= (2, 13)  # eager collectives of torch 2.11 want contiguous tensors
ALL_PRODUCERS = {**PRODUCERS, **MORE_PRODUCERS}
_PLAIN = {name: (lambda t, g, w, c=c: c(t, g)) for name, c in COLLECTIVES.items()}
ALL_COLLECTIVES = {False: {**_PLAIN, **MATMULS}, True: DIFFERENTIABLE}  # with gradients?


def draw(seed: int, shape: Shape) -> Program:
    """The program of a seed; another one as soon as a table above has grown."""
    choose = random.Random(seed)
    producers = list(ALL_PRODUCERS if shape.matmuls else PRODUCERS)
    if shape.gradients:
        producers = [name for name in producers if name not in NOT_DIFFERENTIABLE]
    collectives = list(ALL_COLLECTIVES[shape.gradients] if shape.matmuls else _PLAIN)
    if shape.dtype is torch.bfloat16:
        producers, collectives = ([n for n in names if n not in WITH_JUMPS] for names in (producers, collectives))
    steps = []
    for step in range(shape.steps):
        known = 2 + step
        first, second, third = (choose.randrange(known) for _ in range(3))
        other = shape.matmuls and choose.random() < 0.3
        steps.append((choose.choice(producers), choose.choice(collectives), first, second, third, other))
    return Program(steps, sorted(choose.sample(range(2, 2 + shape.steps), min(shape.steps, 3))))


def record_of(program: Program, shape: Shape, ranks: int) -> dict[str, Any]:
    """What programs.json keeps of a program that failed: all of it, since its seed will not stand for it for ever."""
    fields = {**dataclasses.asdict(shape), "dtype": str(shape.dtype).removeprefix("torch.")}
    return {"ranks": ranks, "shape": fields, **dataclasses.asdict(program)}


def kept(record: dict[str, Any]) -> tuple[Program, Shape, int]:
    """The program, its shape and number of ranks behind what `record_of` gave."""
    shape = Shape(**{**record["shape"], "dtype": getattr(torch, record["shape"]["dtype"])})
    return Program([tuple(step) for step in record["steps"]], record["returned"]), shape, record["ranks"]


def operands(shape: Shape, rank: int, world_size: int, call: int) -> list[Tensor]:
    torch.manual_seed(100 * call + rank)
    rows = (2, 2, 4, 3)[call] if shape.dynamic else 2
    sizes = [(rows * world_size, COLUMNS), (rows * world_size, COLUMNS), (COLUMNS, COLUMNS)]
    made = [torch.randn(size, dtype=torch.float64).to(shape.dtype) for size in sizes]
    return [t.requires_grad_(shape.gradients) for t in made]


def check_program(fn: Program, shape: Shape, rank: int, world_size: int, groups: Sequence[Group]) -> list[Record]:
    """Compares compiled with eager; returns the records of what was rewritten. Raises AssertionError."""
    torch._dynamo.reset()
    symmpatterns.report().clear()
    loose = 0.06 if shape.dtype is torch.bfloat16 else 1e-4

    def results(call: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
        found = list(call(*tensors, groups))
        if shape.gradients:
            sum(f.float().sum() * (1 + i) for i, f in enumerate(found)).backward()
            found += [t.grad if t.grad is not None else torch.zeros(()) for t in tensors]
        return [f.wait() if hasattr(f, "wait") else f for f in found]

    changes: dict[str, Any] = {} if shape.ships else {"force": True, "keep_overlap": False}
    with config.patch(**changes):
        compiled = torch.compile(lambda *given: fn(*given), fullgraph=True, dynamic=shape.dynamic)
        for call in range(4 if shape.dynamic else 2):
            tensors = operands(shape, rank, world_size, call)
            got = results(compiled, tensors)
            tensors = operands(shape, rank, world_size, call)
            with relaxed():
                wanted = results(fn, tensors)
            for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
                torch.testing.assert_close(
                    one,
                    other,
                    rtol=loose,
                    atol=loose,
                    msg=lambda m, n=number, c=call: f"call {c}, result {n} of\n{fn}\n{m}",
                )
    return list(symmpatterns.report().rewrites)


def run_programs(rank: int, world_size: int, programs: Sequence[Program], shape: Shape) -> list[Record]:
    """All programs in one start of the ranks; what was rewritten."""
    groups = [dist.group.WORLD, dist.new_group(list(range(world_size)))]
    return [record for each in programs for record in check_program(each, shape, rank, world_size, groups)]


def run_seeds(rank: int, world_size: int, seeds: Sequence[int], shape: Shape) -> int:
    """All seeds in one start of the ranks; how many collectives were rewritten."""
    return len(run_programs(rank, world_size, [draw(seed, shape) for seed in seeds], shape))


# --- a search for new failures ------------------------------------------------------------------------------------


def search(rank: int, world_size: int, seeds: Sequence[int], shape: Shape) -> dict[int, str]:
    """Every seed that fails, with the reason; a group of its own each, since one failure ends a group."""
    failed = {}
    for seed in seeds:
        groups = [dist.new_group(list(range(world_size))) for _ in range(2)]
        complaint = ""
        try:
            with config.patch(timeout_s=60):
                check_program(draw(seed, shape), shape, rank, world_size, groups)
        except Exception:
            complaint = traceback.format_exc()
        complaints: list[Any] = [None] * world_size
        dist.all_gather_object(complaints, complaint)
        if any(complaints) and not _fails_without_us(seed, shape, rank, world_size):
            failed[seed] = max(complaints, key=len)
            if rank == 0:
                record = json.dumps(record_of(draw(seed, shape), shape, world_size))
                print(f"seed {seed}, for programs.json: {record}\n{failed[seed]}", file=sys.stderr, flush=True)
        for group in groups:
            with contextlib.suppress(Exception):
                dist.destroy_process_group(group)
    return failed


def _fails_without_us(seed: int, shape: Shape, rank: int, world_size: int) -> bool:
    """Whether Inductor alone gets the program wrong on some rank (seen: NaN in the gradient of rms_norm of ties)."""
    wrong = False
    try:
        with config.patch(enabled=False), relaxed():
            check_program(draw(seed, shape), shape, rank, world_size, [dist.group.WORLD] * 2)
    except Exception:
        wrong = True
    everybody: list[Any] = [None] * world_size
    dist.all_gather_object(everybody, wrong)
    return any(everybody)


def main() -> int:
    parser = argparse.ArgumentParser(description="looks for programs that compute something else when compiled")
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dynamic", action="store_true")
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--ships", action="store_true", help="in the configuration that ships")
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    shape = Shape(given.steps, getattr(torch, given.dtype), given.dynamic, True, given.gradients, given.ships)
    bad: list[int] = []
    began = time.monotonic()
    for start in range(given.first, given.last, 25):
        seeds = range(start, min(start + 25, given.last))
        bad += run_ranks(search, given.ranks, seeds, shape, timeout=1800)[0]
        print(f"{seeds.stop - given.first} programs in {time.monotonic() - began:.0f} s, failed: {bad}", flush=True)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
