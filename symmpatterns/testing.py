"""What the tests, benchmarks and examples share: real ranks, a pretended group for tracing, and error budgets."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Died:
    """In place of a rank's result: the process ended without one."""

    exitcode: int | None


class RankError(AssertionError):
    """At least one rank raised, died or did not finish; the text has every rank's traceback."""


# Modules that every rank finds imported. Not symmpatterns: it reads the environment, which differs between ranks.
PRELOADED = ["torch", "torch.distributed.tensor", "torch._inductor.compile_fx", "triton.language"]


@functools.cache
def _fork_server(interpreted: bool) -> multiprocessing.forkserver.ForkServer:
    """A process that imports `PRELOADED` once, and each rank is a fork of it.

    Triton decides at its import whether to interpret, so there are two: one with Triton's interpreter, one without.
    """
    server = multiprocessing.forkserver.ForkServer()
    server.set_forkserver_preload(PRELOADED)
    with _environment({"TRITON_INTERPRET": "1"} if interpreted else None):
        server.ensure_running()
    return server


@contextlib.contextmanager
def _forks_of(server: multiprocessing.forkserver.ForkServer) -> Iterator[None]:
    """Processes of multiprocessing's "forkserver" come from this server instead of the only one it knows."""
    before = multiprocessing.forkserver.connect_to_new_process
    multiprocessing.forkserver.connect_to_new_process = server.connect_to_new_process
    try:
        yield
    finally:
        multiprocessing.forkserver.connect_to_new_process = before


def _rank_main(
    connection: Any,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    backend: str,
    env: Mapping[str, str],
    path: list[str],
    args: tuple[Any, ...],
) -> None:
    sys.path[:] = path
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in local.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **env)
    torch.set_num_threads(1)
    try:
        if backend == "nccl":
            backend = _take_gpu(rank, world_size)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        answer: tuple[bool, Any] = (True, fn(rank, world_size, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    connection.send_bytes(pickle.dumps(answer))
    connection.close()
    if answer[0]:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a rank whose peer failed may hang in destructors


def _take_gpu(rank: int, world_size: int) -> str:
    """Gives this rank its GPU; returns the backend of the process group.

    Where there are fewer GPUs than ranks, ranks share them: the driver gives their kernels turns of a few milliseconds,
    so kernels that wait for each other are slow but get there. Results mean as much as on a GPU each, times mean
    nothing. NCCL refuses a shared GPU, gloo does not, and torch's symmetric memory has to be told. CPU tensors always
    have a backend, for results to compare with: gloo's all-gather crashes on CUDA tensors (torch 2.11).
    """
    gpus = torch.cuda.device_count()
    torch.cuda.set_device(rank % gpus)
    if world_size <= gpus:
        return "cpu:gloo,cuda:nccl"
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    return "gloo"


def gpu_world_sizes() -> list[int]:
    """How many ranks the tests of GPU kernels run with: one a GPU, or two and four that share the only one."""
    gpus = torch.cuda.device_count()
    return [2, 4] if gpus == 1 else [count for count in (2, 4, 8) if count <= gpus]


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    backend: str = "gloo",
    env: Mapping[str, str] | None = None,
    allow_death: bool = False,
) -> list[Any]:
    """Runs ``fn(rank, world_size, *args)`` in `world_size` processes of one process group; returns their results.

    `fn` and its arguments must be picklable (a module's function). With `backend` "nccl" a rank has a GPU, shared with
    other ranks where there are too few. `env` is set before `fn` is called, and TRITON_INTERPRET
    before Triton is imported.
    Raises RankError with every rank's traceback when a rank raises, or when the ranks take longer than `timeout`
    seconds (they are killed then). With `allow_death` a rank that dies is returned as `Died`.
    """
    # CUDA does not survive a fork, and importing Inductor looks for GPUs: with GPUs each rank is a new interpreter.
    fresh = torch.cuda.device_count() > 0
    context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main,
            args=(theirs, fn, rank, world_size, server.port, backend, dict(env or {}), list(sys.path), args),
            daemon=True,
        )
        with _environment(env) if fresh else _forks_of(_fork_server("TRITON_INTERPRET" in (env or {}))):
            process.start()
        theirs.close()
        ranks.append((process, ours))
    deadline = time.monotonic() + timeout
    results: list[Any] = [None] * world_size
    failures: dict[int, str] = {}
    pending = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while pending:
        ready = multiprocessing.connection.wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            failures.update((rank, f"no result within {timeout:g} s") for rank in pending.values())
            break
        for connection in ready:
            rank = pending.pop(connection)
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                ranks[rank][0].join(5)
                succeeded, value = allow_death, Died(ranks[rank][0].exitcode)
            if succeeded:
                results[rank] = value
                continue
            if not failures:  # the others may wait for the failed rank: a moment to say what they see
                deadline = min(deadline, time.monotonic() + 5)
            failures[rank] = str(value)
    for process, connection in ranks:
        if failures:
            process.kill()
        process.join(10)
        if process.is_alive():
            process.kill()
        connection.close()
    if failures:
        raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
    return results


@contextlib.contextmanager
def _environment(changes: Mapping[str, str] | None) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes or {})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def fake_group(world_size: int, rank: int = 0) -> Iterator[str]:
    """A default process group of torch's "fake" backend: traces and compiles any graph in one process; yields its name."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield dist.group.WORLD.group_name  # type: ignore[union-attr]
    finally:
        dist.destroy_process_group()


def compiled_code(fn: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, str]:
    """Compiles and runs ``fn(*args)``; returns its result and Inductor's generated code, all graphs in one text."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    result, sources = run_and_get_code(torch.compile(fn, **options), *args)
    return result, "\n".join(sources)


def error_of(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference from `exact` (float64)."""
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {list(actual.shape)} is not {list(exact.shape)}")
    if actual.numel() == 0:
        return 0.0
    return float((actual.double() - exact).abs().max())


def assert_within_budget(
    actual: torch.Tensor, exact: torch.Tensor, reference: torch.Tensor, factor: float = 2.0
) -> None:
    """Fails unless `actual` errs at most `factor` times as much as `reference`, the plain computation in the same dtype.

    `exact` is the same computation in float64. One unit in the last place of the largest value is always allowed:
    the reference may have been lucky.
    """
    budget = factor * error_of(reference, exact)
    if exact.numel():
        budget += torch.finfo(actual.dtype).eps * float(exact.abs().max())
    error = error_of(actual, exact)
    if not error <= budget:  # a NaN fails too
        raise AssertionError(f"error {error:.3e} is over the budget {budget:.3e}")


def assert_same_on_all_ranks(results: Sequence[torch.Tensor]) -> None:
    """Fails unless all tensors are bitwise equal."""
    first = results[0].reshape(-1)
    for rank, other in enumerate(results[1:], start=1):
        if not torch.equal(first.view(torch.uint8), other.reshape(-1).view(torch.uint8)):
            raise AssertionError(f"rank {rank} differs bitwise from rank 0")
