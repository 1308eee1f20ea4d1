"""The runtime between real processes: symmetric tensors, rendezvous, workspaces, and that nothing is left behind."""

from __future__ import annotations

import gc
import os
import signal
import time
import unittest
from pathlib import Path

import torch
import torch.distributed as dist
from parameterized import parameterized

import symmpatterns
from symmpatterns.testing import Died, fake_group, run_ranks
from symmpatterns.workspace import get_workspace


def _rendezvous(rank: int, world_size: int) -> list[float]:
    tensor = symmpatterns.empty((4, 6), dtype=torch.float64)
    assert symmpatterns.is_symmetric(tensor) and not symmpatterns.is_symmetric(torch.ones(3))
    handle = symmpatterns.rendezvous(tensor)
    assert (handle.rank, handle.world_size) == (rank, world_size)
    assert handle.buffers[rank].data_ptr() == tensor.data_ptr()
    assert handle.buffer_ptrs == [b.data_ptr() for b in handle.buffers]
    tensor.fill_(rank + 1)
    handle.barrier()
    seen = [float(b.sum()) for b in handle.buffers]
    handle.barrier()
    handle.buffers[(rank + 1) % world_size][0, 0] = 100 + rank  # a store into the peer's memory
    handle.barrier()
    return [*seen, float(tensor[0, 0])]


def _views(rank: int, world_size: int) -> bool:
    tensor = symmpatterns.empty((8, 6), dtype=torch.bfloat16)
    tensor.copy_(torch.arange(48).view(8, 6) + 100 * rank)
    view = tensor[2:6].t()
    handle = symmpatterns.rendezvous(view)
    handle.barrier()
    peer = (rank + 1) % world_size
    expected = (torch.arange(48).view(8, 6) + 100 * peer).bfloat16()[2:6].t()
    same = torch.equal(handle.buffers[peer], expected)
    handle.barrier()
    return same


def _scope(rank: int, world_size: int) -> list[bool]:
    with symmpatterns.symmetric_memory():
        inside = torch.ones(1000) * 2 + torch.nn.functional.gelu(torch.randn(1000))
        with symmpatterns.symmetric_memory(dist.group.WORLD):
            nested = torch.zeros(5)
        after_nested = torch.zeros(5)
    try:
        with symmpatterns.symmetric_memory():
            raise KeyError
    except KeyError:
        pass
    outside = torch.zeros(5)
    handle = symmpatterns.rendezvous(nested)
    nested.fill_(rank)
    handle.barrier()
    peer = float(handle.buffers[(rank + 1) % world_size][0])
    handle.barrier()
    flags = [symmpatterns.is_symmetric(t) for t in (inside, nested, after_nested, outside)]
    return [*flags, peer == (rank + 1) % world_size]


def _mismatch(rank: int, world_size: int) -> str:
    try:
        symmpatterns.rendezvous(symmpatterns.empty((4 + rank,)))
    except symmpatterns.SymmetricMemoryError as error:
        return str(error)
    return "no error"


def _growth(rank: int, world_size: int) -> list[int]:
    """Calls of growing size: one workspace, whose tables keep their addresses; none of the old memory stays."""
    sizes = []
    tables = None
    for m in (4, 4096, 8, 16384, 32):
        torch.ops.symmpatterns.matmul_all_reduce(
            torch.ones(m, 4), torch.ones(4, 64), "sum", dist.group.WORLD.group_name
        )
        workspace = get_workspace(dist.group.WORLD.group_name, torch.device("cpu"))
        assert tables is None or tables == workspace.staging_ptrs.data_ptr()
        tables = workspace.staging_ptrs.data_ptr()
        sizes.append(workspace.staging_bytes)
    gc.collect()
    from symmpatterns import host_backend

    return [*sizes, host_backend.load().live_segments()]


def _names_in_shm() -> set[str]:
    return set(os.listdir("/dev/shm"))


