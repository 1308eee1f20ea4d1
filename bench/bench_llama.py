"""Layers of a tensor-parallel Llama, compiled with and without symmpatterns: decode, prefill and a training step.

    python -m torch.distributed.run --standalone --nproc-per-node 2 bench/bench_llama.py [--models 8b 70b] [--jobs ...]

Four layers of examples/llama.py with the sizes of Llama 3.1, random weights, each layer compiled by itself as torchtitan
does. Implementations

    symmpatterns   compiled after `import symmpatterns`; decode on GPUs with config.cuda_graphs, as it is captured
    upstream       the same with config.enabled = False and torch._inductor.config._micro_pipeline_tp; on GPUs
    nccl | gloo    the same with config.enabled = False

Jobs: decode-B (one token for each of B sequences, 1024 tokens cached; in a CUDA graph on GPUs), prefill-T (T tokens; with
-graph behind it in a CUDA graph, which takes out what the host costs), train-T (forward, backward and an SGD step of T
tokens, sequence parallel). A case is a job of a model. Results of the implementations are compared before anything is
timed. After each case its rows are printed and saved in bench/results/llama-<device>-w<ranks>.csv, where rows of other
cases stay, so a long list can be measured in pieces:

    p20_us ...   microseconds of the slowest rank
    host_us      until the call returned; on GPUs the kernels may run on
    compile_s    seconds of the first call, without any cache on GPUs; what the first implementation of a case compiles,
                 the next ones find in the process: to compare them, start each by itself (--implementations)
    peak_mib     rank 0's memory with weights, as torch's allocator counts it
    outside_mib  what else the GPU holds for it: symmetric memory, kernels, the backend's buffers
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _common import GRAPH_CALLS, Ranks, commit, device_name, graph_of, result_path, sample, start_ranks
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import symmpatterns

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from llama import Llama, Shape, parallelize

LAYERS = 4
MODELS = {
    "8b": Shape(LAYERS, dim=4096, heads=32, kv_heads=8, hidden=14336, vocabulary=256),
    "70b": Shape(LAYERS, dim=8192, heads=64, kv_heads=8, hidden=28672, vocabulary=256),
    "tiny": Shape(LAYERS, dim=64, heads=8, kv_heads=4, hidden=128, vocabulary=256),
}
_PREFILLS = [f"prefill-{tokens}{graph}" for tokens in (1024, 4096, 8192) for graph in ("", "-graph")]
GPU_JOBS = ["decode-1", "decode-16", "decode-64", *_PREFILLS, "train-4096"]
CPU_JOBS = ["decode-2", "prefill-32", "train-32"]
_CACHED = 1024
_KEY = ("model", "job", "implementation")  # of a row in its file
TOLERANCE = 3e-2  # relative, in norm: bf16 and sums in another order, over several layers


class WrongResult(Exception):
    """The implementations do not agree; raised on all ranks."""


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """What holds while a model of that implementation is compiled."""
    with contextlib.ExitStack() as stack:
        if name != "symmpatterns":
            stack.enter_context(symmpatterns.config.patch(enabled=False))
        if name == "upstream":
            from torch._inductor import config as inductor_config
            from torch.distributed import _symmetric_memory

            _symmetric_memory.enable_symm_mem_for_group(dist.group.WORLD.group_name)  # type: ignore[union-attr]
            stack.enter_context(inductor_config.patch(_micro_pipeline_tp=True))
        yield


class Model:
    """The layers, compiled one by one, and a job for them; `run` gives what the implementations are compared by."""

    def __init__(self, ranks: Ranks, shape: Shape, job: str, name: str) -> None:
        kind, count, *rest = job.split("-")
        self.name, self.count, self.kind = name, int(count), kind
        self.cuda_graphs = (kind == "decode" or rest == ["graph"]) and ranks.device.type == "cuda"
        dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        with torch.device(ranks.device):
            torch.set_default_dtype(dtype)
            model = Llama(shape)
            torch.set_default_dtype(torch.float32)
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        parallelize(model, mesh, sequence_parallel=kind == "train")
        self.layers = list(model.layers)
        self.parameters = [p for layer in self.layers for p in layer.parameters()]
        for layer in self.layers:
            layer.compile(fullgraph=True, dynamic=False)
        generator = torch.Generator(ranks.device).manual_seed(1)
        batch, tokens = (self.count, 1) if kind == "decode" else (1, self.count)
        own = tokens // ranks.world_size if kind == "train" else tokens
        x = torch.randn(batch, tokens, shape.dim, device=ranks.device, generator=generator).to(dtype)
        self.x = x.chunk(ranks.world_size, 1)[ranks.rank].contiguous() if own != tokens else x
        self.positions = torch.arange(tokens, device=ranks.device)
        self.caches: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layers)
        if kind == "decode":
            size = (batch, shape.kv_heads // ranks.world_size, _CACHED, shape.head_dim)
            self.caches = [
                (
                    torch.zeros(size, device=ranks.device, dtype=dtype),
                    torch.zeros(size, device=ranks.device, dtype=dtype),
                )
                for _ in self.layers
            ]
            self.positions = torch.full((1,), _CACHED - 1, device=ranks.device)

    def forward(self) -> Tensor:
        x = self.x
        for layer, cache in zip(self.layers, self.caches):
            x = layer(x, self.positions, cache)
        return x

    def run(self) -> Tensor:
        with implementation(self.name):
            if self.kind != "train":
                with torch.no_grad():
                    return self.forward()
            for parameter in self.parameters:
                parameter.grad = None
            out = self.forward()
            out.square().mean().backward()
            with torch.no_grad():
                for parameter in self.parameters:
                    gradient = parameter.grad
                    assert gradient is not None
                    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
                        parameter.to_local().sub_(gradient.to_local(), alpha=1e-5)
                    else:
                        parameter.sub_(gradient, alpha=1e-5)
            return out.detach()


class Memory:
    """What this rank's GPU holds beyond what it held before."""

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated(), self._outside()

    @staticmethod
    def _outside() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    def columns(self) -> dict[str, int]:
        peak, outside = torch.cuda.max_memory_allocated() - self._before[0], self._outside() - self._before[1]
        return {"peak_mib": round(peak / 2**20), "outside_mib": round(outside / 2**20)}


