"""What the benchmarks share: ranks, checked and interleaved timing, rows with everything needed to read them later.

A benchmark builds a `Case` for each shape: what every implementation has to compute, and the implementations. A result
is compared with the float64 result before anything is timed; an implementation that is wrong gets no time.
"""

from __future__ import annotations

import csv
import datetime
import math
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from symmpatterns.testing import assert_within_budget, error_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
LIMIT = "mm alone"  # an implementation of this name leaves the communication out
# Operators of torch that no compiled program contains unless its author calls them: the benchmarks compare with them,
# but they are not what a program does when it is not rewritten.
BY_HAND = ("mm + symm_mem one-shot", "mm + symm_mem two-shot", "symm_mem one-shot", "symm_mem two-shot", "symm_mem")
_BATCH_US = 20_000.0  # one sample times a batch of calls about this long
_MAX_CALLS = 200
BUSY = 1.0  # load average from which figures are called noisy; starting the ranks makes some of it
GRAPH_CALLS = 20


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks that torchrun started."""

    rank: int
    world_size: int
    device: torch.device
    load: float = 0.0  # the machine's load average before the benchmark: what other programs it was running

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def slowest(self, values: Sequence[float]) -> list[float]:
        """Element by element the largest value of any rank."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [float(v) for v in tensor.cpu()]


DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,  # with one scale a matrix, and results in bf16; GPUs that multiply it
}


@dataclass(frozen=True)
class Product:
    """a [M, K] @ b [K, N] of one rank, in one of DTYPES; b lies row by row, in float8 (where it must) column by column."""

    a: Tensor
    b: Tensor
    scales: dict[str, Tensor]  # scale_a and scale_b, float32 [1], or nothing

    @classmethod
    def random(cls, ranks: Ranks, m: int, n: int, k: int, dtype: torch.dtype) -> Product:
        """Random operands, distinct on every rank."""
        generator = torch.Generator(ranks.device).manual_seed(1000 + ranks.rank)
        a = torch.randn(m, k, device=ranks.device, generator=generator)
        b = torch.randn(k, n, device=ranks.device, generator=generator) / k**0.5
        if dtype != torch.float8_e4m3fn:
            return cls(a.to(dtype), b.to(dtype), {})
        b = b.t().contiguous().t()
        # Ranks gather a, and have one scale for it.
        scales = {
            "scale_a": torch.full((1,), 6 / 448, device=ranks.device),
            "scale_b": (b.abs().max() / 448).reshape(1),
        }
        return cls((a / scales["scale_a"]).clamp(-448, 448).to(dtype), (b / scales["scale_b"]).to(dtype), scales)

    def with_a(self, a: Tensor) -> Product:
        return Product(a, self.b, self.scales)

    def run(self, out: Tensor | None = None) -> Tensor:
        """The product as a program without this library computes it."""
        if not self.scales:
            return torch.mm(self.a, self.b) if out is None else torch.mm(self.a, self.b, out=out)
        options: dict[str, Any] = {**self.scales, "out_dtype": torch.bfloat16}
        if out is None:
            return torch._scaled_mm(self.a, self.b, **options)
        return torch._scaled_mm(self.a, self.b, **options, out=out)

    def exact(self) -> Tensor:
        """In float64."""
        factor = math.prod(scale.item() for scale in self.scales.values())
        return (self.a.double() * factor) @ self.b.double()

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.scales else self.a.dtype


@dataclass(frozen=True)
class Row:
    """One measurement; times in microseconds, of the slowest rank.

    launch  "eager": calls from Python; "graph": replays of a CUDA graph
    load    the load average before the benchmark started, so whether other programs disturbed it
    """

    benchmark: str
    device: str
    world_size: int
    M: int
    N: int
    K: int
    dtype: str
    implementation: str
    launch: str
    p20_us: float
    p50_us: float
    p80_us: float
    samples: int
    calls_a_sample: int
    threads: int
    load: float
    torch: str
    triton: str
    commit: str
    date: str


