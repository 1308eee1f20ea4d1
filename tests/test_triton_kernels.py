"""The Triton kernels in Triton's interpreter: real processes, real shared memory, real atomics.

This checks indices, epochs, the rotation of the halves and every wait; it cannot check the ordering of memory on a GPU
(test_ptx.py reads the compiled code for that).
"""

from __future__ import annotations

import functools
import random
import tempfile
import time
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized

from symmpatterns.testing import assert_within_budget, run_ranks
from symmpatterns.triton_kernels import (
    _plan,
    _shards,
    _sync,
    _tiles,
    all_gather_matmul,
    matmul_all_reduce,
    matmul_reduce_scatter,
)

MODULES = (_sync, _shards, _tiles, matmul_all_reduce, matmul_reduce_scatter, all_gather_matmul)

FLAGS = 4096
STAGING = 1 << 20  # bytes of one half
WRAP = 2**31


class SharedWorkspace:
    """The memory of a workspace, without the runtime around it: files in shared memory mapped by every rank."""

    def __init__(self, folder: str, rank: int, world_size: int, epoch: int = 0) -> None:
        self.rank, self.world_size = rank, world_size
        size = 2 * (8 * FLAGS + STAGING)
        self._maps = [
            torch.from_file(f"{folder}/{r}", shared=True, size=size, dtype=torch.uint8) for r in range(world_size)
        ]
        self._maps[rank][: 16 * FLAGS].view(torch.int64).fill_(epoch)
        bases = torch.tensor([m.data_ptr() for m in self._maps])
        self.flag_ptrs = torch.stack([bases, bases + 8 * FLAGS])
        self.staging_ptrs = torch.stack([bases + 16 * FLAGS, bases + 16 * FLAGS + STAGING])
        self.state = torch.zeros(16, dtype=torch.int32)
        self.state[0] = epoch
        self.poison(0)
        self.poison(1)
        torch.distributed.barrier()

    def poison(self, half: int) -> None:
        """NaN in every dtype. Between two calls only the half of the finished one is the rank's own to write."""
        start = 16 * FLAGS + half * STAGING
        self._maps[self.rank][start : start + STAGING].fill_(0xFF)

    def arguments(self, timeout_s: float = 60.0) -> dict[str, Any]:
        return {
            "staging_ptrs": self.staging_ptrs,
            "flag_ptrs": self.flag_ptrs,
            "state": self.state,
            "rank": self.rank,
            "world_size": self.world_size,
            "timeout_s": timeout_s,
        }


