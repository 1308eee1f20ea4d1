"""The host backend's matmul -> reduce-scatter, all-gather -> matmul and plain collectives between real processes."""

from __future__ import annotations

import random
import time
import unittest

import torch
import torch.distributed as dist
from parameterized import parameterized

from symmpatterns import host_backend
from symmpatterns.testing import assert_same_on_all_ranks, assert_within_budget, run_ranks
from symmpatterns.workspace import Workspace, get_workspace

DTYPES = [(str(d).removeprefix("torch."), d) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
ONE_HALF, NO_AWAIT, SLOW_READER = 1, 2, 4


def setUpModule() -> None:
    host_backend.build()  # before the ranks' time limits run


def workspace() -> Workspace:
    return get_workspace(dist.group.WORLD.group_name, torch.device("cpu"))  # type: ignore[union-attr]


def random_tensor(dtype: torch.dtype, *shape: int, seed: int, integers: bool = False) -> torch.Tensor:
    """The same in every process that passes the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if integers:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def poisoned(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def part_of(x: torch.Tensor, rank: int, world_size: int, dim: int) -> torch.Tensor:
    return x.chunk(world_size, dim)[rank] if x.shape[dim] else x


def matmul_reduce_scatter(rank: int, world_size: int, dtype: torch.dtype) -> None:
    ws, w = workspace(), world_size
    shapes = [(w, 8, 5), (2 * w, 3 * w, 64), (30 * w, 100 * w, 33), (w, w, 0), (0, w, 3), (w, 0, 3)]
    cases = [(s, dim, op, bias) for s in shapes for dim in (0, 1) for op in ("sum", "avg") for bias in (False, True)]
    for (m, n, k), dim, op, with_bias in cases:
        if (m, n)[dim] % w:
            continue
        everybody = [
            (
                random_tensor(dtype, m, k, seed=r),
                random_tensor(dtype, n, k, seed=r + 50).t(),
                random_tensor(dtype, n, seed=r),
            )
            for r in range(w)
        ]
        a, b, bias = everybody[rank]
        shape = [m, n]
        shape[dim] //= w
        out = poisoned(dtype, *shape)
        host_backend.matmul_reduce_scatter(a, b, bias if with_bias else None, out, ws, op, dim)
        divisor = w if op == "avg" else 1
        exact = sum(a.double() @ b.double() + (c.double() if with_bias else 0) for a, b, c in everybody) / divisor
        partials = [torch.addmm(c, a, b) if with_bias else a @ b for a, b, c in everybody]
        reference = sum(p.double() for p in partials).div(divisor).to(dtype)
        assert_within_budget(out, part_of(exact, rank, w, dim), part_of(reference, rank, w, dim))


def all_gather_matmul(rank: int, world_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    ws, w = workspace(), world_size
    results = []
    shapes = [(1, 8, 5), (3, 40, 17), (150, 30, 64), (128, 7, 1), (0, 4, 3), (2, 4, 0)]
    cases = [(s, dim, keep, bias) for s in shapes for dim in (0, 1) for keep in (False, True) for bias in (False, True)]
    for (m, n, k), dim, keep, with_bias in cases:
        shards = [random_tensor(dtype, k, m, seed=r).t() for r in range(w)]
        whole = torch.cat(shards, dim)
        bs = [random_tensor(dtype, whole.shape[1], n + i, seed=80 + i) for i in range(2)]
        biases = [random_tensor(dtype, n + i, seed=90 + i) if with_bias else None for i in range(2)]
        outs = [poisoned(dtype, whole.shape[0], b.shape[1]) for b in bs]
        gathered = poisoned(dtype, *whole.shape) if keep else None
        host_backend.all_gather_matmul(shards[rank], bs, biases, outs, gathered, ws, dim)
        assert gathered is None or torch.equal(gathered, whole)
        for b, bias, out in zip(bs, biases, outs):
            exact = whole.double() @ b.double() + (0 if bias is None else bias.double())
            reference = whole @ b if bias is None else torch.addmm(bias, whole, b)
            assert_within_budget(out, exact, reference)
        results += outs
    return results


def plain(rank: int, world_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """all_reduce, reduce_scatter and all_gather, exact on integers; strided inputs, in place, 3-D, small and large."""
    ws, w = workspace(), world_size
    results = []
    for shape in [(w,), (3 * w, 5, 7), (w, 1), (64 * w, 1000), (0, 4)]:
        inputs = [random_tensor(dtype, *shape, seed=r, integers=True) for r in range(w)]
        total = sum(x.double() for x in inputs).to(dtype)
        x = inputs[rank].mT.contiguous().mT if len(shape) > 1 else inputs[rank]
        out = poisoned(dtype, *shape)
        host_backend.all_reduce(x, out, ws, "sum")
        assert torch.equal(out, total)
        results.append(out)
        in_place = inputs[rank].clone()
        host_backend.all_reduce(in_place, in_place, ws, "avg")
        torch.testing.assert_close(in_place, (total.double() / w).to(dtype), rtol=0, atol=0)
        part = poisoned(dtype, shape[0] // w, *shape[1:])
        host_backend.reduce_scatter(x, part, ws, "sum")
        assert torch.equal(part, part_of(total, rank, w, 0))
        whole = poisoned(dtype, w * shape[0], *shape[1:])
        host_backend.all_gather(x, whole, ws)
        assert torch.equal(whole, torch.cat(inputs))
    flags = torch.tensor([rank, -1], dtype=torch.int64)
    host_backend.all_gather(flags, everybody := torch.zeros(2 * w, dtype=torch.int64), ws)
    assert everybody[::2].tolist() == list(range(w))
    return results


def refusals(rank: int, world_size: int) -> None:
    ws = workspace()
    test = unittest.TestCase()
    a, b = torch.ones(3, 2), torch.ones(2, 4)

    def refuses(text: str, call, *args) -> None:
        with test.assertRaisesRegex(ValueError, text):
            call(*args)

    mrs, agm = host_backend.matmul_reduce_scatter, host_backend.all_gather_matmul
    refuses("dimension 0 of the result, 3, cannot be divided among 2 ranks", mrs, a, b, None, b, ws, "sum", 0)
    refuses("scatter_dim is 0 or 1", mrs, a, b, None, b, ws, "sum", 2)
    refuses(r"out must be \[3, 2\], not \[2, 4\]", mrs, a, b, None, b, ws, "sum", 1)
    refuses(r"a \[6, 2\] and b \[3, 2\] do not fit", agm, a, [a], [None], [b], None, ws, 0)
    refuses(r"a \[3, 4\] and b \[2, 4\] do not fit", agm, a, [b], [None], [b], None, ws, 1)
    refuses(r"out must be \[6, 4\]", agm, a, [b], [None], [torch.ones(3, 4)], None, ws, 0)
    refuses(r"out must be \[6, 2\]", agm, a, [b], [None], [torch.ones(6, 4)], a, ws, 0)
    refuses("as many bs", agm, a, [], [], [], None, ws, 0)
    refuses("must have 6 elements, not 8", host_backend.all_reduce, a, b, ws, "sum")
    refuses("cannot be divided", host_backend.reduce_scatter, a, b, ws, "sum")
    refuses("of the dtype of the input", host_backend.all_gather, a, torch.ones(6, 2).int(), ws)
    host_backend.all_reduce(a, out := torch.empty(3, 2), ws, "sum")  # nothing above has used an epoch
    assert torch.equal(out, torch.full((3, 2), 2.0))


def random_calls(rank: int, world_size: int, calls: int, faults: int) -> int:
    """All operators in random order with random shapes and delays; a payload of its own in each; the wrong results."""
    ws, w = workspace(), world_size
    ws.reserve(1 << 20, 64)
    if faults:
        host_backend.load().native.inject_faults_for_tests(faults if rank == 0 else faults & ~SLOW_READER)
    plan, delays = random.Random(7), random.Random(rank)
    dtype = torch.float32
    wrong = 0
    for call in range(calls):
        m, n, k = w * plan.randint(1, 60), w * plan.randint(1, 60), plan.randint(1, 8)
        dim = plan.randint(0, 1)
        everybody = [random_tensor(dtype, m, k, seed=call * w + r, integers=True) for r in range(w)]
        b = random_tensor(dtype, k, n, seed=call, integers=True)
        tall = torch.cat([b] * w) if dim else b  # for gathering along K
        time.sleep(delays.choice([0, 0, 0.0005, 0.002]))
        x = everybody[rank]
        kind = plan.choice(["mm_ar", "mm_rs", "ag_mm", "ar", "rs", "ag"])
        total = sum(everybody)
        if kind == "mm_ar":
            host_backend.matmul_all_reduce(x, b, None, out := poisoned(dtype, m, n), ws, "sum")
            expected = total @ b
        elif kind == "mm_rs":
            out = poisoned(dtype, *((m // w, n) if dim == 0 else (m, n // w)))
            host_backend.matmul_reduce_scatter(x, b, None, out, ws, "sum", dim)
            expected = part_of(total @ b, rank, w, dim)
        elif kind == "ag_mm":
            expected = torch.cat(everybody, dim) @ tall
            host_backend.all_gather_matmul(x, [tall], [None], [out := torch.full_like(expected, -99)], None, ws, dim)
        elif kind == "ar":
            host_backend.all_reduce(x, out := poisoned(dtype, m, k), ws, "sum")
            expected = total
        elif kind == "rs":
            host_backend.reduce_scatter(x, out := poisoned(dtype, m // w, k), ws, "sum")
            expected = part_of(total, rank, w, 0)
        else:
            host_backend.all_gather(x, out := poisoned(dtype, w * m, k), ws)
            expected = torch.cat(everybody)
        wrong += not torch.equal(out, expected)
    return wrong


class NumbersTest(unittest.TestCase):
    @parameterized.expand([(f"{name}_{w}", dtype, w) for name, dtype in DTYPES for w in (2, 3)])
    def test_matmul_reduce_scatter(self, _: str, dtype: torch.dtype, world_size: int) -> None:
        run_ranks(matmul_reduce_scatter, world_size, dtype, timeout=60)

    @parameterized.expand([(f"{name}_{w}", dtype, w) for name, dtype in DTYPES for w in (2, 3)])
    def test_all_gather_matmul(self, _: str, dtype: torch.dtype, world_size: int) -> None:
        for results in zip(*run_ranks(all_gather_matmul, world_size, dtype, timeout=60)):
            assert_same_on_all_ranks(results)

    @parameterized.expand([(f"{name}_{w}", dtype, w) for name, dtype in DTYPES for w in (2, 4)])
    def test_plain_collectives(self, _: str, dtype: torch.dtype, world_size: int) -> None:
        for results in zip(*run_ranks(plain, world_size, dtype, timeout=60)):
            assert_same_on_all_ranks(results)

    def test_refusals(self) -> None:
        run_ranks(refusals, 2, timeout=60)


class ProtocolTest(unittest.TestCase):
    @parameterized.expand([("2", 2), ("3", 3), ("4", 4)])
    def test_random_calls_and_delays(self, _: str, world_size: int) -> None:
        self.assertEqual(run_ranks(random_calls, world_size, 80, 0, timeout=120), [0] * world_size)

    @parameterized.expand([("one_half", ONE_HALF | SLOW_READER), ("no_await", NO_AWAIT)])
    def test_the_checks_see_a_broken_protocol(self, _: str, faults: int) -> None:
        results = run_ranks(random_calls, 3, 60, faults, timeout=120, env={"SYMMPATTERNS_ALLOW_FAULTS": "1"})
        self.assertGreater(sum(results), 0)


if __name__ == "__main__":
    unittest.main()
