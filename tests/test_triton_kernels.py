"""The Triton kernels in Triton's interpreter: real processes, real shared memory, real atomics.

This checks indices, epochs, the rotation of the halves and every wait; it cannot check the ordering of memory on a GPU
(test_ptx.py reads the compiled code for that).
"""

from __future__ import annotations

import random
import tempfile
import time
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from parameterized import parameterized

from symmpatterns.testing import assert_within_budget, run_ranks
from symmpatterns.triton_kernels import _sync, _tiles, matmul_all_reduce

FLAGS = 4096
STAGING = 1 << 20  # bytes of one half
WRAP = 2**31


class SharedWorkspace:
    """The memory of a workspace, without the runtime around it: files in shared memory mapped by every rank."""

    def __init__(self, folder: str, rank: int, world_size: int, epoch: int = 0) -> None:
        self.rank, self.world_size = rank, world_size
        size = 2 * (4 * FLAGS + STAGING)
        self._maps = [
            torch.from_file(f"{folder}/{r}", shared=True, size=size, dtype=torch.uint8) for r in range(world_size)
        ]
        self._maps[rank][: 8 * FLAGS].view(torch.int32).fill_(epoch)
        bases = torch.tensor([m.data_ptr() for m in self._maps])
        self.flag_ptrs = torch.stack([bases, bases + 4 * FLAGS])
        self.staging_ptrs = torch.stack([bases + 8 * FLAGS, bases + 8 * FLAGS + STAGING])
        self.state = torch.zeros(8, dtype=torch.int32)
        self.state[0] = epoch
        self.poison(0)
        self.poison(1)
        torch.distributed.barrier()

    def poison(self, half: int) -> None:
        """NaN in every dtype. Between two calls only the half of the finished one is the rank's own to write."""
        start = 8 * FLAGS + half * STAGING
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
    return [m for m in (_sync, _tiles, matmul_all_reduce) if hasattr(m, name)]


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


def check(name: str, actual: torch.Tensor, exact: bool, a, b, bias, op: str, rows: slice = slice(None)) -> None:
    """`actual` against the sum of all ranks' partials: bitwise for integers, else within the error budget."""
    partials = [(x.float() @ y.float() + (0 if z is None else z.float())).to(x.dtype) for x, y, z in zip(a, b, bias)]
    reference = summed(partials, op)[rows]
    if exact:
        if not same_bits(actual, reference):
            wrong = (actual != reference).nonzero()
            raise AssertionError(f"{name}: {len(wrong)} of {actual.numel()} elements are wrong, first {wrong[:1]}")
        return
    doubles = sum(x.double() @ y.double() + (0 if z is None else z.double()) for x, y, z in zip(a, b, bias))
    doubles = doubles / len(a) if op == "avg" else doubles
    assert_within_budget(actual, doubles[rows], reference)


def call_matmul_all_reduce(rng: random.Random, workspace: SharedWorkspace, timeout_s: float) -> torch.Tensor:
    """A random matmul -> all-reduce, the same on every rank; returns the result after checking it."""
    M, N, K = rng.choice([1, 2, 3, 16, 31, 40, 70]), rng.choice([1, 8, 17, 48, 65]), rng.choice([0, 1, 7, 16, 33, 40])
    dtype = rng.choice([torch.bfloat16, torch.float16, torch.float32])
    variant = rng.choice(["one_shot", "two_shot"])
    tile = rng.choice([(16, 16, 16), (32, 16, 32), (16, 64, 16)])
    rows = rng.choice([None, None, 2 * tile[0]])
    layouts = [rng.choice(["plain", "transposed", "strided", "padded"]) for _ in range(2)]
    exact, op, has_bias = rng.random() < 0.7, rng.choice(["sum", "sum", "avg"]), rng.random() < 0.5
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    ranks = range(workspace.world_size)
    a = [make_matrix(generator, M, K, dtype, layouts[0], exact) for _ in ranks]
    b = [make_matrix(generator, K, N, dtype, layouts[1], exact) for _ in ranks]
    bias = [make_matrix(generator, 1, N, dtype, "plain", exact)[0] if has_bias else None for _ in ranks]
    out = torch.full((2 * M, N + 3), float("nan"), dtype=dtype)[::2, :N]
    plan = matmul_all_reduce.plan(
        M, N, K, dtype, workspace.world_size, 4, variant=variant, tile=tile, rows=rows, use_tma=rng.random() < 0.8
    )
    rank = workspace.rank
    matmul_all_reduce.launch(
        a[rank], b[rank], bias[rank], out, plan=plan, op=op, site=7, **workspace.arguments(timeout_s)
    )
    check(f"matmul_all_reduce {M}x{N}x{K} {dtype} {plan} {layouts}", out, exact, a, b, bias, op)
    return out


FAMILIES = [call_matmul_all_reduce]