@dataclass
class Implementation:
    """`run` returns the result; `is_limit` marks one that leaves work out and only bounds the others from below."""

    name: str
    run: Callable[[], Tensor]
    is_limit: bool = False


@dataclass
class Case:
    """One shape: the exact result in float64, a plain computation in the same dtype, and who is measured."""

    M: int
    N: int
    K: int
    dtype: torch.dtype
    exact: Tensor
    reference: Tensor
    implementations: list[Implementation] = field(default_factory=list)
    same_on_all_ranks: bool = True
    operands: tuple[Tensor, Tensor] | None = None  # what a fused GEMM takes: a or its shard, and b


def start_ranks() -> Ranks:
    """The process group that torchrun describes: nccl with a GPU for every rank, else gloo."""
    if "RANK" not in os.environ:
        sys.exit("benchmarks run on several ranks: use `make bench` or `python -m symmpatterns bench --ranks 2`")
    load = round(os.getloadavg()[0], 1)
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() >= local_ranks:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, load)
    if load > BUSY:
        ranks.say(f"other programs are running (load average {load:g}): expect noise")
    return ranks


def show(ranks: Ranks, rows: Sequence[Row]) -> None:
    """One line for each way of launching: p50 of each implementation, and the fused one against the best other."""
    for launch in dict.fromkeys(row.launch for row in rows):
        times = {row.implementation: row.p50_us for row in rows if row.launch == launch}
        others = [t for name, t in times.items() if name != LIMIT and not name.startswith("fused")]
        shape = f"{rows[0].M}x{rows[0].N}x{rows[0].K}"
        line = f"{shape:>15} {rows[0].dtype:>9} {launch:>6}  "
        line += "  ".join(f"{name} {t:.1f} us" for name, t in times.items())
        if "fused" in times and others:
            line += f"  -> {min(others) / times['fused']:.2f}x the best other"
            line += f", {times['fused'] / times[LIMIT]:.2f} of the limit" if LIMIT in times else ""
        ranks.say(line)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model and how many cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "unknown CPU"
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model} ({len(os.sched_getaffinity(0))} cores)"


