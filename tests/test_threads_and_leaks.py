"""Threads, load and limits: what is safe, what is refused, and that nothing grows."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import stat
import threading
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import symmpatterns
from symmpatterns import SymmetricMemoryError, config, cost_model, fusion_aware_alloc, host_backend
from symmpatterns.peer_views import slots
from symmpatterns.testing import run_ranks
from tests.allocation_operators import sum_ranks
from tests.families import FAMILIES, PROGRAMS, that_took

operators: Any = torch.ops.symmpatterns
CPU = torch.device("cpu")


def setUpModule() -> None:
    host_backend.build()  # before the ranks' time limits run


# --- threads --------------------------------------------------------------------------------------------------------


def _in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Runs them at once; what each returned or raised."""
    ended: list[Any] = [None] * len(functions)

    def run(index: int) -> None:
        try:
            ended[index] = functions[index]()
        except Exception as error:
            ended[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def _program(group: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(funcol.all_reduce(x @ w, "sum", group))
        return funcol.all_gather_tensor(y * 2, 0, group) + sum_ranks(y.sin(), group.group_name).sum()

    return fn


def _two_threads_two_groups(rank: int, world_size: int) -> list[Any]:
    """Each thread has a group, compiles and runs; the ranks start them in different orders."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    x, w = torch.full((2, 4), rank + 0.5), torch.eye(4) / 3

    def work(index: int) -> bool:
        compiled = torch.compile(_program(groups[index]))
        results = [compiled(x + index, w) for _ in range(20)]
        y = torch.tanh(sum((torch.full((2, 4), r + 0.5) + index) @ w for r in range(2)))
        expected = torch.cat([y * 2] * 2) + (2 * y.sin()).sum()
        return all(torch.allclose(result, expected, atol=1e-5) for result in results)

    with config.patch(force=True, keep_overlap=False, timeout_s=60):
        order = [0, 1] if rank == 0 else [1, 0]
        return [repr(each) for each in _in_threads(*(lambda index=index: work(index) for index in order))]


def _two_threads_one_group(rank: int, world_size: int) -> list[str]:
    """A second thread in the middle of a call, of an operator and of a graph with peer views."""
    ended = []
    name = dist.new_group([0, 1]).group_name
    a = torch.ones(4, 4)
    operators.matmul_all_reduce(a, a, "sum", name)
    for step, call in enumerate((_slow_operator, _open_graph)):
        begun = threading.Event()
        first, second = _in_threads(
            lambda c=call, e=begun: c(rank, name, e), lambda e=begun, s=step: _intrude(s, name, e)
        )
        ended.append(f"{type(second).__name__}: {second}")
        assert not isinstance(first, Exception), first
    return ended


def _slow_operator(rank: int, name: str, begun: threading.Event) -> None:
    threading.Timer(0.1, begun.set).start()
    time.sleep(0.0 if rank == 0 else 0.6)  # the other waits inside the call
    if rank == 1:
        begun.set()
    out = operators.matmul_all_reduce(torch.ones(4, 4), torch.ones(4, 4), "sum", name)
    assert bool((out == 8).all())


def _open_graph(rank: int, name: str, begun: threading.Event) -> None:
    (target,) = operators.peer_buffers("pull float32 1", [4], CPU, name)
    begun.set()
    time.sleep(0.4)
    operators.store_(target, torch.full((4,), float(rank)))
    operators.barrier_([target], name)
    parts = operators.peer_sources([target], "pull float32 1", [4], 0, name)
    assert [float(part[0]) for part in parts] == [0.0, 1.0]


def _intrude(step: int, name: str, begun: threading.Event) -> None:
    assert begun.wait(30)
    if step == 0:
        if dist.get_rank() == 1:
            raise SymmetricMemoryError("another thread is in a call")  # this rank's first thread is not inside yet
        operators.matmul_all_reduce(torch.ones(4, 4), torch.ones(4, 4), "sum", name)
    else:
        operators.peer_buffers("pull float32 1", [4], CPU, name)


def _backward_in_another_thread(rank: int, world_size: int) -> bool:
    """Calls of one group may move from thread to thread, one after the other."""
    group = dist.group.WORLD
    x = torch.full((4, 4), rank + 1.0, requires_grad=True)

    def fn(x: torch.Tensor) -> torch.Tensor:
        return funcol.reduce_scatter_tensor_autograd(torch.sin(x).repeat(world_size, 1), "sum", 0, group) * 2

    with config.patch(force=True, keep_overlap=False):
        compiled = torch.compile(fn)
        for _ in range(3):
            x.grad = None
            (loss,) = _in_threads(lambda: compiled(x).sum())
            (nothing,) = _in_threads(loss.backward)
            assert nothing is None, nothing
    expected = 2 * world_size * torch.cos(x)  # its part of every rank's repeated rows
    return torch.allclose(x.grad, expected, atol=1e-5)


class ThreadsTest(unittest.TestCase):
    def test_threads(self) -> None:
        for safe, refused, moved in run_ranks(_threads, 2, timeout=200):
            self.assertEqual(safe, ["True", "True"])
            self.assertTrue(moved)
            self.assertRegex(refused[0], "SymmetricMemoryError.*another thread is in a call")
            self.assertRegex(refused[1], "SymmetricMemoryError.*two threads run compiled functions")


def _threads(rank: int, world_size: int) -> tuple[list[str], list[str], bool]:
    safe = _two_threads_two_groups(rank, world_size)
    return safe, _two_threads_one_group(rank, world_size), _backward_in_another_thread(rank, world_size)


# --- what is left behind ----------------------------------------------------------------------------------------------


def _held() -> dict[str, int]:
    """What this process holds of everything that could leak."""
    gc.collect()
    backend = host_backend.load()
    backend.trim()
    maps = Path("/proc/self/maps").read_text()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "segments": backend.live_segments(),
        "mapped bytes": backend.mapped_bytes(),
        "mappings of segments": maps.count("memfd:symmpatterns"),
        "pool buffers": fusion_aware_alloc.live_buffers(),
        "pool bytes": fusion_aware_alloc.live_bytes(),
        "slot bytes": slots.live_bytes(),
        "threads": threading.active_count(),
    }


def _held_on_gpu() -> dict[str, int]:
    """The same of a process with a GPU of its own."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "pool buffers": fusion_aware_alloc.live_buffers(),
        "pool bytes": fusion_aware_alloc.live_bytes(),
        "slot bytes": slots.live_bytes(),
        "GPU bytes": total - free,
    }


def _drop_graphs(
    rank: int, world_size: int, graphs: int, on_gpu: bool = False
) -> tuple[dict[str, int], dict[str, int], list[int]]:
    """Compiles, runs and drops; what is held after the first ones and at the end, and the resident KiB on the way."""
    group = dist.group.WORLD
    measure = _held_on_gpu if on_gpu else _held
    x = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16) if on_gpu else torch.ones(4, 4)
    resident = []
    held: dict[str, int] = {}
    programs = list(PROGRAMS.values())

    def make(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        # As many sources as families, so that Inductor's own caches (of what it compiled, and of modules) do not grow
        # with the graphs.
        first, second = programs[number % len(programs)], programs[(number + 1) % len(programs)]
        return lambda x: first(x, group).sum() + second(x, group)

    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch(force=True, keep_overlap=False))
        if on_gpu:  # where nothing was measured for so few rows
            verdict = cost_model.Verdict(True, "every family is wanted")
            stack.enter_context(mock.patch.object(cost_model, "all_reduce_rms_norm", return_value=verdict))
        for number in range(graphs):
            compiled = torch.compile(make(number))
            compiled(x)
            del compiled
            torch._dynamo.reset()
            if (number + 1) % 10 == 0 and not held:
                held = measure()
            if (number + 1) % 10 == 0:
                gc.collect()
                resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 10)
    taken = that_took(symmpatterns.report().rewrites)
    assert taken == set(FAMILIES), taken
    return held, measure(), resident