def rank_random_calls(rank: int, world_size: int, folder: str, calls: int, seed: int) -> list[list[torch.Tensor]]:
    """Calls of all families with changing shapes and variants, delays everywhere, epochs that wrap around."""
    rng, own_rng = random.Random(seed), random.Random(1000 * seed + rank)

    def pause() -> float:
        return own_rng.random() * 0.004 if own_rng.random() < 0.3 else 0.0

    workspace = SharedWorkspace(folder, rank, world_size, epoch=WRAP - calls // 2)
    results = []
    names = ["begin_call", "publish", "publish_to_peers", "await_flag", "end_call"]
    with patched([change for name in names for change in slowed(name, pause, pause)]):
        for call in range(calls):
            if own_rng.random() < 0.2:
                time.sleep(0.02 * own_rng.random())
            results.append(FAMILIES[call % len(FAMILIES)](rng, workspace, 60.0))
            workspace.poison(int(workspace.state[0]) & 1)
            assert workspace.state[1:3].tolist() == [0, 0], workspace.state
    assert int(workspace.state[0]) < 0, "the epoch should have wrapped around"
    return results


# --- negative controls: the same calls with one rule broken ---------------------------------------------------------


def without_parity(state_ptr: Any) -> Any:
    epoch, _ = _sync.begin_call(state_ptr)
    return epoch, epoch & 0


def flag_before_data(
    staging_ptrs, flag_ptrs, half, rank, slot, flag, tile, rows, epoch, WORLD_SIZE, BM, BN
):  # fmt: skip
    _sync.publish_to_peers(flag_ptrs, half, rank, flag, epoch, WORLD_SIZE)
    time.sleep(0.05)
    for distance in range(1, WORLD_SIZE):
        peer = (rank + distance) % WORLD_SIZE
        _tiles.send_tile(staging_ptrs, half, peer, slot, tile, rows, WORLD_SIZE, BM, BN)


def parity_broken(rank: int) -> list[tuple[Any, str, Any]]:
    return [(module, "begin_call", without_parity) for module in users_of("begin_call") if module is not _sync]


def flag_order_broken(rank: int) -> list[tuple[Any, str, Any]]:
    modules = users_of("send_tile_to_peers")
    return [(module, "send_tile_to_peers", flag_before_data) for module in modules]


def rank_slow_reader(rank: int, world_size: int, folder: str, broken: Any, variant: str) -> str:
    """Calls in which rank 0 dawdles between seeing a flag and reading the data; "right" or what went wrong."""
    workspace = SharedWorkspace(folder, rank, world_size)
    slow = slowed("await_flag", lambda: 0.0, lambda: 0.05) if rank == 0 else []
    verdict = "right"
    with patched(slow + (broken(rank) if broken else [])):
        for call in range(4):
            a = [torch.full((16, 16), float(1 + call + 10 * r)) for r in range(world_size)]
            b = torch.eye(16)
            out = torch.empty(16, 16)
            plan = matmul_all_reduce.plan(
                16, 16, 16, a[0].dtype, world_size, 1, variant=variant, tile=(16, 16, 16)
            )
            try:
                matmul_all_reduce.launch(a[rank], b, None, out, plan=plan, **workspace.arguments(timeout_s=2.0))
            except _sync.FlagTimeoutError:
                return "timeout"
            if not torch.equal(out, sum(a)):
                verdict = "wrong sums"  # go on: a rank that stops leaves its peers waiting
    return verdict


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


class InterpretedKernelsTest(unittest.TestCase):
    def ranks(self, fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            for rank in range(world_size):
                with Path(folder, str(rank)).open("wb") as file:
                    file.truncate(2 * (4 * FLAGS + STAGING))
            return run_ranks(fn, world_size, folder, *args, timeout=100, env={"TRITON_INTERPRET": "1"})

    @parameterized.expand([(2, 60), (3, 40), (4, 30)])
    def test_random_calls(self, world_size: int, calls: int) -> None:
        results = self.ranks(rank_random_calls, world_size, calls, world_size)
        for call in range(calls):
            for rank in range(1, world_size):
                self.assertTrue(same_bits(results[0][call], results[rank][call]), f"call {call}: rank {rank} differs")

    @parameterized.expand(
        [
            ("nothing", None, "one_shot", True),
            ("parity", parity_broken, "one_shot", False),
            ("flag_order", flag_order_broken, "one_shot", False),
            ("nothing_two_shot", None, "two_shot", True),
            ("flag_order_two_shot", flag_order_broken, "two_shot", False),
        ]
    )
    def test_slow_reader_with_broken(self, _name: str, broken: Any, variant: str, right: bool) -> None:
        verdicts = self.ranks(rank_slow_reader, 2, broken, variant)
        self.assertEqual(verdicts == ["right", "right"], right, verdicts)

    def test_absent_peer_ends_in_an_error_that_names_it(self) -> None:
        (text, state, seconds), _ = self.ranks(rank_absent_peer, 2)
        for part in ("rank 0", "rank 1", "flag", "become 1", "still 0", "site 5"):
            self.assertIn(part, text)
        self.assertEqual(state[2:4], [_sync.ERROR_TIMEOUT, 1])
        self.assertLess(seconds, 5)


if __name__ == "__main__":
    unittest.main()
