"""The families over copies and barriers: the steps run between CPU processes, with Triton's interpreter for the kernels."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parameterized import parameterized
from torch import Tensor

import symmpatterns
from symmpatterns import compat, tables
from symmpatterns.operators import _kernels
from symmpatterns.testing import gpu_world_sizes, run_ranks
from symmpatterns.workspace import get_workspace

INTERPRETER = {"TRITON_INTERPRET": "1"}


def name() -> str:
    return dist.group.WORLD.group_name


def integers(seed: int, rank: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Small ones, so that sums are exact in every order and dtype."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def wrong_elements(
    family: str, seed: int, rank: int, world_size: int, device: str, sizes: tuple[int, int, int], options: dict
) -> int:
    """One call of a family with exact payloads; how many elements are not as they must be."""
    M, N, K = sizes
    dtype = options.get("dtype", torch.bfloat16)
    out_dtype = options.get("out")
    ops = torch.ops.symmpatterns

    def operands(of: int) -> tuple[Tensor, Tensor, Tensor]:
        a = integers(seed, of, M, K, dtype=dtype)
        return a, integers(seed + 1, of, K, N, dtype=dtype), integers(seed + 2, of, N, dtype=dtype)

    a, b, bias = (each.to(device) for each in operands(rank))
    if not options.get("bias"):
        bias = None
    if options.get("transposed"):
        b = b.t().contiguous().t()

    def product(of: int) -> Tensor:
        x, y, z = (each.float() for each in operands(of))
        return x @ y + (z if options.get("bias") else 0)

    op = options.get("op", "sum")
    if family == "all_gather":
        whole = torch.cat([operands(of)[0] for of in range(world_size)])
        bs = [b, b[:, : N // 2]]
        gathered, outs = ops.all_gather_matmul(a, bs, 0, name(), True, biases=None if bias is None else [bias, None])
        expected = [whole.float() @ b.cpu().float(), whole.float() @ bs[1].cpu().float()]
        if bias is not None:
            expected[0] += bias.cpu().float()
        pairs = [(gathered, whole), *zip(outs, expected)]
    else:
        total = sum(product(of).to(dtype).float() for of in range(world_size))
        total = total / world_size if op == "avg" else total
        if family == "all_reduce":
            pairs = [(ops.matmul_all_reduce(a, b, op, name(), bias=bias, out_dtype=out_dtype), total)]
        else:
            dim = options.get("dim", 0)
            result = ops.matmul_reduce_scatter(a, b, op, dim, name(), bias=bias, out_dtype=out_dtype)
            pairs = [(result, total.chunk(world_size, dim)[rank])]
    return sum(int((got.cpu() != want.to(got.dtype)).sum()) for got, want in pairs)


CASES: list[tuple[str, tuple[int, int, int], dict]] = [
    ("all_reduce", (256, 64, 40), {}),
    ("all_reduce", (385, 33, 40), {"bias": True, "transposed": True}),  # rows that do not divide
    ("all_reduce", (3, 16, 40), {"op": "avg"}),  # a rank has one row, or none
    ("all_reduce", (300, 64, 40), {"out": torch.float32, "dtype": torch.float16}),
    ("reduce_scatter", (1536, 32, 24), {"bias": True}),
    ("reduce_scatter", (132, 48, 40), {"dim": 1, "op": "avg", "bias": True}),
    ("all_gather", (65, 48, 40), {"bias": True}),
    ("all_gather", (128, 32, 24), {"transposed": True}),
]


def write_table(folder: str, device: str, choice: dict, world_sizes: tuple[int, ...] = (2, 3, 4)) -> str:
    """A user's table that makes `choice` for every family and size."""
    entries = [
        {"family": family, "device": device, "world_size": world_size, "dtype": dtype, "size": [m, n, 64], "choice": choice}
        for family in ("matmul_all_reduce", "matmul_reduce_scatter", "all_gather_matmul")
        for world_size in world_sizes
        for dtype in ("bfloat16",)
        for m in (4, 32, 256, 1024)
        for n in (16, 64, 256)
    ]  # fmt: skip
    path = Path(folder) / "tuning.json"
    path.write_text(json.dumps({"choices": entries}))
    return str(path)