def first_call(model: Model) -> tuple[Tensor, float]:
    """The result and the seconds of the call that compiles.

    On GPUs without a cache: else one implementation would find kernels that another has paid for. On CPU an empty cache
    would mean half a minute of C++ headers, the same for all.
    """
    on_gpu = model.x.is_cuda
    with fresh_cache() if on_gpu else contextlib.nullcontext():
        began = time.perf_counter()
        result = model.run().clone()
        if on_gpu:
            torch.cuda.synchronize()
        return result, time.perf_counter() - began


def host_time(ranks: Ranks, call: Callable[[], object]) -> float:
    """Microseconds until a call returns, on this rank."""
    dist.barrier()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


@dataclass
class Prepared:
    """An implementation of a job that has run: what of it is timed, its result, and the columns known by then."""

    model: Model
    call: Callable[[], object]
    result: Tensor
    columns: dict[str, Any]


def prepare(ranks: Ranks, shape: Shape, job: str, name: str) -> Prepared:
    on_gpu = ranks.device.type == "cuda"
    torch._dynamo.reset()
    symmpatterns.report().clear()
    memory = Memory() if on_gpu else None
    model = Model(ranks, shape, job, name)
    with symmpatterns.config.patch(cuda_graphs=model.cuda_graphs):
        result, seconds = first_call(model)
    report = symmpatterns.report()
    if name == "symmpatterns":
        ranks.say(str(report))
    for _ in range(2):
        model.run()
    call = graph_of(model.run).replay if model.cuda_graphs else model.run
    columns = {
        "implementation": name,
        "launch": "graph" if model.cuda_graphs else "eager",
        "compile_s": round(seconds, 2),
        "peak_mib": "",
        "outside_mib": "",
        "rewritten": len(report.rewrites),
        "declined": len(report.declined),
    }
    return Prepared(model, call, result, columns | (memory.columns() if memory else {}))


