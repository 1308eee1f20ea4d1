"""Training steps of a tensor-parallel Llama-style model, compiled.

    torchrun --standalone --nproc-per-node 2 examples/llama_training_step.py [--sequence-parallel] [--compare]

Forward, backward and an AdamW update. The losses are checked against the unsplit model in eager mode; then the report
and the time of a step. On GPUs where there is one for every rank, else on CPU. `--compare` times the model compiled
without symmpatterns beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from llama import Llama, Shape, parallelize
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from tp_mlp import WITHOUT, start_ranks, time_side_by_side

import symmpatterns


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, help="width of the model (default: 64 on CPU, 4096 on GPUs)")
    parser.add_argument("--tokens", type=int, help="length of the text (default: 32 on CPU, 4096 on GPUs)")
    parser.add_argument("--steps", type=int, default=3, help="steps whose losses are compared")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--sequence-parallel", action="store_true", help="split the tokens between the layers too")
    parser.add_argument("--compare", action="store_true", help="compile and time without symmpatterns too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = start_ranks()
    on_gpu = device.type == "cuda"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dim = args.dim or (4096 if on_gpu else 64)
    shape = Shape(args.layers, dim, heads=max(8, dim // 128), kv_heads=8, hidden=2 * dim, vocabulary=1024)
    tokens = torch.randint(
        shape.vocabulary,
        (1, args.tokens or (4096 if on_gpu else 32)),
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    mesh = init_device_mesh(device.type, (world_size,))

    def make(split: bool) -> Llama:
        torch.manual_seed(0)  # the same weights on every rank
        model = Llama(shape).to(device)
        if split:
            parallelize(model, mesh, args.sequence_parallel)
        return model

    def stepper(model: Llama, **compile_options: Any) -> Callable[[], Tensor]:
        """A function that makes one training step and returns its loss."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        forward = torch.compile(model, fullgraph=True, **compile_options) if compile_options else model

        def step() -> Tensor:
            optimizer.zero_grad()
            logits = forward(tokens)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    runs: dict[str, Callable[[], object]] = {"with": stepper(make(split=True), dynamic=False)}
    if args.compare:
        runs["without"] = stepper(make(split=True), dynamic=False, options=WITHOUT)
    whole = stepper(make(split=False))
    for _ in range(args.steps):
        expected = whole()
        for run in runs.values():
            torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)

    times = time_side_by_side(runs, device, args.rounds)
    if rank == 0:
        print(f"checked: {args.steps} losses equal the unsplit model's, the last is {expected:.4f}")
        print(symmpatterns.report())
        print("step: " + ", ".join(f"{name} symmpatterns {time:.0f} us" for name, time in times.items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