@contextmanager
def patched(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Replaces functions of the kernels' modules: interpreted code looks them up when it runs."""
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def users_of(name: str) -> list[Any]:
    """The modules whose code calls the primitive `name`."""
    return [module for module in MODULES if hasattr(module, name)]


def slowed(name: str, before: Callable[[], float], after: Callable[[], float]) -> list[tuple[Any, str, Any]]:
    """Changes that let a rank sleep before and after a primitive."""
    original = getattr(_sync, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        time.sleep(before())
        result = original(*args, **kwargs)
        time.sleep(after())
        return result

    return [(module, name, wrapper) for module in users_of(name)]


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


# --- one random call of a family, and what it must give ------------------------------------------------------------


def make_matrix(generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype, layout: str, exact: bool):
    """A matrix of that layout: small integers, whose sums are exact in any order, or normal numbers."""

    def values(*shape: int) -> torch.Tensor:
        if exact:
            return torch.randint(-3, 4, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    if layout == "transposed":
        return values(columns, rows).t()
    if layout == "strided":
        return values(2 * rows, 3 * columns + 1)[::2, : 3 * columns : 3]
    if layout == "padded":  # rows of a multiple of 16 bytes: TMA reads it though K or N is odd
        return values(rows, (columns + 15) // 8 * 8)[:, :columns]
    return values(rows, columns)


def summed(partials: list[torch.Tensor], op: str) -> torch.Tensor:
    """What the protocol promises: rank order, fp32, partials rounded first, one rounding at the end."""
    total = torch.zeros(partials[0].shape)
    for partial in partials:
        total = total + partial.float()
    return (total / len(partials) if op == "avg" else total).to(partials[0].dtype)


def check(name: str, actual: torch.Tensor, reference: torch.Tensor, doubles: torch.Tensor, exact: bool) -> None:
    """`actual` against the reference: bitwise for integers, else within the error budget."""
    if not exact:
        assert_within_budget(actual, doubles, reference)
    elif not same_bits(actual, reference):
        wrong = (actual != reference).nonzero()
        raise AssertionError(f"{name}: {len(wrong)} of {actual.numel()} elements are wrong, first {wrong[:1]}")


class Operands:
    """Random operands of a matmul, those of all ranks on every rank, distinct in every call."""

    def __init__(self, rng: random.Random, world_size: int, M: int, N: int, K: int, K_b: int | None = None) -> None:
        self.dtype = rng.choice([torch.bfloat16, torch.float16, torch.float32])
        self.layouts = [rng.choice(["plain", "transposed", "strided", "padded"]) for _ in range(2)]
        self.exact, has_bias = rng.random() < 0.7, rng.random() < 0.5
        self.tile = rng.choice([(16, 16, 16), (32, 16, 32), (16, 64, 16)])
        self.rows = rng.choice([None, None, 2 * self.tile[0]])
        self.use_tma = rng.random() < 0.8
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

        def matrices(rows: int, columns: int, layout: str) -> list[torch.Tensor]:
            return [make_matrix(generator, rows, columns, self.dtype, layout, self.exact) for _ in range(world_size)]

        self.a = matrices(M, K, self.layouts[0])
        self.b = matrices(K if K_b is None else K_b, N, self.layouts[1])
        self.bias = [m[0] if has_bias else None for m in matrices(1, N, "plain")]
        self.name = f"{M}x{N}x{K} {self.dtype} {self.layouts} tile {self.tile} rows {self.rows} tma {self.use_tma}"

    def output(self, rows: int, columns: int, rng: random.Random) -> torch.Tensor:
        """NaN, every other row of something wider, or plain."""
        if rng.random() < 0.5:
            return torch.full((rows, columns), float("nan"), dtype=self.dtype)
        return torch.full((2 * rows, columns + 3), float("nan"), dtype=self.dtype)[::2, :columns]

    def overrides(self) -> dict[str, Any]:
        return {"tile": self.tile, "rows": self.rows, "use_tma": self.use_tma}

    def reduced(self, op: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(the reference, the same in float64)"""
        triples = list(zip(self.a, self.b, self.bias))
        partials = [(x.float() @ y.float() + (0 if z is None else z.float())).to(self.dtype) for x, y, z in triples]
        doubles = sum(x.double() @ y.double() + (0 if z is None else z.double()) for x, y, z in triples)
        return summed(partials, op), doubles / len(triples) if op == "avg" else doubles


def call_matmul_all_reduce(rng: random.Random, workspace: SharedWorkspace, timeout_s: float) -> torch.Tensor:
    """A random matmul -> all-reduce, the same on every rank; returns the result after checking it."""
    M, N, K = rng.choice([1, 2, 3, 16, 31, 40, 70]), rng.choice([1, 8, 17, 48, 65]), rng.choice([0, 1, 7, 16, 33, 40])
    rank, world_size = workspace.rank, workspace.world_size
    x = Operands(rng, world_size, M, N, K)
    variants = ["one_shot", "two_shot"] + ["two_shot_tma"] * 2 * (world_size == 2)
    variant, op = rng.choice(variants), rng.choice(["sum", "sum", "avg"])
    out = x.output(M, N, rng)
    plan = matmul_all_reduce.plan(M, N, K, x.dtype, world_size, 4, variant=variant, **x.overrides())
    arguments = workspace.arguments(timeout_s)
    matmul_all_reduce.launch(x.a[rank], x.b[rank], x.bias[rank], out, plan=plan, op=op, site=7, **arguments)
    check(f"matmul_all_reduce {variant} {x.name}", out, *x.reduced(op), x.exact)
    return out


def call_matmul_reduce_scatter(rng: random.Random, workspace: SharedWorkspace, timeout_s: float) -> torch.Tensor:
    """A random matmul -> reduce-scatter; returns the sum of which this rank got a block, after checking the block."""
    rank, world_size = workspace.rank, workspace.world_size
    dim, op = rng.choice([0, 1]), rng.choice(["sum", "sum", "avg"])
    M, N = rng.choice([1, 5, 16, 24, 40]), rng.choice([1, 8, 17, 33])
    M, N = (M * world_size, N) if dim == 0 else (M, N * world_size)
    K = rng.choice([0, 1, 7, 16, 33, 40])
    x = Operands(rng, world_size, M, N, K)
    reference, doubles = x.reduced(op)
    mine = reference.chunk(world_size, dim)[rank]
    out = x.output(*mine.shape, rng)
    variant = rng.choice(["stores", "tma"])
    plan = matmul_reduce_scatter.plan(
        M, N, K, x.dtype, world_size, 4, scatter_dim=dim, variant=variant, **x.overrides()
    )  # fmt: skip
    arguments = workspace.arguments(timeout_s)
    matmul_reduce_scatter.launch(x.a[rank], x.b[rank], x.bias[rank], out, plan=plan, op=op, **arguments)
    check(f"matmul_reduce_scatter {variant} {dim} {x.name}", out, mine, doubles.chunk(world_size, dim)[rank], x.exact)
    return reference


def call_all_gather_matmul(rng: random.Random, workspace: SharedWorkspace, timeout_s: float) -> torch.Tensor:
    """A random all-gather -> matmul with one or two matrices; returns the first product, the same on every rank."""
    rank, world_size = workspace.rank, workspace.world_size
    m, N, K = rng.choice([1, 5, 16, 24, 40]), rng.choice([0, 1, 8, 17, 33]), rng.choice([0, 1, 7, 16, 32, 33, 40])
    dim = rng.choice([0, 0, 1])
    x = Operands(rng, world_size, m, N, K, K if dim == 0 else K * world_size)
    products = rng.choice([1, 1, 2])
    bs, biases = x.b[:products], x.bias[:products]
    whole = torch.cat(x.a, dim)
    outs = [x.output(whole.shape[0], N, rng) for _ in bs]
    gathered = rng.choice([None, x.output(*whole.shape, rng)])
    pieces = rng.choice([None, 1, 3])
    plan = all_gather_matmul.plan(m, N, K, x.dtype, world_size, 4, gather_dim=dim, pieces=pieces, **x.overrides())
    all_gather_matmul.launch(x.a[rank], bs, biases, outs, gathered, plan=plan, **workspace.arguments(timeout_s))
    if gathered is not None:
        check(f"gathered {dim} {x.name}", gathered, whole, whole.double(), True)
    for b, bias, out in zip(bs, biases, outs):
        extra = 0 if bias is None else bias
        reference = (whole.float() @ b.float() + extra).to(x.dtype)
        check(f"all_gather_matmul {dim} {x.name}", out, reference, whole.double() @ b.double() + extra, x.exact)
    return outs[0]


FAMILIES = [call_matmul_all_reduce, call_matmul_reduce_scatter, call_all_gather_matmul]


def rank_random_calls(rank: int, world_size: int, folder: str, calls: int, seed: int) -> list[list[torch.Tensor]]:
    """Calls of all families with changing shapes and variants, delays everywhere, epochs that wrap around."""
    rng, own_rng = random.Random(seed), random.Random(1000 * seed + rank)

    def pause() -> float:
        return own_rng.random() * 0.004 if own_rng.random() < 0.3 else 0.0

    workspace = SharedWorkspace(folder, rank, world_size, epoch=WRAP - calls // 2)
    results = []
    names = ["begin_call", "publish", "publish_to_peers", "await_flag", "count_call"]
    with patched([change for name in names for change in slowed(name, pause, pause)]):
        for _ in range(calls):
            if own_rng.random() < 0.2:
                time.sleep(0.02 * own_rng.random())
            results.append(rng.choice(FAMILIES)(rng, workspace, 60.0))
            workspace.poison(int(workspace.state[0]) & 1)
            assert workspace.state[1:3].tolist() == [0, 0], workspace.state
    assert calls < 20 or int(workspace.state[0]) < 0, "the epoch should have wrapped around"
    return results


# --- negative controls: the same calls with one rule broken ---------------------------------------------------------


def without_parity() -> list[tuple[Any, str, Any]]:
    """Every call uses half 0."""

    def begin_call(*args: Any) -> Any:
        ticket, half = original(*args)
        return ticket, half & 0

    original = _sync.begin_call
    return [(module, "begin_call", begin_call) for module in users_of("begin_call")]


def flag_before_data() -> list[tuple[Any, str, Any]]:
    """What is sent is stored only after the flag that announces it."""
    pending: list[Callable[[], None]] = []

    def postponed(send: Any) -> Any:
        return lambda *args: pending.append(lambda: send(*args))

    def early(publish: Any) -> Any:
        def wrapper(*args: Any) -> None:
            publish(*args)
            time.sleep(0.1)
            while pending:
                pending.pop()()

        return wrapper

    changes = []
    for name, change in (
        ("send_tile", postponed),
        ("send_tile_by_tma", postponed),
        ("send_piece", postponed),
        ("publish", early),
        ("publish_to_peers", early),
    ):
        changes += [(module, name, change(getattr(module, name))) for module in users_of(name)]
    return changes


def payload(rank: int, call: int) -> torch.Tensor:
    return torch.arange(256.0).reshape(16, 16) % 7 + 10 * rank + 100 * call


def reduce_call(variant: str, x: list[torch.Tensor], workspace: SharedWorkspace) -> tuple[torch.Tensor, torch.Tensor]:
    plan = matmul_all_reduce.plan(16, 16, 16, torch.float32, len(x), 1, variant=variant, tile=(16, 16, 16))
    out = torch.empty(16, 16)
    mine = x[workspace.rank]
    matmul_all_reduce.launch(mine, torch.eye(16), None, out, plan=plan, **workspace.arguments(2.0))
    return out, sum(x)


def scatter_call(x: list[torch.Tensor], workspace: SharedWorkspace) -> tuple[torch.Tensor, torch.Tensor]:
    plan = matmul_reduce_scatter.plan(16, 16, 16, torch.float32, len(x), 1, tile=(16, 16, 16))
    out = torch.empty(8, 16)
    mine = x[workspace.rank]
    matmul_reduce_scatter.launch(mine, torch.eye(16), None, out, plan=plan, **workspace.arguments(2.0))
    return out, sum(x).chunk(2)[workspace.rank]


def gather_call(x: list[torch.Tensor], workspace: SharedWorkspace) -> tuple[torch.Tensor, torch.Tensor]:
    plan = all_gather_matmul.plan(16, 16, 16, torch.float32, len(x), 1, tile=(16, 16, 16))
    out = torch.empty(32, 16)
    mine = x[workspace.rank]
    all_gather_matmul.launch(mine, [torch.eye(16)], None, [out], plan=plan, **workspace.arguments(2.0))
    return out, torch.cat(x)


ONE_CALL = {
    "one_shot": functools.partial(reduce_call, "one_shot"),
    "two_shot": functools.partial(reduce_call, "two_shot"),
    "two_shot_tma": functools.partial(reduce_call, "two_shot_tma"),
    "reduce_scatter": scatter_call,
    "all_gather": gather_call,
}
RULES = {"intact": list, "parity": without_parity, "flag order": flag_before_data}


def rank_slow_reader(rank: int, world_size: int, folder: str) -> dict[tuple[str, str], str]:
    """Each family with each rule broken, while rank 0 dawdles between seeing a flag and reading the data.

    For each the verdict: "right", "wrong", or "timeout".
    """
    verdicts = {}
    for family, one_call in ONE_CALL.items():
        for rule, broken in RULES.items():
            workspace = SharedWorkspace(folder, rank, world_size)
            verdict = "right"
            slow = slowed("await_flag", lambda: 0.0, lambda: 0.3) if rank == 0 else []
            with patched(slow + broken()):
                for call in range(3):
                    try:
                        actual, expected = one_call([payload(r, call) for r in range(world_size)], workspace)
                    except _sync.FlagTimeoutError:
                        verdict = "timeout"
                        break
                    if not torch.equal(actual, expected):
                        verdict = "wrong"  # and go on: a rank that stops leaves its peers waiting
            verdicts[family, rule] = verdict
            torch.distributed.barrier()
    return verdicts


def rank_absent_peer(rank: int, world_size: int, folder: str) -> tuple[str, list[int], float] | None:
    """Rank 1 never calls; what rank 0 reports, the record in its state, and how long it took."""
    workspace = SharedWorkspace(folder, rank, world_size)
    if rank == 1:
        return None
    x = torch.ones(40, 16)
    plan = matmul_all_reduce.plan(40, 16, 16, x.dtype, world_size, 1, variant="two_shot", tile=(16, 16, 16))
    began = time.monotonic()
    try:
        matmul_all_reduce.launch(
            x, torch.ones(16, 16), None, torch.empty(40, 16), plan=plan, site=5, **workspace.arguments(0.5)
        )
    except _sync.FlagTimeoutError as error:
        return str(error), workspace.state.tolist(), time.monotonic() - began
    raise AssertionError("the launch should have raised FlagTimeoutError")


CALLS = {2: 24, 3: 20, 4: 20}


def rank_everything(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """One start of the ranks serves all tests of a world size: it takes longer than most of them."""
    found: dict[str, Any] = {"random calls": rank_random_calls(rank, world_size, folder, CALLS[world_size], world_size)}
    if world_size == 2:
        found["slow reader"] = rank_slow_reader(rank, world_size, folder)
        found["absent peer"] = rank_absent_peer(rank, world_size, folder)
    return found


@functools.cache
def ranks(world_size: int) -> list[dict[str, Any]]:
    """What each rank found."""
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world_size):
            with Path(folder, str(rank)).open("wb") as file:
                file.truncate(2 * (8 * FLAGS + STAGING))
        return run_ranks(rank_everything, world_size, folder, timeout=250, env={"TRITON_INTERPRET": "1"})


class InterpretedKernelsTest(unittest.TestCase):
    def test_random_calls(self) -> None:
        self.check_random_calls(2)

    @parameterized.expand([(3,), (4,)])
    @pytest.mark.slow
    def test_random_calls_on_more_ranks(self, world_size: int) -> None:
        self.check_random_calls(world_size)

    def check_random_calls(self, world_size: int) -> None:
        results = [found["random calls"] for found in ranks(world_size)]
        self.assertEqual([len(calls) for calls in results], [CALLS[world_size]] * world_size)
        for call, outs in enumerate(zip(*results)):
            for rank in range(1, world_size):
                self.assertTrue(same_bits(outs[0], outs[rank]), f"call {call}: rank {rank} differs from rank 0")

    def test_slow_reader_with_each_rule_broken(self) -> None:
        verdicts = [found["slow reader"] for found in ranks(2)]
        for family in ONE_CALL:
            both = {rule: [v[family, rule] for v in verdicts] for rule in RULES}
            with self.subTest(family):
                self.assertEqual(both["intact"], ["right", "right"])
                self.assertNotEqual(both["flag order"], ["right", "right"])
                # The owner of a two-shot tile hears from a rank only after that rank has finished the call before, so
                # this protocol by itself would do with one half; the workspace is shared with those that would not.
                if family not in ("two_shot", "two_shot_tma"):
                    self.assertNotEqual(both["parity"], ["right", "right"])

    def test_absent_peer_ends_in_an_error_that_names_it(self) -> None:
        text, state, seconds = ranks(2)[0]["absent peer"]
        for part in ("rank 0", "rank 1", "flag", "become 1", "still 0", "site 5"):
            self.assertIn(part, text)
        self.assertEqual(state[2:4], [_sync.ERROR_TIMEOUT, 1])
        self.assertLess(seconds, 20)

    def test_operands_that_do_not_fit_are_refused(self) -> None:
        one = torch.ones(16, 16)
        plan = matmul_all_reduce.plan(16, 16, 16, one.dtype, 2, 1)
        nothing = {"staging_ptrs": one, "flag_ptrs": one, "state": one, "rank": 0, "world_size": 2, "timeout_s": 1.0}
        for error, message, arguments in (
            (ValueError, "cannot be multiplied", (one, torch.ones(15, 16), None, one)),
            (ValueError, "the result", (one, one, None, torch.ones(15, 16))),
            (ValueError, "must be matrices", (one, one[0], None, one)),
            (TypeError, "convert one", (one, one.bfloat16(), None, one)),
            (TypeError, "not torch.float64", (one.double(), one.double(), None, one.double())),
            (ValueError, "bias must be", (one, one, torch.ones(15), one)),
            (RuntimeError, "TRITON_INTERPRET", (one, one, None, one)),
        ):
            with self.subTest(message), self.assertRaisesRegex(error, message):
                matmul_all_reduce.launch(*arguments, plan=plan, **nothing)

    def test_plans(self) -> None:
        for M, world_size, variant in (
            (1, 2, "one_shot"),
            (128, 2, "one_shot"),
            (256, 2, "one_shot"),
            (512, 2, "two_shot"),
            (8192, 2, "two_shot_tma"),
            (8192, 4, "two_shot"),
            (128, 8, "two_shot"),
            (16, 8, "one_shot"),
        ):
            plan = matmul_all_reduce.plan(M, 8192, 4096, torch.bfloat16, world_size, 132)
            self.assertEqual((plan.variant, plan.rows), (variant, M))
            self.assertGreaterEqual(plan.flags * plan.BM * plan.BN * 2, plan.staging_bytes)
        old = matmul_all_reduce.plan(8192, 8192, 4096, torch.bfloat16, 2, 108, capability=8)
        self.assertEqual((old.variant, old.stagger), ("two_shot", 0))  # neither TMA nor room for two programs
        with self.assertRaisesRegex(ValueError, "two ranks, not 3"):
            matmul_all_reduce.plan(64, 64, 64, torch.bfloat16, 3, 132, variant="two_shot_tma")
        for module in (matmul_all_reduce, matmul_reduce_scatter, all_gather_matmul):
            with self.subTest(module.__name__):
                plan = module.plan(1 << 20, 8192, 4096, torch.bfloat16, 8, 132)  # too large for one call
                self.assertLess(plan.rows, 1 << 17)
                self.assertEqual(plan.rows % plan.BM, 0)
                self.assertLessEqual(plan.staging_bytes, _plan.STAGING_LIMIT)
                self.assertLessEqual(plan.flags, _plan.FLAG_CAPACITY)
                with self.assertRaisesRegex(TypeError, "float64"):
                    module.plan(64, 64, 64, torch.float64, 2, 132)
        with self.assertRaisesRegex(ValueError, "cannot be scattered"):
            matmul_reduce_scatter.plan(65, 64, 64, torch.bfloat16, 2, 132)


if __name__ == "__main__":
    unittest.main()