def _groups_come_and_go(rank: int, world_size: int) -> tuple[dict[str, int], dict[str, int]]:
    held = {}
    for number in range(30):
        group = dist.new_group([0, 1])
        name = group.group_name
        operators.matmul_all_reduce(torch.ones(4, 4), torch.ones(4, 4), "sum", name)
        operators.all_reduce_rms_norm(torch.ones(4, 4), None, None, 0.0, "sum", name)
        (target,) = operators.peer_buffers("pull float32 1", [100_000], CPU, name)
        operators.barrier_([target], name)
        del target
        dist.destroy_process_group(group)
        if number == 9:
            held = _held()
    return held, _held()


class LeaksTest(unittest.TestCase):
    def check_graphs(self, graphs: int, growth_kib: int) -> None:
        before = set(os.listdir("/dev/shm"))
        for early, late, resident in run_ranks(_drop_graphs, 2, graphs, timeout=3600):
            for name, amount in late.items():
                self.assertLessEqual(amount, early[name], name)
            self.assertLess(resident[-1] - resident[len(resident) // 4], growth_kib, resident)
        self.assertLessEqual(set(os.listdir("/dev/shm")), before)

    @pytest.mark.slow
    def test_twenty_graphs_leave_nothing(self) -> None:
        self.check_graphs(20, 60 << 10)

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_two_hundred_graphs_leave_nothing(self) -> None:
        self.check_graphs(200, 100 << 10)

    @pytest.mark.gpu
    def test_graphs_leave_nothing_on_gpus(self) -> None:
        if torch.cuda.device_count() < 2:
            self.skipTest("needs two CUDA GPUs")
        for early, late, _ in run_ranks(_drop_graphs, 2, 40, True, backend="nccl", timeout=290):
            for name, amount in late.items():
                self.assertLessEqual(amount, early[name], name)

    def test_groups_leave_nothing(self) -> None:
        for early, late in run_ranks(_groups_come_and_go, 2, timeout=120):
            for name, amount in late.items():
                self.assertLessEqual(amount, early[name], name)


# --- limits and load ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _limited(kind: int, value: int) -> Any:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def _limits(rank: int, world_size: int) -> dict[str, str]:
    """Memory that cannot be had, on one rank and on all: an error on every rank, and the group goes on where it can."""
    ended = {}
    open_files = len(os.listdir("/proc/self/fd"))

    def attempt(name: str, limit: Any, call: Callable[[str], Any]) -> None:
        group = dist.new_group([0, 1]).group_name
        operators.matmul_all_reduce(torch.ones(4, 4), torch.ones(4, 4), "sum", group)
        with config.patch(timeout_s=1.5):
            try:
                with limit:
                    call(group)
                ended[name] = "nothing"
            except RuntimeError as error:
                ended[name] = f"{type(error).__name__}: {error}"
        dist.barrier()

    def grow(group: str) -> Any:
        return operators.matmul_all_reduce(torch.ones(2048, 1), torch.ones(1, 2048), "sum", group)

    def fetch(group: str) -> Any:
        return operators.peer_buffers("pull float32 1", [1 << 22], CPU, group)

    file_size, nothing = resource.RLIMIT_FSIZE, contextlib.nullcontext()
    attempt("all, file size", _limited(file_size, 1 << 20), grow)
    attempt("one, file size", _limited(file_size, 1 << 20) if rank else nothing, grow)
    attempt("slots, file size", _limited(file_size, 1 << 20), fetch)
    attempt("all, descriptors", _limited(resource.RLIMIT_NOFILE, open_files), grow)
    group = dist.new_group([0, 1]).group_name
    ended["afterwards"] = str(bool((grow(group) == 2).all()))
    return ended


def _crowd(rank: int, world_size: int) -> bool:
    """Eight ranks on whatever cores there are, one of them slow."""
    name = dist.group.WORLD.group_name
    right = True
    for call in range(60):
        if rank == call % world_size:
            time.sleep(0.005)
        out = operators.matmul_all_reduce(torch.full((8, 4), float(call + rank)), torch.ones(4, 8), "sum", name)
        right &= bool((out == 4 * sum(call + r for r in range(world_size))).all())
        sizes = [call % 7 + 1]
        (target,) = operators.peer_buffers("pull float32 1 sum", sizes, CPU, name)
        operators.store_(target, torch.full(sizes, float(call * rank)))
        operators.barrier_([target], name)
        parts = operators.peer_sources([target], "pull float32 1 sum", sizes, 0, name)
        right &= [float(part[0]) for part in parts] == [float(call * r) for r in range(world_size)]
    return right


class LoadTest(unittest.TestCase):
    def test_limits(self) -> None:
        for rank, ended in enumerate(run_ranks(_limits, 2, timeout=100)):
            with self.subTest(rank=rank):
                self.assertRegex(
                    ended["all, file size"],
                    "SymmetricMemoryError: cannot allocate .* (fallocate|ftruncate): File too large",
                )
                self.assertRegex(ended["slots, file size"], "SymmetricMemoryError: cannot allocate")
                self.assertRegex(ended["all, descriptors"], "SymmetricMemoryError: .*raise `ulimit -n`")
                one = "cannot allocate" if rank else "did not come|rank 1 .* cannot allocate|waited .* for rank 1"
                self.assertRegex(ended["one, file size"], one)
                self.assertEqual(ended["afterwards"], "True")

    def test_more_ranks_than_cores(self) -> None:
        self.assertEqual(run_ranks(_crowd, 8, timeout=120), [True] * 8)


# --- who can reach the memory -----------------------------------------------------------------------------------------


def _memory_is_private(rank: int, world_size: int) -> dict[str, Any]:
    before = set(os.listdir("/dev/shm"))
    tensor = symmpatterns.empty((5000,))
    links = {
        fd: os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if Path(f"/proc/self/fd/{fd}").exists()
    }
    segments = [fd for fd, target in links.items() if target.startswith("/memfd:symmpatterns")]
    found = [os.stat(f"/proc/self/fd/{fd}") for fd in segments]
    seals = [__import__("fcntl").fcntl(int(fd), 1034) for fd in segments]  # F_GET_SEALS
    handle = symmpatterns.rendezvous(tensor)
    handle.barrier()
    named = set(os.listdir("/dev/shm")) - before
    truncated = "nothing"
    try:
        os.ftruncate(int(segments[0]), 4096)
    except OSError as error:
        truncated = type(error).__name__
    return {
        "modes": [oct(stat.S_IMODE(each.st_mode)) for each in found],
        "users": [each.st_uid == os.geteuid() for each in found],
        "directory": oct(stat.S_IMODE(os.stat("/proc/self/fd").st_mode)),
        "sealed": [bool(seal & 0x2 and seal & 0x4) for seal in seals],  # F_SEAL_SHRINK, F_SEAL_GROW
        "links": [each.st_nlink for each in found],
        "inherited": [os.get_inheritable(int(fd)) for fd in segments],
        "names in /dev/shm": sorted(named),
        "truncated": truncated,
    }


def _lies_in_the_store(rank: int, world_size: int) -> str:
    """A member that publishes what is not its memory: its peer refuses."""
    from symmpatterns import compat
    from symmpatterns.groups import get_group

    resolved = get_group(None)
    symmpatterns.rendezvous(symmpatterns.empty((4,))).barrier()
    dist.barrier()
    store = dist.PrefixStore(resolved.unique_name + "/rendezvous", compat.group_store(resolved.pg))
    if rank == 1:
        # What rank 1 would publish for the next rendezvous, with descriptor 0 (whatever that is) in place of the memory.
        published = f"{host_identity()} {os.getpid()} {_started()} 0 1 1 {os.geteuid()} 16 9216"
        store.set(f"symmpatterns/host/{resolved.unique_name}/1/memory/1", published)
        store.set(f"symmpatterns/host/{resolved.unique_name}/1/mapped/1", "")
        time.sleep(2)
        return ""
    try:
        with config.patch(timeout_s=10):
            symmpatterns.rendezvous(symmpatterns.empty((4,)))
    except SymmetricMemoryError as error:
        return str(error)
    return "accepted"


def host_identity() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "," + os.readlink("/proc/self/ns/pid")


def _started() -> str:
    return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]


class SecurityTest(unittest.TestCase):
    def test_memory_is_private(self) -> None:
        for found in run_ranks(_memory_is_private, 2, timeout=60):
            self.assertEqual(set(found["modes"]), {"0o600"})
            self.assertEqual(found["directory"], "0o500")
            self.assertTrue(all(found["users"]) and all(found["sealed"]))
            self.assertEqual(set(found["links"]), {0})  # no name in any file system
            self.assertEqual(set(found["inherited"]), {False})
            self.assertEqual(found["names in /dev/shm"], [])
            self.assertEqual(found["truncated"], "PermissionError")

    def test_what_the_store_says_is_checked(self) -> None:
        text = run_ranks(_lies_in_the_store, 2, timeout=60)[0]
        self.assertRegex(text, "is not the memory that process .* published|cannot open the memory")

    def test_nothing_is_unpickled_or_evaluated(self) -> None:
        """What comes from the store is text: no module of the library (but testing's own pipe) imports pickle."""
        for path in Path(symmpatterns.__file__).parent.rglob("*.py"):
            text = path.read_text()
            if path.name != "testing.py":
                self.assertNotRegex(text, r"\b(pickle|marshal|dill|all_gather_object|broadcast_object_list)\b", path)
                self.assertNotRegex(text, r"(?<![\w.])(eval|exec)\(", path)
