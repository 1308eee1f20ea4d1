"""Generated programs: any producer, any collective, any consumer, compiled against eager with gloo.

A program is a few steps on a growing list of matrices of one shape; each step takes earlier ones, so results are read
at once and late, several times and not at all. It is drawn from a seed, the same on every rank.
"""

from __future__ import annotations

import random
import unittest
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from parameterized import parameterized
from torch import Tensor

import symmpatterns
from symmpatterns import config
from symmpatterns.testing import run_ranks

warnings.filterwarnings("ignore", category=FutureWarning)


def world() -> Any:
    return dist.group.WORLD


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
COLLECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "all_reduce sum": lambda t: funcol.all_reduce(t, "sum", world()),
    "all_reduce max": lambda t: funcol.all_reduce(t, "max", world()),
    "all_gather rows": lambda t: funcol.all_gather_tensor(t, 0, world())[-t.shape[0] :],
    "all_gather columns": lambda t: funcol.all_gather_tensor(t, 1, world())[:, ::2][:, : t.shape[1]],
    "reduce_scatter rows": lambda t: funcol.reduce_scatter_tensor(
        t.repeat(dist.get_world_size(), 1), "sum", 0, world()
    ),
    "reduce_scatter columns": lambda t: funcol.reduce_scatter_tensor(
        torch.cat([t + n for n in range(dist.get_world_size())], 1), "sum", 1, world()
    ),
    "all_to_all": lambda t: funcol.all_to_all_single(t, None, None, world()),
    "broadcast": lambda t: funcol.broadcast(t, 1, world()),
    "all_reduce ints": lambda t: funcol.all_reduce((t * 4).int(), "sum", world()) * 0.25,
    "all_reduce rows": lambda t: funcol.all_reduce(t.sum(-1), "sum", world())[:, None] + t,
}


def program(seed: int, steps: int) -> tuple[Callable[..., Any], list[str]]:
    """A function of two matrices, and what it does."""
    choose = random.Random(seed)
    plan = []
    for step in range(steps):
        known = 2 + step
        names = choose.choice(list(PRODUCERS)), choose.choice(list(COLLECTIVES))
        plan.append((*names, choose.randrange(known), choose.randrange(known), choose.randrange(known)))
    returned = sorted(choose.sample(range(2, 2 + steps), min(steps, 3)))

    def run(a: Tensor, b: Tensor) -> Any:
        values = [a, b]
        for producer, collective, first, second, third in plan:
            sent = PRODUCERS[producer](values[first], values[second])
            values.append(torch.tanh(COLLECTIVES[collective](sent).to(a.dtype)) + values[third])
        return [values[i] for i in returned]

    return run, [f"#{2 + i} = {c}({p}(#{x}, #{y})) + #{z}" for i, (p, c, x, y, z) in enumerate(plan)]


def _run(rank: int, world_size: int, seeds: list[int], dtype: torch.dtype, dynamic: bool | None) -> int:
    rewritten = 0
    for seed in seeds:
        torch._dynamo.reset()
        symmpatterns.report().clear()
        fn, text = program(seed, 5)
        with config.patch(force=True, keep_overlap=False):
            compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic)
            for call, rows in enumerate((2, 2, 4, 3) if dynamic else (2, 2)):
                torch.manual_seed(100 * call + rank)
                a, b = (torch.randn(rows * world_size, 6, dtype=torch.float64).to(dtype) for _ in range(2))
                got, wanted = compiled(a, b), fn(a, b)
                loose = 0.06 if dtype is torch.bfloat16 else 1e-4
                for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
                    torch.testing.assert_close(
                        one,
                        other.wait() if hasattr(other, "wait") else other,
                        rtol=loose,
                        atol=loose,
                        msg=lambda m, n=number, c=call, s=seed, t=text: f"seed {s}, call {c}, result {n}, {t}: {m}",
                    )
        assert not symmpatterns.report().declined, symmpatterns.report()
        rewritten += len(symmpatterns.report().rewrites)
    return rewritten


class ProgramsTest(unittest.TestCase):
    @parameterized.expand(
        [
            ("float32", 2, [1, 2, 3], torch.float32, False),
            ("float64 dynamic", 2, [4, 5], torch.float64, True),
            ("bfloat16", 2, [6], torch.bfloat16, False),
            ("three ranks", 3, [7], torch.float32, True),
        ]
    )
    def test_program(self, _: str, world_size: int, seeds: list[int], dtype: torch.dtype, dynamic: bool) -> None:
        rewritten = run_ranks(_run, world_size, seeds, dtype, dynamic, timeout=300)
        self.assertGreater(min(rewritten), len(seeds))
