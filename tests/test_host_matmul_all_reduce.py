"""The host backend's matmul -> all-reduce between real processes: numbers, odd sizes, protocol, failures."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import unittest

import pytest
import torch
import torch.distributed as dist
from parameterized import parameterized

from symmpatterns import config, host_backend
from symmpatterns.groups import SymmetricMemoryError, SymmetricMemoryTimeout
from symmpatterns.testing import Died, RankError, assert_same_on_all_ranks, assert_within_budget, run_ranks
from symmpatterns.workspace import Workspace, get_workspace

CPU = torch.device("cpu")
ONE_HALF, NO_AWAIT, SLOW_READER = 1, 2, 4
SHAPES = [
    (2, 50_000, 2),  # fewer rows than ranks, and two-shot
    (1, 8, 16),
    (2, 64, 33),
    (3, 1000, 7),
    (5, 3, 0),
    (17, 129, 65),
    (256, 300, 64),
    (0, 4, 8),
    (4, 0, 8),
    (4, 0, 0),
]


def setUpModule() -> None:
    host_backend.build()  # before the ranks' time limits run


def workspace() -> Workspace:
    return get_workspace(dist.group.WORLD.group_name, CPU)  # type: ignore[union-attr]


def operands(
    rank: int, m: int, n: int, k: int, dtype: torch.dtype, seed: int = 0, *, integers: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every rank can make every rank's operands."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)

    def make(*shape: int) -> torch.Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return make(m, k), make(k, n), make(n)


def all_reduce(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, op: str = "sum") -> torch.Tensor:
    out = torch.full((a.shape[0], b.shape[1]), float("nan"), dtype=a.dtype)
    host_backend.matmul_all_reduce(a, b, bias, out, workspace(), op)
    return out


def numbers(rank: int, world_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    results = []
    for (m, n, k), op, with_bias in [(s, op, bias) for s in SHAPES for op in ("sum", "avg") for bias in (False, True)]:
        everybody = [operands(r, m, n, k, dtype) for r in range(world_size)]
        a, b, bias = everybody[rank]
        results.append(all_reduce(a, b, bias if with_bias else None, op))
        divisor = world_size if op == "avg" else 1
        exact = sum(a.double() @ b.double() + (c.double() if with_bias else 0) for a, b, c in everybody) / divisor
        partials = [torch.addmm(c, a, b) if with_bias else a @ b for a, b, c in everybody]
        reference = sum(p.double() for p in partials).div(divisor).to(dtype)
        assert_within_budget(results[-1], exact, reference)
    return results


def exact_integers(rank: int, world_size: int, dtype: torch.dtype) -> None:
    for m, n, k in SHAPES:
        everybody = [operands(r, m, n, k, dtype, integers=True) for r in range(world_size)]
        a, b, bias = everybody[rank]
        exact = sum(a.double() @ b.double() + c.double() for a, b, c in everybody).to(dtype)
        assert torch.equal(all_reduce(a, b, bias), exact), (m, n, k)


def operand_forms(rank: int, world_size: int) -> None:
    """Transposed, sliced, expanded and gradient-requiring operands; K that differs between ranks."""
    torch.manual_seed(0)
    x, w = torch.randn(12, 40), torch.randn(24, 40)
    expected = world_size * (x @ w.t())
    big = torch.randn(24, 100)
    big[::2, 10:90:2] = x
    forms = [
        (x, w.t()),
        (x.t().contiguous().t(), w.t().contiguous()),
        (big[::2, 10:90:2], w.t()),
        (x.requires_grad_(), w.t()),
        (torch.nn.Parameter(x.detach()), torch.nn.Parameter(w).t()),
    ]
    for a, b in forms:
        torch.testing.assert_close(all_reduce(a, b), expected)
    torch.testing.assert_close(all_reduce(x.detach()[:1].expand(12, 40), w.t()), expected[:1].expand(12, 24))
    k = 3 + 5 * rank
    total = sum((3 + 5 * r) * torch.ones(2, 2) for r in range(world_size))
    assert torch.equal(all_reduce(torch.ones(2, k), torch.ones(k, 2)), total)
    special = torch.tensor([[float("inf"), float("nan"), 3e38, -0.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        one = special.to(dtype)
        expected = sum(one.double() for _ in range(world_size)).to(torch.float32).to(dtype)
        torch.testing.assert_close(
            all_reduce(torch.ones(1, 1, dtype=dtype), one), expected, equal_nan=True, rtol=0, atol=0
        )


def bad_operands(rank: int, world_size: int) -> None:
    ws = workspace()
    a, b, out = torch.ones(2, 3), torch.ones(3, 4), torch.empty(2, 4)
    cases = [
        ((b[:2, 0], b, None, out), r"a must be a CPU matrix or a batch of them, not \[2\]"),
        ((a, a, None, out), "do not fit"),
        ((a, b.double(), None, out), "one dtype"),
        ((a, b, torch.ones(3), out), r"bias must be a CPU tensor \[N = 4\], not \[3\]"),
        ((a, b, torch.ones(4).double(), out), "bias must have the dtype"),
        ((a, b, None, torch.empty(2, 3)), r"out must be \[2, 4\], not \[2, 3\]"),
        ((a, b, None, torch.empty(4, 2).t()), "contiguous"),
        ((a.int(), b.int(), None, out.int()), "no such operator for Int"),
    ]
    test = unittest.TestCase()
    for operands, text in cases:
        with test.assertRaisesRegex(ValueError, text):
            host_backend.matmul_all_reduce(*operands, ws, "sum")
    with test.assertRaisesRegex(ValueError, "'sum' or 'avg', not 'max'"):
        host_backend.matmul_all_reduce(a, b, None, out, ws, "max")
    assert torch.equal(all_reduce(a, b), torch.full((2, 4), 3.0 * world_size))  # nothing above has used an epoch


def random_calls(rank: int, world_size: int, calls: int, faults: int, largest: int) -> int:
    """Random shapes, dtypes and delays, a payload of its own in each call, one slow reader; gives the wrong results."""
    ws = workspace()
    ws.reserve(largest * largest * 4, 64)
    if faults:
        host_backend.load().native.inject_faults_for_tests(faults if rank == 0 else faults & ~SLOW_READER)
    plan, delays = random.Random(5), random.Random(rank)
    wrong = 0
    for call in range(calls):
        m, n, k = plan.randint(1, largest), plan.randint(1, largest), plan.randint(1, 8)
        dtype = plan.choice([torch.float32, torch.bfloat16, torch.float64])
        everybody = [operands(r, m, n, k, dtype, call, integers=True) for r in range(world_size)]
        expected = sum(a.double() @ b.double() for a, b, _ in everybody).to(dtype)
        time.sleep(delays.choice([0, 0, 0.0005, 0.002]))
        a, b, _ = everybody[rank]
        wrong += not torch.equal(all_reduce(a, b), expected)
        if call % 7 == 0:
            host_backend.load().barrier(ws)
    return wrong


def fresh_workspace(rank: int, world_size: int) -> None:
    """Empty calls need no memory; a barrier gets some; the native part refuses tables without addresses."""
    ws = workspace()
    assert all_reduce(torch.ones(0, 3), torch.ones(3, 5)).shape == (0, 5)
    assert ws.staging_bytes == 0 and int(ws.state[0]) == 0
    if world_size > 1:
        with unittest.TestCase().assertRaisesRegex(SymmetricMemoryError, "no memory yet"):
            host_backend.load().native.barrier("barrier", host_backend._arguments(ws))
    host_backend.load().barrier(ws)
    assert int(ws.state[0]) == 1
    assert torch.equal(all_reduce(torch.ones(2, 3), torch.ones(3, 5)), torch.full((2, 5), 3.0 * world_size))


def epochs_wrap(rank: int, world_size: int) -> None:
    ws = workspace()
    ws.state[0] = 2**31 - 20
    for call in range(50):
        out = all_reduce(torch.full((2, 1), float(call)), torch.ones(1, 3))
        assert torch.equal(out, torch.full((2, 3), float(call * world_size)))
    assert int(ws.state[0]) == -(2**31) + 30


def peer_is_late_or_dead(rank: int, world_size: int, dead: bool) -> tuple[str, str, float]:
    a, b = torch.ones(2, 2), torch.ones(2, 2)
    all_reduce(a, b)
    if rank == 1:
        if dead:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2.5)
        return "", "", 0.0
    start = time.monotonic()
    texts = []
    with config.patch(timeout_s=1.0 if not dead else 60.0):
        for error_type in (SymmetricMemoryTimeout, SymmetricMemoryError):  # the second call fails at once
            try:
                all_reduce(a, b)
                raise AssertionError("the call ended although a rank did not come")
            except error_type as error:
                texts.append(str(error))
    assert workspace().state.tolist()[2:7] == [1, 1, 1, 2, 0]
    return texts[0], texts[1], time.monotonic() - start


def barrier_time(rank: int, world_size: int) -> float:
    """The first decile in seconds: what a barrier takes when nobody else wants the cores."""
    backend, ws = host_backend.load(), workspace()
    ws.reserve(1, 64)
    times = []
    for _ in range(3000):
        start = time.perf_counter()
        backend.barrier(ws)
        times.append(time.perf_counter() - start)
    return sorted(times)[300]


def interrupted_call(rank: int, world_size: int) -> None:
    a = torch.ones(2, 2)
    all_reduce(a, a)
    if rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        test = unittest.TestCase()
        with test.assertRaises(KeyboardInterrupt):
            all_reduce(a, a)
        with test.assertRaisesRegex(SymmetricMemoryError, "was interrupted"):
            all_reduce(a, a)
    time.sleep(1)


DTYPES = [(str(d).removeprefix("torch."), d) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]


class NumbersTest(unittest.TestCase):
    @parameterized.expand([(f"{name}_{w}", dtype, w) for name, dtype in DTYPES for w in (2, 3)])
    def test_error_budget_and_equal_bits(self, _: str, dtype: torch.dtype, world_size: int) -> None:
        self.check_numbers(dtype, world_size)

    @parameterized.expand(DTYPES)
    @pytest.mark.slow
    def test_error_budget_and_equal_bits_on_four_ranks(self, _: str, dtype: torch.dtype) -> None:
        self.check_numbers(dtype, 4)

    def check_numbers(self, dtype: torch.dtype, world_size: int) -> None:
        for results in zip(*run_ranks(numbers, world_size, dtype, timeout=60)):
            assert_same_on_all_ranks(results)

    @parameterized.expand(DTYPES)
    def test_integers_are_exact(self, _: str, dtype: torch.dtype) -> None:
        run_ranks(exact_integers, 3, dtype, timeout=60)

    def test_operand_forms(self) -> None:
        run_ranks(operand_forms, 2, timeout=60)

    def test_bad_operands(self) -> None:
        run_ranks(bad_operands, 2, timeout=60)


class ProtocolTest(unittest.TestCase):
    @parameterized.expand([("2", 2, 40), ("3", 3, 350), ("4", 4, 30), ("8", 8, 300)])
    def test_random_calls_and_delays(self, _: str, world_size: int, largest: int) -> None:
        self.assertEqual(run_ranks(random_calls, world_size, 60, 0, largest, timeout=120), [0] * world_size)

    @parameterized.expand([("one_shot", 40), ("two_shot", 350)])
    def test_a_slow_reader_is_no_mistake(self, _: str, largest: int) -> None:
        results = run_ranks(
            random_calls, 3, 40, SLOW_READER, largest, timeout=120, env={"SYMMPATTERNS_ALLOW_FAULTS": "1"}
        )
        self.assertEqual(results, [0] * 3)

    @parameterized.expand([("one_half", ONE_HALF | SLOW_READER), ("no_await", NO_AWAIT)])
    def test_the_checks_see_a_broken_protocol(self, _: str, faults: int) -> None:
        results = run_ranks(random_calls, 3, 40, faults, 40, timeout=120, env={"SYMMPATTERNS_ALLOW_FAULTS": "1"})
        self.assertGreater(sum(results), 0)

    def test_faults_cannot_be_injected_by_accident(self) -> None:
        with self.assertRaisesRegex(RankError, "only by tests"):
            run_ranks(random_calls, 2, 1, NO_AWAIT, 4, timeout=60)

    @parameterized.expand([("1", 1), ("2", 2)])
    def test_fresh_workspace(self, _: str, world_size: int) -> None:
        run_ranks(fresh_workspace, world_size, timeout=60)

    def test_epochs_wrap(self) -> None:
        run_ranks(epochs_wrap, 2, timeout=60)

    def test_barrier_is_fast(self) -> None:
        self.assertLess(max(run_ranks(barrier_time, 2, timeout=60)), 20e-6)


class FailureTest(unittest.TestCase):
    def test_late_peer(self) -> None:
        first, second, seconds = run_ranks(peer_is_late_or_dead, 2, False, timeout=60)[0]
        self.assertRegex(
            first, r"matmul_all_reduce: rank 0 of group '.*' waited 1 s for rank 1 \(expected epoch 2, seen 0\)"
        )
        self.assertRegex(first, r"its process \d+ is alive")
        self.assertIn("can no longer be used", second)
        self.assertTrue(0.9 < seconds < 1.5, seconds)

    def test_interrupted_call(self) -> None:
        run_ranks(interrupted_call, 2, timeout=60)

    def test_dead_peer(self) -> None:
        (first, _, seconds), other = run_ranks(peer_is_late_or_dead, 2, True, timeout=60, allow_death=True)
        self.assertEqual(other, Died(-signal.SIGKILL))
        self.assertRegex(first, r"its process \d+ has ended")
        self.assertLess(seconds, 2.0)


if __name__ == "__main__":
    unittest.main()