def variants_used() -> set[str]:
    """The modules of the implementations that were chosen."""
    workspace = get_workspace(name(), torch.device("cpu"))
    implementations = [each for known in workspace.ready.values() for each in known if callable(each)]
    return {getattr(each, "func", each).__module__.rpartition(".")[2] for each in implementations}


def rank_cases(rank: int, world_size: int, rounds: int) -> tuple[list[str], set[str]]:
    """What went wrong. Calls of one kernel without copies stand between, so that epochs and halves go on."""
    wrong = []
    rng = random.Random(rank)
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(
            folder, "cpu", {"variant": "copy_engine", "options": {"parts": 3, "tail": 64, "library": 0}}
        )
        with symmpatterns.config.patch(host_kernels="triton", tuning_table=table, timeout_s=60):
            for round in range(rounds):
                for index, (family, sizes, options) in enumerate(CASES):
                    M, N, K = sizes
                    if family == "reduce_scatter":  # sizes that divide
                        M, N = M // 12 * world_size, N // 12 * world_size
                    time.sleep(rng.choice([0, 0, 0.02]))
                    count = wrong_elements(
                        family, 50 * round + 5 * index, rank, world_size, "cpu", (M, N, K), options
                    )  # fmt: skip
                    if count:
                        wrong.append(f"round {round}, {family} {sizes} {options}: {count} elements")
            used = variants_used()
    return wrong, used


def rank_dawdles(rank: int, world_size: int, without: str) -> int:
    """Rank 1 copies and sums late in every call; how many elements are wrong.

    Without the barrier at the start rank 0 is in the next call when rank 1 sums, and its copies lie where rank 1 reads.
    Without the barriers behind copies rank 0 sums what rank 1 has not copied.
    """
    from symmpatterns.copy_engine import families, relay

    original, steps = families._sum, relay.Relay._steps

    def late(*args: object) -> None:
        if rank == 1:
            time.sleep(0.3)
        original(*args)

    def copy(self: relay.Relay, copies: Iterable[tuple[Tensor, Tensor]]) -> None:
        copies = list(copies)
        if without != "arrival" or not copies:
            return steps(self, copies)
        time.sleep(0.3 * (rank == 1))
        for target, source in copies:
            target.copy_(source)

    wrong = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(families, "_sum", late),
        mock.patch.object(relay.Relay, "_steps", copy),
    ):
        table = write_table(folder, "cpu", {"variant": "copy_engine", "options": {"parts": 1}})
        with symmpatterns.config.patch(host_kernels="triton", tuning_table=table, timeout_s=60):
            begin = (lambda self: None) if without == "begin" else relay.Relay.begin
            with mock.patch.object(relay.Relay, "begin", begin):
                for seed in range(4):
                    wrong += wrong_elements("reduce_scatter", seed, rank, world_size, "cpu", (64, 16, 40), {})
    return wrong


def rank_with_own_table(rank: int, world_size: int) -> set[str]:
    """Only rank 0 has a table that wants copies."""
    with tempfile.TemporaryDirectory() as folder:
        variant = "copy_engine" if rank == 0 else "kernel"
        table = write_table(folder, "cpu", {"variant": variant})
        with symmpatterns.config.patch(host_kernels="triton", tuning_table=table, timeout_s=60):
            assert wrong_elements("all_reduce", 1, rank, world_size, "cpu", (32, 16, 40), {}) == 0
            return variants_used()


class CopyEngineTest(unittest.TestCase):
    @parameterized.expand([(2, 2), (3, 1)])
    def test_results_are_exact(self, world_size: int, rounds: int) -> None:
        for wrong, used in run_ranks(rank_cases, world_size, rounds, timeout=250, env=INTERPRETER):
            self.assertEqual(wrong, [])
            self.assertIn("families", used)

    def test_a_rank_that_dawdles(self) -> None:
        self.assertEqual(run_ranks(rank_dawdles, 2, "", timeout=120, env=INTERPRETER), [0, 0])

    @parameterized.expand([("begin", 1), ("arrival", 0)])
    def test_the_barriers_are_needed(self, without: str, who_is_wrong: int) -> None:
        self.assertGreater(run_ranks(rank_dawdles, 2, without, timeout=120, env=INTERPRETER)[who_is_wrong], 0)

    def test_rank_0_chooses(self) -> None:
        self.assertEqual(run_ranks(rank_with_own_table, 2, timeout=120, env=INTERPRETER), [{"families"}] * 2)