def commit() -> str:
    """The short hash of the checked-out commit, with "+" when the library's sources differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "symmpatterns", "bench/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def is_correct(ranks: Ranks, case: Case, implementation: Implementation) -> bool:
    """Whether every rank's result keeps the error budget and all ranks agree bit by bit; says on which rank it fails.

    A limit leaves work out, so it has no result to compare.
    """
    if implementation.is_limit:
        return True
    result = implementation.run()
    complaint = ""
    try:
        assert_within_budget(result, case.exact, case.reference)
    except AssertionError as error:
        complaint = f"{error} (the reference errs by {error_of(case.reference, case.exact):.3e})"
    if case.same_on_all_ranks:
        gathered = [torch.empty_like(result) for _ in range(ranks.world_size)]
        dist.all_gather(gathered, result.contiguous())
        if not complaint and any(not torch.equal(gathered[0], other) for other in gathered[1:]):
            complaint = "the ranks' results differ"
    if complaint:
        print(f"WRONG on rank {ranks.rank}: {implementation.name} {case.M}x{case.N}x{case.K}: {complaint}", flush=True)
    return ranks.slowest([float(bool(complaint))])[0] == 0.0


def sample(ranks: Ranks, call: Callable[[], object], calls: int) -> float:
    """Microseconds a call, from `calls` calls in a row that start together on all ranks."""
    dist.barrier()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) * 1e6 / calls


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph


def measure(ranks: Ranks, case: Case, launch: str, rounds: int) -> dict[str, tuple[list[float], int]]:
    """Samples (us a call, of the slowest rank) and calls a sample of every implementation.

    In each round every implementation has its turn, so whatever else the machine does hits all of them alike.
    """
    calls: dict[str, Callable[[], object]] = {}
    per_call = {}  # how many runs one `call` is
    for each in case.implementations:
        if launch == "graph":
            calls[each.name], per_call[each.name] = graph_of(each.run).replay, GRAPH_CALLS
        else:
            calls[each.name], per_call[each.name] = each.run, 1
    batch = {}
    for name, call in calls.items():
        sample(ranks, call, 3)
        estimate = ranks.slowest([sample(ranks, call, 5)])[0]
        batch[name] = max(1, min(_MAX_CALLS, int(_BATCH_US / max(estimate, 1.0))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(sample(ranks, call, batch[name]) / per_call[name])
    return {name: (ranks.slowest(values), batch[name] * per_call[name]) for name, values in samples.items()}


def rows_of(ranks: Ranks, benchmark: str, case: Case, launches: Iterable[str], rounds: int) -> tuple[list[Row], bool]:
    """Checks and measures a case; the rows of the correct implementations, and whether all of them were correct."""
    correct = [each for each in case.implementations if is_correct(ranks, case, each)]
    all_correct = len(correct) == len(case.implementations)
    case.implementations = correct
    rows = []
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    for launch in launches:
        for name, (samples, calls) in measure(ranks, case, launch, rounds).items():
            p20, p50, p80 = (statistics.quantiles(samples, n=10, method="inclusive")[i] for i in (1, 4, 7))
            row = Row(
                benchmark=benchmark,
                device=device_name(ranks.device),
                world_size=ranks.world_size,
                M=case.M,
                N=case.N,
                K=case.K,
                dtype=str(case.dtype).removeprefix("torch."),
                implementation=name,
                launch=launch,
                p20_us=round(p20, 2),
                p50_us=round(p50, 2),
                p80_us=round(p80, 2),
                samples=len(samples),
                calls_a_sample=calls,
                threads=torch.get_num_threads(),
                load=ranks.load,
                torch=torch.__version__,
                triton=triton_version(),
                commit=commit(),
                date=today,
            )
            rows.append(row)
    return rows, all_correct


def compiled_alone(fn: Callable[..., Any], name: str, dynamic: bool | None = None) -> Callable[..., Any]:
    """`fn`, compiled from a copy of its code: functions with one code share a list of guards that each call goes through."""
    assert isinstance(fn, types.FunctionType)
    code = fn.__code__.replace(co_name=f"{fn.__name__}_{''.join(c if c.isalnum() else '_' for c in name)}")
    compiled: Callable[..., Any] = torch.compile(
        types.FunctionType(code, fn.__globals__), fullgraph=True, dynamic=dynamic
    )
    return compiled


def result_path(ranks: Ranks, benchmark: str) -> Path:
    """bench/results/<benchmark>-<device>-w<W>.csv"""
    kind = "cpu" if ranks.device.type == "cpu" else device_name(ranks.device)
    slug = "".join(c if c.isalnum() else "-" for c in kind.lower()).strip("-")
    return RESULTS / f"{benchmark}-{slug}-w{ranks.world_size}.csv"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Adds the rows, whole or not at all; rows of the same shapes, dtypes and launches that were there before go."""
    names = [f.name for f in fields(Row)]
    keys = ("benchmark", "device", "world_size", "M", "N", "K", "dtype", "launch")
    new = [{name: str(getattr(row, name)) for name in names} for row in rows]
    measured = {tuple(row[key] for key in keys) for row in new}
    path.parent.mkdir(parents=True, exist_ok=True)
    old: list[dict[str, str]] = []
    if path.exists():
        with open(path, newline="") as file:
            old = [row for row in csv.DictReader(file) if tuple(row[key] for key in keys) not in measured]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *new])
    temporary.replace(path)


def shapes_of(texts: list[str] | None, default: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """What --shapes says, [(M, N, K)]; `default` without it."""
    if texts is None:
        return default
    shapes = []
    for text in texts:
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
            sys.exit(f"--shapes takes MxNxK such as 64x1024x1024, not {text!r}")
        shapes.append((int(parts[0]), int(parts[1]), int(parts[2])))
    return shapes
