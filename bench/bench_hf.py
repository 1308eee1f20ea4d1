"""Hugging Face transformers' own Llama and Qwen under its own tensor parallelism, compiled with and without symmpatterns.

    python -m torch.distributed.run --standalone --nproc-per-node 2 bench/bench_hf.py

Models with the sizes of Llama 3.1 8B and Qwen2 7B but four layers and a small vocabulary, made from their configurations
with random weights, saved, and loaded with ``tp_plan="auto"``. ``model.forward`` is compiled as a whole. Implementations

    symmpatterns   compiled after `import symmpatterns`, with config.cuda_graphs on GPUs
    nccl | gloo    the same with config.enabled = False

Jobs: decode-B (one token for each of B sequences, static cache of 1024 tokens) and prefill-T (T tokens); on GPUs both in
CUDA graphs. Logits of the implementations are compared first. Rows are those of bench/bench_llama.py and go to
bench/results/hf-<device>-w<ranks>.csv. Needs transformers: pip install -e '.[models]'.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _common import GRAPH_CALLS, Ranks, commit, device_name, graph_of, result_path, sample, start_ranks
from bench_llama import TOLERANCE, WrongResult, first_call, host_time, implementation, line, save
from torch import Tensor

import symmpatterns

LAYERS = 4
LARGE = {"num_hidden_layers": LAYERS, "vocab_size": 256, "max_position_embeddings": 8192, "tie_word_embeddings": False}
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "llama-8b": (
        "Llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "qwen2-7b": (
        "Qwen2",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
    ),
    "tiny": (
        "Llama",
        {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
}
GPU_JOBS = ["decode-1", "decode-16", "decode-64", "prefill-1024", "prefill-4096"]
CPU_JOBS = ["decode-2", "prefill-32"]
_CACHED = 1024


def save_model(name: str, folder: str, dtype: torch.dtype) -> None:
    """Writes a model with random weights, for all ranks to load their shares of."""
    import transformers

    kind, sizes = MODELS[name]
    configuration = getattr(transformers, f"{kind}Config")(**{**LARGE, **sizes}, pad_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(configuration, dtype=dtype).save_pretrained(folder)


class Model:
    """One implementation of a job; `run` gives the logits."""

    def __init__(self, ranks: Ranks, folder: str, job: str, name: str, dtype: torch.dtype) -> None:
        import transformers
        from transformers.distributed import DistributedConfig

        kind, count = job.split("-")
        self.name, self.count = name, int(count)
        self.cuda_graphs = ranks.device.type == "cuda"
        split = DistributedConfig(tp_size=ranks.world_size, tp_plan="auto")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=split)
        self.model.eval()
        self.forward = torch.compile(self.model.forward, fullgraph=True, dynamic=False)
        batch, tokens = (self.count, 1) if kind == "decode" else (1, self.count)
        generator = torch.Generator(ranks.device).manual_seed(1)
        self.x = torch.randint(1, 256, (batch, tokens), device=ranks.device, generator=generator)
        self.options: dict[str, Any] = {"use_cache": False}
        if kind == "decode":
            cache = transformers.StaticCache(config=self.model.config, max_cache_len=_CACHED)
            position = torch.full((batch, 1), _CACHED // 2, device=ranks.device)
            self.options = {"past_key_values": cache, "position_ids": position, "use_cache": True}

    def run(self) -> Tensor:
        # Always: a cache that the first call has filled makes the second compile anew.
        graphs = symmpatterns.config.patch(cuda_graphs=self.cuda_graphs)
        with implementation(self.name), graphs, torch.no_grad():
            logits: Tensor = self.forward(self.x, **self.options).logits
            return logits


def measure_job(ranks: Ranks, folder: str, job: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """One row for each implementation; raises WrongResult when they do not agree."""
    names = ["symmpatterns", dist.get_backend()]
    models: dict[str, Model] = {}
    calls: dict[str, Callable[[], object]] = {}
    results: dict[str, Tensor] = {}
    columns: dict[str, dict[str, Any]] = {}
    for name in names:
        torch._dynamo.reset()
        symmpatterns.report().clear()
        model = models[name] = Model(ranks, folder, job, name, dtype)
        results[name], seconds = first_call(model)  # type: ignore[arg-type]  # it has what is asked of a model
        report = symmpatterns.report()
        if name == "symmpatterns":
            ranks.say(str(report))
        calls[name] = graph_of(model.run).replay if model.cuda_graphs else model.run
        columns[name] = {
            "implementation": name,
            "launch": "graph" if model.cuda_graphs else "eager",
            "compile_s": round(seconds, 2),
            "peak_mib": "",
            "outside_mib": "",
            "rewritten": len(report.rewrites),
            "declined": len(report.declined),
        }
    first, other = (results[name].float() for name in names)
    error = ranks.slowest([float((first - other).norm() / other.norm())])[0]
    if not error <= TOLERANCE:
        raise WrongResult(f"{names[0]} differs from {names[1]} by {error:.2e}")
    runs = GRAPH_CALLS if ranks.device.type == "cuda" else 1
    samples: dict[str, list[float]] = {name: [] for name in names}
    host: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            samples[name].append(sample(ranks, call, 3) / runs)
            host[name].append(host_time(ranks, call) / runs)
    rows = []
    for name in names:
        slowest = ranks.slowest(samples[name][1:])
        p20, p50, p80 = (round(statistics.quantiles(slowest, n=10, method="inclusive")[i], 1) for i in (1, 4, 7))
        rows.append(
            columns[name]
            | {"p20_us": p20, "p50_us": p50, "p80_us": p80}
            | {"host_us": round(statistics.median(ranks.slowest(host[name][1:])), 1), "samples": rounds}
            | {"tokens_per_s": round(models[name].count / p50 * 1e6)}
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS))
    parser.add_argument("--jobs", nargs="+", metavar="JOB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no job after so many seconds")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args(argv)
    began = time.monotonic()
    ranks = start_ranks()
    on_gpu = ranks.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    environment = {
        "device": device_name(ranks.device), "world_size": ranks.world_size, "torch": torch.__version__,
        "commit": commit(), "load": ranks.load, "layers": LAYERS,
    }  # fmt: skip
    wrong = 0
    for model in args.models or (["llama-8b", "qwen2-7b"] if on_gpu else ["tiny"]):
        folders = [tempfile.mkdtemp() if ranks.rank == 0 else None]
        dist.broadcast_object_list(folders, 0)
        folder = str(folders[0])
        with contextlib.ExitStack() as stack:
            if ranks.rank == 0:
                stack.callback(shutil.rmtree, folder)
                save_model(model, folder, dtype)
            dist.barrier()
            for job in args.jobs or (GPU_JOBS if on_gpu else CPU_JOBS):
                if ranks.slowest([time.monotonic() - began])[0] > args.seconds:
                    ranks.say(f"{model} {job}: not begun")
                    continue
                try:
                    new = measure_job(ranks, folder, job, dtype, args.rounds)
                except WrongResult as error:
                    wrong += 1
                    ranks.say(f"{model} {job}: WRONG, {error}")
                    continue
                new = [{"model": model, "job": job, **row, **environment} for row in new]
                ranks.say("\n".join(map(line, new)))
                if ranks.rank == 0 and not args.no_save:
                    save(Path(result_path(ranks, "hf")), new)
            dist.barrier()
    dist.destroy_process_group()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