def scaled_product(*arguments: object) -> bool:
    from symmpatterns.copy_engine import families  # not before ranks with an interpreter have been started

    return families._scaled_product(*arguments)


class LibraryTest(unittest.TestCase):
    """Products of float8 matrices by the vendor's routine."""

    def operands(
        self, rows: int, inner: int, columns: int, by_row: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        float8 = torch.float8_e4m3fn
        a, b = integers(0, 0, rows, inner, dtype=float8), integers(1, 0, columns, inner, dtype=float8).t()
        scales = (2.0 ** torch.arange(rows).remainder(3), 2.0 ** torch.arange(columns).remainder(2) / 4)
        return a, b, scales if by_row else (scales[0][1:2], scales[1][:1])

    @parameterized.expand([(False, False), (True, False), (False, True), (True, True)])
    def test_values(self, by_row: bool, with_bias: bool) -> None:
        if by_row and compat.torch_version() < (2, 13):
            self.skipTest("torch scales no rows of CPU tensors")
        a, b, scales = self.operands(24, 32, 48, by_row)
        bias = integers(2, 0, 48, dtype=torch.bfloat16) if with_bias else None
        out = torch.empty(24, 48, dtype=torch.bfloat16)
        self.assertTrue(scaled_product(a, b, bias, scales, out))
        scale_a, scale_b = (scale.reshape(shape) for scale, shape in zip(scales, ((-1, 1), (1, -1))))
        expected = (a.float() * scale_a) @ (b.float() * scale_b) + (0 if bias is None else bias.float())
        torch.testing.assert_close(out, expected.bfloat16(), rtol=1e-2, atol=0)

    @parameterized.expand(
        [
            ("K", (24, 24, 48), torch.bfloat16, True),
            ("N", (24, 32, 40), torch.bfloat16, True),
            ("dtype", (24, 32, 48), torch.float32, True),
            ("row by row", (24, 32, 48), torch.bfloat16, False),
        ]
    )
    def test_what_it_does_not_take(
        self, _: str, sizes: tuple[int, int, int], dtype: torch.dtype, columns: bool
    ) -> None:
        a, b, scales = self.operands(*sizes, False)
        b = b if columns else b.contiguous()
        self.assertFalse(scaled_product(a, b, None, scales, torch.empty(sizes[0], sizes[2], dtype=dtype)))


class CurrentDeviceTest(unittest.TestCase):
    def test_another_one_is_an_error_before_anything_is_launched(self) -> None:
        from symmpatterns.copy_engine import relay

        workspace = mock.Mock(device=torch.device("cuda", 1), launches={})
        with (
            mock.patch.object(compat, "current_cuda_device", lambda: 0),
            mock.patch.object(torch.cuda, "current_device", lambda: 0),
            self.assertRaisesRegex(ValueError, r"operands are on cuda:1, the current device is cuda:0.*set_device"),
        ):
            relay.Relay(workspace, 16)
        self.assertEqual(workspace.method_calls, [])


class PiecesTest(unittest.TestCase):
    @parameterized.expand(
        [
            (1024, 2, 0, False, [(0, 512), (512, 512)]),
            (1000, 2, 0, False, [(0, 512), (512, 488)]),
            (1024, 2, 128, True, [(0, 512), (512, 384), (896, 128)]),
            (1024, 2, 128, False, [(0, 512), (512, 512)]),
            (5, 2, 128, True, [(0, 5)]),
            (0, 2, 128, True, [(0, 0)]),
        ]
    )
    def test_cut(self, rows: int, count: int, tail: int, last: bool, expected: list[tuple[int, int]]) -> None:
        from symmpatterns.copy_engine.families import Pieces

        self.assertEqual(Pieces(count, tail).of(rows, last), tuple(expected))


class TableTest(unittest.TestCase):
    def choice(self, table: object, size: tuple[int, int, int] = (256, 64, 64)) -> _kernels.Choice:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mine.json"
            path.write_text(table if isinstance(table, str) else json.dumps(table))
            with symmpatterns.config.patch(tuning_table=str(path)):
                return _kernels.choice_of(
                    "matmul_all_reduce", size, torch.bfloat16, 1 << 30, 2, torch.device("cpu")
                )  # fmt: skip

    def entry(self, choice: object) -> dict:
        keys = {"family": "matmul_all_reduce", "device": "cpu", "world_size": 2, "dtype": "bfloat16"}
        return {**keys, "size": [256, 64, 64], "choice": choice}

    def test_the_nearest_entry_is_taken(self) -> None:
        copies = self.entry({"variant": "copy_engine", "options": {"parts": 3}})
        self.assertEqual(self.choice({"choices": [copies]}), ("copy_engine", {"parts": 3}))
        self.assertEqual(str(self.choice({"choices": [copies]})), "copy_engine parts=3")
        self.assertEqual(self.choice({"choices": [copies]}, (2048, 64, 64)), ("kernel", {}))
        self.assertEqual(self.choice({}), ("kernel", {}))

    @parameterized.expand(
        [
            ("not json", "{", "is no tuning table"),
            ("no list", {"choices": 3}, "is no tuning table"),
            ("a key is missing", {"choices": [{"family": "x"}]}, "an entry needs"),
            ("no variant", {"choices": [{}]}, "an entry needs"),
        ]
    )
    def test_bad_files(self, _: str, table: object, message: str) -> None:
        with self.assertRaisesRegex(ValueError, message):
            self.choice(table)

    @parameterized.expand(
        [
            ("variant", {"variant": "magic"}),
            ("option", {"variant": "copy_engine", "options": {"row": 1}}),
            ("value", {"variant": "copy_engine", "options": {"parts": "many"}}),
            ("nothing", {}),
        ]
    )
    def test_bad_choices(self, _: str, choice: dict) -> None:
        with self.assertRaisesRegex(ValueError, "is no choice"):
            self.choice({"choices": [self.entry(choice)]})

    def test_a_file_that_does_not_exist(self) -> None:
        with symmpatterns.config.patch(tuning_table="/nowhere/tuning.json"):
            with self.assertRaisesRegex(ValueError, "there is no file /nowhere/tuning.json"):
                tables.nearest("choices", "matmul_all_reduce", (1, 1, 1), torch.bfloat16, "cpu")

    def test_shipped_choices_are_understood(self) -> None:
        for entry in tables._shipped("choices"):
            _kernels._check(_kernels.Choice(entry["choice"]["variant"], entry["choice"].get("options", {})))


class TuneTest(unittest.TestCase):
    @pytest.mark.slow
    def test_its_table_is_what_the_operators_read(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tuning.json"
            path.write_text(json.dumps({"choices": [], "measured": [{"family": "kept"}]}))
            command = [
                sys.executable,
                "-m",
                "symmpatterns",
                "tune",
                "--shapes",
                "256x32x32",
                "--rounds",
                "2",
                "--no-rows",
            ]
            run = subprocess.run(
                [*command, "--output", str(path)], env={**os.environ, **INTERPRETER}, capture_output=True, text=True,
                timeout=250,
            )  # fmt: skip
            self.assertEqual(run.returncode, 0, run.stderr)
            written = json.loads(path.read_text())
            self.assertIn({"family": "kept"}, written["measured"])
            self.assertEqual(len(written["choices"]), 3)
            path.write_text(json.dumps({"choices": written["choices"], "measured": written["measured"][1:]}))
            with symmpatterns.config.patch(tuning_table=str(path)):
                for entry in written["choices"]:
                    size, device = tuple(entry["size"]), torch.device("cpu")
                    choice = _kernels.choice_of(entry["family"], size, torch.bfloat16, 0, 2, device)
                    self.assertEqual(choice, (entry["choice"]["variant"], entry["choice"]["options"]))


def rank_on_gpu(rank: int, world_size: int) -> list[str]:
    """Calls, odd CUDA graphs and calls between them, of all families, by copies."""
    device = torch.device("cuda", torch.cuda.current_device())
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(
            folder, tables.device_name(device), {"variant": "copy_engine", "options": {"parts": 3, "tail": 128}}
        )
        with symmpatterns.config.patch(tuning_table=table, timeout_s=60):
            for round in range(20):
                for index, (family, sizes, options) in enumerate(CASES):
                    M, N, K = sizes
                    if family == "reduce_scatter":
                        M, N = M // 12 * world_size, N // 12 * world_size
                    count = wrong_elements(
                        family, 50 * round + 5 * index, rank, world_size, str(device), (M, N, K), options
                    )  # fmt: skip
                    if count:
                        wrong.append(f"round {round}, {family} {sizes} {options}: {count} elements")
            wrong += graphs_of_copies(rank, world_size, device)
            wrong += first_work_of_a_thread(rank, world_size, device)
    return wrong


def first_work_of_a_thread(rank: int, world_size: int, device: torch.device) -> list[str]:
    """A thread that has not used CUDA yet (autograd's may be one) has no context of it."""
    a, b = torch.ones(256, 64, device=device).bfloat16(), torch.ones(64, 256, device=device).bfloat16()
    results = []

    def work() -> None:
        if device.index != 0:
            torch.cuda.set_device(device)
        results.append(torch.ops.symmpatterns.all_gather_matmul(a, [b], 0, name(), True)[1][0])
        torch.cuda.current_stream().synchronize()

    for _ in range(2):  # only the second finds everything made already
        thread = threading.Thread(target=work)
        torch.cuda.synchronize()
        thread.start()
        thread.join()
    expected = torch.full((256 * world_size, 256), 64.0, dtype=torch.bfloat16)
    right = len(results) == 2 and all(torch.equal(each.cpu(), expected) for each in results)
    return [] if right else ["first work of a thread"]


def graphs_of_copies(rank: int, world_size: int, device: torch.device) -> list[str]:
    M, N, K = 1024, 256, 64
    a, b = (
        torch.empty(M, K, device=device, dtype=torch.bfloat16),
        torch.empty(K, N, device=device, dtype=torch.bfloat16),
    )
    op = torch.ops.symmpatterns.matmul_all_reduce

    def fill(seed: int) -> Tensor:
        a.copy_(integers(seed, rank, M, K, dtype=torch.bfloat16))
        b.copy_(integers(seed + 1, rank, K, N, dtype=torch.bfloat16))
        products = [
            integers(seed, of, M, K, dtype=torch.float32) @ integers(seed + 1, of, K, N, dtype=torch.float32)
            for of in range(world_size)
        ]
        return sum(p.bfloat16().float() for p in products).bfloat16()

    wrong = []
    expected = fill(7)
    for _ in range(3):
        op(a, b, "sum", name())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            captured = op(a, b, "sum", name())
    # More memory than the graph was captured with: the graph keeps what it has.
    large = torch.zeros(8 * M, K, device=device, dtype=torch.bfloat16)
    op(large, b, "sum", name())
    for replay in range(6):
        expected = fill(100 + 2 * replay)
        graph.replay()
        if not torch.equal(captured.cpu(), expected):
            wrong.append(f"replay {replay}")
        if not torch.equal(op(a, b, "sum", name()).cpu(), expected):
            wrong.append(f"eager after replay {replay}")
    return wrong


@pytest.mark.gpu
class CopyEngineOnGpusTest(unittest.TestCase):
    def test_results_are_exact(self) -> None:
        for world_size in gpu_world_sizes() or self.skipTest("needs a CUDA GPU"):
            with self.subTest(world_size):
                self.assertEqual(run_ranks(rank_on_gpu, world_size, timeout=290, backend="nccl"), [[]] * world_size)


if __name__ == "__main__":
    unittest.main()