def _killed(rank: int, world_size: int) -> tuple[str, float]:
    name = dist.group.WORLD.group_name
    op = torch.ops.symmpatterns.matmul_all_reduce
    with symmpatterns.config.patch(timeout_s=20):
        op(torch.ones(64, 64), torch.ones(64, 64), "sum", name)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        try:
            for _ in range(1000):
                op(torch.ones(64, 64), torch.ones(64, 64), "sum", name)
        except symmpatterns.SymmetricMemoryError as error:
            return str(error), time.monotonic() - begin
    return "no error", 0.0


def _descriptors(rank: int, world_size: int) -> tuple[int, int]:
    """File descriptors and mappings before and after many rendezvous."""

    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd")) + len(Path("/proc/self/maps").read_text().splitlines())

    for step in range(60):
        handle = symmpatterns.rendezvous(symmpatterns.empty((1000,)))
        handle.barrier()
        del handle
        dist.barrier()
        if step == 19:
            before = count()
    return before, count()


class RuntimeTest(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_rendezvous(self, world_size: int) -> None:
        for rank, result in enumerate(run_ranks(_rendezvous, world_size)):
            self.assertEqual(result[:-1], [24.0 * (r + 1) for r in range(world_size)])
            self.assertEqual(result[-1], 100 + (rank - 1) % world_size)

    def test_views(self) -> None:
        self.assertEqual(run_ranks(_views, 2), [True, True])

    def test_symmetric_memory_block(self) -> None:
        self.assertEqual(run_ranks(_scope, 2), [[True, True, True, False, True]] * 2)

    def test_sizes_that_differ_are_an_error_on_every_rank(self) -> None:
        for text in run_ranks(_mismatch, 2):
            self.assertRegex(text, "rank 0.*rank 1")

    def test_workspace_grows_and_frees(self) -> None:
        for *sizes, live in run_ranks(_growth, 2):
            self.assertEqual(sizes, sorted(sizes))
            self.assertGreater(sizes[-1], sizes[0])
            self.assertEqual(live, 1)

    def test_a_killed_rank_leaves_nothing_and_the_others_get_an_error(self) -> None:
        before = _names_in_shm()
        survivor, dead = run_ranks(_killed, 2, allow_death=True, timeout=60)
        self.assertIsInstance(dead, Died)
        self.assertIn("rank 1", survivor[0])
        self.assertLess(survivor[1], 20)
        self.assertEqual(_names_in_shm() - before, set())

    def test_rendezvous_leaks_neither_descriptors_nor_mappings(self) -> None:
        for before, after in run_ranks(_descriptors, 2):
            self.assertLessEqual(after, before + 2)

    def test_bad_arguments(self) -> None:
        with self.assertRaisesRegex(TypeError, "takes a tensor, not int"):
            symmpatterns.is_symmetric(3)  # type: ignore[arg-type]
        with self.assertRaisesRegex(TypeError, "takes a tensor, not str"):
            symmpatterns.rendezvous("x")  # type: ignore[arg-type]
        with self.assertRaisesRegex(symmpatterns.SymmetricMemoryError, "init_process_group"):
            symmpatterns.rendezvous(torch.ones(2))
        with self.assertRaisesRegex(symmpatterns.SymmetricMemoryError, "not for device meta"):
            symmpatterns.empty((2,), device="meta")
        with fake_group(2):
            with self.assertRaisesRegex(symmpatterns.SymmetricMemoryError, "fake backend"):
                symmpatterns.rendezvous(symmpatterns.empty((2,)))
            with self.assertRaisesRegex(TypeError, "a ProcessGroup or its name, not int"):
                symmpatterns.rendezvous(symmpatterns.empty((2,)), 3)  # type: ignore[arg-type]
            with self.assertRaisesRegex(symmpatterns.SymmetricMemoryError, "no process group named 'x'"):
                symmpatterns.rendezvous(symmpatterns.empty((2,)), "x")

    def test_ordinary_tensor_is_refused(self) -> None:
        for text in run_ranks(_ordinary, 2):
            self.assertIn("is not in symmetric memory", text)


def _ordinary(rank: int, world_size: int) -> str:
    try:
        symmpatterns.rendezvous(torch.ones(2))
    except symmpatterns.SymmetricMemoryError as error:
        return str(error)
    return "no error"