def measure_job(ranks: Ranks, shape: Shape, job: str, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """One row for each implementation; raises WrongResult when the last one's results are not those of the others."""
    on_gpu = ranks.device.type == "cuda"
    prepared = {name: prepare(ranks, shape, job, name) for name in names}
    reference = prepared[names[-1]].result.float()
    for name, each in prepared.items():
        error = float((each.result.float() - reference).norm() / reference.norm())
        error = ranks.slowest([error if error == error else float("inf")])[0]
        if error > TOLERANCE:
            raise WrongResult(f"{name} differs from {names[-1]} by {error:.2e}")
    samples: dict[str, list[float]] = {name: [] for name in names}
    host: dict[str, list[float]] = {name: [] for name in names}
    for each in prepared.values():
        sample(ranks, each.call, 2)
    for _ in range(rounds):  # they take turns, so that a busy moment hits all alike
        for name, each in prepared.items():
            runs = GRAPH_CALLS if each.model.cuda_graphs else 1
            samples[name].append(sample(ranks, each.call, 3 if on_gpu else 1) / runs)
            host[name].append(host_time(ranks, each.call) / runs)
    rows = []
    for name, each in prepared.items():
        slowest = ranks.slowest(samples[name])
        p20, p50, p80 = (statistics.quantiles(slowest, n=10, method="inclusive")[i] for i in (1, 4, 7))
        times = {
            "p20_us": round(p20, 1),
            "p50_us": round(p50, 1),
            "p80_us": round(p80, 1),
            "host_us": round(statistics.median(ranks.slowest(host[name])), 1),
            "samples": len(slowest),
            "tokens_per_s": round(each.model.count / p50 * 1e6),
        }
        rows.append(each.columns | times)
    return rows


def save(path: Path, new: list[dict[str, Any]]) -> None:
    """Puts rows into a file, in place of those of the same case and implementation; the file is whole at any time."""
    old = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    measured = {tuple(row[name] for name in _KEY) for row in new}
    rows = [row for row in old if tuple(row.get(name) for name in _KEY) not in measured] + new
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(new[0]), restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS))
    parser.add_argument("--jobs", nargs="+", metavar="JOB")
    parser.add_argument("--implementations", nargs="+", choices=["symmpatterns", "upstream", "nccl", "gloo"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case that would end later")
    parser.add_argument("--folder", type=Path, help="where the rows go instead of bench/results")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args(argv)
    began = time.monotonic()
    ranks = start_ranks()
    on_gpu = ranks.device.type == "cuda"
    names = args.implementations or ["symmpatterns", *(["upstream"] if on_gpu else []), dist.get_backend()]
    path = result_path(ranks, "llama")
    path = args.folder / path.name if args.folder else path
    environment = {
        "device": device_name(ranks.device), "world_size": ranks.world_size, "torch": torch.__version__,
        "commit": commit(), "load": ranks.load, "layers": LAYERS,
    }  # fmt: skip
    ranks.say(f"llama layers on {ranks.world_size} ranks, {environment['device']}, torch {torch.__version__}")
    wrong = longest = 0.0
    for model in args.models or (["8b", "70b"] if on_gpu else ["tiny"]):
        for job in args.jobs or (GPU_JOBS if on_gpu else CPU_JOBS):
            elapsed = ranks.slowest([time.monotonic() - began])[0]
            if elapsed + longest > args.seconds:  # a case takes as long as the longest so far
                ranks.say(f"{model} {job}: not begun, {elapsed:.0f} of {args.seconds:.0f} s are over")
                continue
            try:
                new = measure_job(ranks, MODELS[model], job, names, args.rounds)
            except WrongResult as error:
                wrong += 1
                ranks.say(f"{model} {job}: WRONG, {error}")
                continue
            new = [{"model": model, "job": job, **row, **environment} for row in new]
            ranks.say("\n".join(map(line, new)))
            if ranks.rank == 0 and not args.no_save:
                save(path, new)
            longest = max(longest, ranks.slowest([time.monotonic() - began])[0] - elapsed)
    dist.destroy_process_group()
    return int(wrong > 0)


def line(row: dict[str, Any]) -> str:
    memory = f"{row['peak_mib']} + {row['outside_mib']} MiB, " if row["peak_mib"] != "" else ""
    return (
        f"{row['model']} {row['job']}: {row['implementation']:<12} {row['p50_us']:.0f} us, host {row['host_us']:.0f} us, "
        f"{memory}compiled in {row['compile_s']:.1f} s, {row['rewritten']} rewritten"
    )


if __name__ == "__main__":
    sys.exit(main())
