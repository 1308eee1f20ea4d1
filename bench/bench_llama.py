"""Layers of a tensor-parallel Llama, compiled with and without symmpatterns: decode, prefill and a training step.

    python -m torch.distributed.run --standalone --nproc-per-node 2 bench/bench_llama.py [--models 8b 70b] [--jobs ...]

Four layers of examples/llama.py with the sizes of Llama 3.1, random weights, each layer compiled by itself as torchtitan
does. Implementations

    symmpatterns   compiled after `import symmpatterns`; decode on GPUs with config.cuda_graphs, as it is captured
    nccl | gloo    the same, with config.enabled = False
    upstream       the same, with torch._inductor.config._micro_pipeline_tp (training on GPUs only)

Jobs: decode-B (one token for each of B sequences, 1024 tokens cached; in a CUDA graph on GPUs), prefill-T (T tokens),
train-T (forward, backward and an SGD step of T tokens, sequence parallel). Results of the implementations are compared
before anything is timed. Rows go to bench/results/llama-<device>-w<ranks>.csv: microseconds of the slowest rank, peak
memory of rank 0, seconds of the first call, which compiles.
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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _common import Ranks, _graph_of, _sample, commit, device_name, result_path, start_ranks
from torch import Tensor
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
GPU_JOBS = ["decode-1", "decode-16", "decode-64", "prefill-1024", "prefill-4096", "prefill-8192", "train-4096"]
CPU_JOBS = ["decode-2", "prefill-32", "train-32"]
_CACHED = 1024
_TOLERANCE = 3e-2  # relative, in norm: bf16 and sums in another order, over several layers


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
        kind, _, count = job.partition("-")
        self.name, self.count, self.kind = name, int(count), kind
        self.cuda_graphs = kind == "decode" and ranks.device.type == "cuda"
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


def measure_job(ranks: Ranks, shape: Shape, job: str, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """One row for each implementation; raises RuntimeError when their results differ."""
    on_gpu = ranks.device.type == "cuda"
    calls: dict[str, Callable[[], object]] = {}
    per_call: dict[str, int] = {}
    rows: dict[str, dict[str, Any]] = {}
    results: dict[str, Tensor] = {}
    models = []
    for name in names:
        torch._dynamo.reset()
        symmpatterns.report().clear()
        model = Model(ranks, shape, job, name)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        with symmpatterns.config.patch(cuda_graphs=model.cuda_graphs):
            results[name] = model.run().clone()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        report = symmpatterns.report()
        for _ in range(2):
            model.run()
        rows[name] = {
            "implementation": name,
            "launch": "graph" if model.cuda_graphs else "eager",
            "first_call_s": round(seconds, 2),
            "peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20) if on_gpu else 0,
            "rewritten": len(report.rewrites),
            "declined": len(report.declined),
        }
        if name == "symmpatterns":
            ranks.say(str(report))
        models.append(model)
        if model.cuda_graphs:
            calls[name], per_call[name] = _graph_of(model.run).replay, 20
        else:
            calls[name], per_call[name] = model.run, 1
    reference = results[names[-1]].float()
    for name, result in results.items():
        error = float((result.float() - reference).norm() / reference.norm())
        if not ranks.slowest([error])[0] < _TOLERANCE:
            raise RuntimeError(f"{job}: {name} differs from {names[-1]} by {error:.2e}")
    samples: dict[str, list[float]] = {name: [] for name in names}
    for call in calls.values():
        _sample(ranks, call, 2)
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_sample(ranks, call, 3 if on_gpu else 1) / per_call[name])
    for name, values in samples.items():
        slowest = ranks.slowest(values)
        p20, p50, p80 = (statistics.quantiles(slowest, n=10, method="inclusive")[i] for i in (1, 4, 7))
        rows[name] |= {
            "p20_us": round(p20, 1),
            "p50_us": round(p50, 1),
            "p80_us": round(p80, 1),
            "samples": len(values),
        }
        tokens = models[0].count
        rows[name]["tokens_per_s"] = round(tokens / p50 * 1e6)
    for model in models:
        model.layers.clear()
        model.parameters.clear()
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS))
    parser.add_argument("--jobs", nargs="+", metavar="JOB")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--budget-s", type=float, default=1e9, help="begin no job after so many seconds")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args(argv)
    began = time.monotonic()
    ranks = start_ranks()
    on_gpu = ranks.device.type == "cuda"
    ranks.say(f"llama layers on {ranks.world_size} ranks, {device_name(ranks.device)}, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    for model in args.models or (["8b", "70b"] if on_gpu else ["tiny"]):
        for job in args.jobs or (GPU_JOBS if on_gpu else CPU_JOBS):
            if ranks.slowest([time.monotonic() - began])[0] > args.budget_s:
                ranks.say(f"out of time before {model} {job}")
                continue
            names = ["symmpatterns", *(["upstream"] if on_gpu and job.startswith("train") else []), dist.get_backend()]
            new = measure_job(ranks, MODELS[model], job, names, args.rounds)
            gc.collect()
            times = {row["implementation"]: row["p50_us"] for row in new}
            each = "  ".join(f"{name} {t:.0f} us" for name, t in times.items())
            ranks.say(f"{model} {job}: {each}  -> {times[names[-1]] / times['symmpatterns']:.3f}x")
            environment = {
                "device": device_name(ranks.device), "world_size": ranks.world_size, "torch": torch.__version__,
                "commit": commit(), "load": ranks.load, "layers": LAYERS,
            }  # fmt: skip
            rows += [{"model": model, "job": job, **row, **environment} for row in new]
            if ranks.rank == 0 and not args.no_save:
                with open(result_path(ranks, "llama"), "w", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
