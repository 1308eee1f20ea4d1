"""A tensor-parallel transformer MLP, compiled with and without symmpatterns.

    torchrun --standalone --nproc-per-node 2 examples/tp_mlp.py

Two ranks split each MLP as DTensor's ColwiseParallel and RowwiseParallel do, so every layer ends in a matmul whose
partial products are summed over the ranks. The model knows nothing of symmpatterns. With it that sum happens inside
one fused operator; the script checks both compiled models against the unsharded model in float64, shows which call
replaced which in the generated code, prints the report and times both models side by side. It runs on GPUs where
there is one for every rank, else on CPU.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import symmpatterns
from symmpatterns.testing import assert_same_on_all_ranks, assert_within_budget

# Without symmpatterns, for one compilation: the hook that `import symmpatterns` sits on is empty.
WITHOUT: dict[str, Any] = {"post_grad_custom_post_pass": None}


class MLP(nn.Module):
    """The feed-forward half of a transformer layer: norm, up, GELU, down, residual."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, help="width of the model (default: 512 on CPU, 8192 on GPUs)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", help="batch sizes (default: 4 64 on CPU, 16 512 on GPUs)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds")
    return parser.parse_args(argv)


def start_ranks() -> torch.device:
    """The process group that torchrun describes; nccl with a GPU for every rank, else gloo."""
    if "RANK" not in os.environ:
        sys.exit(f"start me with:  torchrun --standalone --nproc-per-node 2 {sys.argv[0]}")
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() >= local_ranks:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return device


def calls_of_interest(code: str) -> list[str]:
    """The calls of Inductor's generated code that multiply matrices or communicate, in order."""
    calls = []
    for line in (line.strip() for line in code.splitlines()):
        found = re.search(r"extern_kernels\.(add)?mm\(|torch\.ops\.(_c10d_functional|symmpatterns)\.\w+\.\w+\(", line)
        if found and not line.startswith(("#", "assert")):
            calls.append(line if len(line) <= 112 else line[:108] + " ...")
    return calls


def time_side_by_side(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median microseconds of a call. The candidates take turns, so that a busy moment hits them alike."""

    def once(run: Callable[[], object], calls: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls * 1e6

    samples: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 3):
        for name, run in runs.items():
            sample = once(run, calls=5)
            if round_number >= 3:  # the first rounds warm caches up
                samples[name].append(sample)
    return {name: statistics.median(values) for name, values in samples.items()}


def check(actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Fails unless `actual` is as good as eager mode's result, and the same bits on every rank."""
    assert_within_budget(actual, exact, eager)
    gathered = [torch.empty_like(actual) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, actual.contiguous())
    assert_same_on_all_ranks(gathered)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = start_ranks()
    on_gpu = device.type == "cuda"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hidden = args.hidden or (8192 if on_gpu else 512)
    all_tokens = args.tokens or ([16, 512] if on_gpu else [4, 64])
    dtype = torch.bfloat16 if on_gpu else torch.float32

    def say(*lines: str) -> None:
        if rank == 0:
            print(*lines, sep="\n", flush=True)

    torch.manual_seed(0)  # every rank builds the same model, then keeps its share
    model = nn.Sequential(*(MLP(hidden) for _ in range(args.layers))).to(device, dtype)
    unsharded = copy.deepcopy(model).double()
    mesh = init_device_mesh(device.type, (world_size,))
    parallelize_module(model, mesh, {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()})

    where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} thread(s) a rank"
    say(
        f"{args.layers} MLP layers, hidden {hidden}, {str(dtype).removeprefix('torch.')}, "
        f"split over {world_size} ranks on {where}",
        "compiling ...",
    )
    times: dict[int, dict[str, float]] = {}
    code_without, code_with = "", ""
    for tokens in all_tokens:
        x = torch.randn(tokens, hidden, device=device, dtype=dtype)
        dist.broadcast(x, src=0)
        plain = torch.compile(model, dynamic=False, options=WITHOUT)
        fused = torch.compile(model, dynamic=False)

        exact, eager = unsharded(x.double()), model(x)
        result_without, sources_without = run_and_get_code(plain, x)
        result_with, sources_with = run_and_get_code(fused, x)
        check(result_without, exact, eager)
        check(result_with, exact, eager)
        code_without, code_with = "\n".join(sources_without), "\n".join(sources_with)

        runs: dict[str, Callable[[], object]] = {"without": partial(plain, x), "with": partial(fused, x)}
        times[tokens] = time_side_by_side(runs, device, args.rounds)
    say("checked: both compiled models agree with the unsharded model in float64, all ranks bit by bit", "")

    say("Matmuls and collectives in the generated code, without symmpatterns:")
    say(*(f"  - {line}" for line in calls_of_interest(code_without)))
    say("and with it:")
    say(*(f"  + {line}" for line in calls_of_interest(code_with)), "")
    say(str(symmpatterns.report()), "")

    say(f"{'tokens':>8}  {'without':>12}  {'with':>12}  {'speed-up':>8}")
    for tokens, medians in times.items():
        ratio = medians["without"] / medians["with"]
        say(f"{tokens:>8}  {medians['without']:>9.0f} us  {medians['with']:>9.0f} us  {ratio:>7.2f}x")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
