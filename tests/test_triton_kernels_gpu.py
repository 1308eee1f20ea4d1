"""The compiled Triton kernels on real GPUs, through a real workspace: stress with exact payloads, and CUDA graphs.

The same calls run in Triton's interpreter on CPU ranks, so that this file is not first tried on the day it is needed.
"""

from __future__ import annotations

import random
import time
import unittest

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from symmpatterns.testing import gpu_world_sizes, run_ranks
from symmpatterns.triton_kernels import all_gather_matmul, matmul_all_reduce, matmul_reduce_scatter
from symmpatterns.workspace import Workspace, get_workspace

SMALL = {"M": [1, 3, 16, 40], "N": [8, 33, 64], "K": [7, 32, 40]}
LARGE = {"M": [1, 16, 63, 128, 256, 1000, 2048], "N": [64, 250, 1024, 4096], "K": [40, 512, 1001, 2048]}


def own_device(device_type: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")


class Call:
    """A random call of a family with integers, whose result is exact in every order of summation."""

    def __init__(self, rng: random.Random, workspace: Workspace, sizes: dict[str, list[int]]) -> None:
        self.family = rng.choice(["all_reduce", "reduce_scatter", "all_gather"])
        self.workspace, self.rank, world_size = workspace, workspace.rank, workspace.world_size
        self.dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
        self.dim = rng.choice([0, 0, 1])
        M, N, K = (rng.choice(sizes[name]) for name in "MNK")
        self.M = M * world_size if self.family == "reduce_scatter" and self.dim == 0 else M
        self.N = N * world_size if self.family == "reduce_scatter" and self.dim == 1 else N
        self.K, self.world_size = K, world_size
        self.K_b = K * world_size if self.family == "all_gather" and self.dim == 1 else K
        self.has_bias = rng.random() < 0.5
        self.b_transposed = rng.random() < 0.5
        self.name = f"{self.family} dim {self.dim} {self.M}x{self.N}x{self.K} {self.dtype}"
        self.allocate()
        self.fill(rng.randrange(1 << 30))

    def allocate(self) -> None:
        new = {"dtype": self.dtype, "device": self.workspace.device}
        self.a = torch.empty(self.M, self.K, **new)
        self.b = torch.empty(self.N, self.K_b, **new).t() if self.b_transposed else torch.empty(self.K_b, self.N, **new)
        self.bias = torch.empty(self.N, **new) if self.has_bias else None
        shape = {"all_reduce": (self.M, self.N), "reduce_scatter": self.blocks(self.M, self.N)}
        gathered = (self.M * self.world_size, self.K) if self.dim == 0 else (self.M, self.K * self.world_size)
        self.out = torch.empty(*shape.get(self.family, (gathered[0], self.N)), **new)
        self.gathered = torch.empty(*gathered, **new) if self.family == "all_gather" else None

    def blocks(self, M: int, N: int) -> tuple[int, int]:
        return (M // self.world_size, N) if self.dim == 0 else (M, N // self.world_size)

    def payload(self, seed: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 16 + rank)

        def integers(*shape: int) -> Tensor:
            return torch.randint(-3, 4, shape, generator=generator).to(self.dtype)

        return integers(self.M, self.K), integers(self.K_b, self.N), integers(self.N)

    def fill(self, seed: int) -> None:
        """New operands in place, and the result they must give."""
        everyone = [self.payload(seed, rank) for rank in range(self.world_size)]
        a, b, bias = everyone[self.rank]
        self.a.copy_(a)
        self.b.copy_(b)
        if self.bias is not None:
            self.bias.copy_(bias)
        self.out.fill_(float("nan"))

        def product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return (x.float() @ y.float() + (z.float() if self.has_bias else 0)).to(self.dtype)

        if self.family == "all_gather":
            self.whole = torch.cat([x for x, _, _ in everyone], self.dim)
            self.expected = product(self.whole, b, bias)
            return
        total = torch.zeros(self.M, self.N)
        for operands in everyone:
            total += product(*operands).float()
        total = total.to(self.dtype)
        self.expected = total.chunk(self.world_size, self.dim)[self.rank] if self.family == "reduce_scatter" else total

    def run(self) -> None:
        if self.family == "all_reduce":
            matmul_all_reduce.run(self.a, self.b, self.bias, self.out, self.workspace, "sum")
        elif self.family == "reduce_scatter":
            matmul_reduce_scatter.run(self.a, self.b, self.bias, self.out, self.workspace, "sum", self.dim)
        else:
            all_gather_matmul.run(self.a, [self.b], [self.out], self.gathered, self.workspace, self.dim, [self.bias])

    def check(self, when: str) -> None:
        results = [(self.out, self.expected)]
        if self.gathered is not None:
            results.append((self.gathered, self.whole))
        for actual, expected in results:
            wrong = int((actual.cpu() != expected).sum())
            if wrong:
                raise AssertionError(f"{when}: {self.name}: {wrong} of {expected.numel()} elements are wrong")


def rank_stress(rank: int, world_size: int, device_type: str, calls: int, sizes: dict[str, list[int]]) -> int:
    """Random calls, with delays, each checked bitwise; returns how many calls of the protocol were made."""
    device = own_device(device_type)
    workspace = get_workspace(dist.group.WORLD.group_name, device)
    rng, own_rng = random.Random(1), random.Random(100 + rank)
    for index in range(calls):
        call = Call(rng, workspace, sizes)
        time.sleep(own_rng.choice([0, 0, 0.01]))
        for _ in range(3):  # back to back, so that the ranks can run ahead of each other
            call.run()
        call.check(f"call {index}")
    return int(workspace.state[0])


def rank_operands(rank: int, world_size: int, device_type: str, signatures: int, sizes: dict[str, list[int]]) -> None:
    """Calls that differ in nothing but the addresses of their operands, of every family: launches are repeated."""
    device = own_device(device_type)
    workspace = get_workspace(dist.group.WORLD.group_name, device)
    for index in range(signatures):
        calls = [Call(random.Random(100 + index), workspace, sizes) for _ in range(3)]
        for round in range(2):
            for number, call in enumerate(calls):
                call.fill(1000 * index + 10 * round + number)
            for call in calls:
                call.run()
            for number, call in enumerate(calls):
                call.check(f"signature {index}, round {round}, call {number}")
    if device_type == "cuda" and not all(workspace.launches.values()):
        raise AssertionError("some launches could not be repeated")


def rank_graphs(rank: int, world_size: int) -> int:
    """Odd numbers of calls in CUDA graphs, replayed with new operands, between eager calls; returns the calls made."""
    workspace = get_workspace(dist.group.WORLD.group_name, own_device("cuda"))
    rng = random.Random(2)
    for index in range(6):
        calls = [Call(rng, workspace, LARGE) for _ in range(3)]
        for call in calls:  # compiles, and grows the workspace, which capture may not
            call.run()
            call.check(f"before graph {index}")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call.run()
        for replay in range(4):
            for call in calls:
                call.fill(rng.randrange(1 << 30))
            graph.replay()
            for call in calls:
                call.check(f"graph {index}, replay {replay}")
            calls[0].fill(rng.randrange(1 << 30))
            calls[0].run()
            calls[0].check(f"eager after graph {index}, replay {replay}")
    return int(workspace.state[0])


def rank_soak(rank: int, world_size: int, calls: int) -> None:
    """Many small and middle-sized calls back to back; the last results are checked."""
    workspace = get_workspace(dist.group.WORLD.group_name, own_device("cuda"))
    rng = random.Random(3)
    some = [Call(rng, workspace, LARGE) for _ in range(12)]
    for index in range(calls):
        some[index % len(some)].run()
    for call in some:
        call.check("soak")


class WorkspaceKernelsTest(unittest.TestCase):
    def test_interpreted_calls(self) -> None:
        epochs = run_ranks(rank_stress, 2, "cpu", 6, SMALL, timeout=250, env={"TRITON_INTERPRET": "1"})
        self.assertEqual(epochs, [18, 18])

    def _gpus(self) -> list[int]:
        return gpu_world_sizes() or self.skipTest("needs a CUDA GPU")

    @pytest.mark.gpu
    def test_compiled_calls(self) -> None:
        for world_size in self._gpus():
            with self.subTest(world_size):
                epochs = run_ranks(rank_stress, world_size, "cuda", 60, LARGE, timeout=290, backend="nccl")
                self.assertEqual(epochs, [180] * world_size)

    def test_interpreted_operands(self) -> None:
        run_ranks(rank_operands, 2, "cpu", 2, SMALL, timeout=250, env={"TRITON_INTERPRET": "1"})

    @pytest.mark.gpu
    def test_compiled_operands(self) -> None:
        for world_size in self._gpus():
            with self.subTest(world_size):
                run_ranks(rank_operands, world_size, "cuda", 24, LARGE, timeout=290, backend="nccl")

    @pytest.mark.gpu
    def test_cuda_graphs(self) -> None:
        for world_size in self._gpus():
            with self.subTest(world_size):
                epochs = run_ranks(rank_graphs, world_size, timeout=290, backend="nccl")
                self.assertEqual(epochs, [6 * (3 + 4 * 4)] * world_size)

    @pytest.mark.gpu
    @pytest.mark.slow
    def test_soak(self) -> None:
        for world_size in self._gpus():
            with self.subTest(world_size):
                run_ranks(rank_soak, world_size, 10_000, timeout=290, backend="nccl")


if __name__ == "__main__":
    unittest.main()
