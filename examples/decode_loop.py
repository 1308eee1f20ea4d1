"""Greedy decoding with a tensor-parallel Llama-style model: one graph for the prompt, one for every further token.

    torchrun --standalone --nproc-per-node 2 examples/decode_loop.py [--compare]

The tokens are checked against the unsplit model in eager mode; then the report and the time of a token. On GPUs where
there is one for every rank, else on CPU. `--compare` times the model compiled without symmpatterns beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from llama import Cache, Llama, Shape, parallelize
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from tp_mlp import WITHOUT, start_ranks, time_side_by_side

import symmpatterns

Forward = Callable[[Tensor, Tensor, Cache], Tensor]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, help="width of the model (default: 64 on CPU, 4096 on GPUs)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=8, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds")
    parser.add_argument("--compare", action="store_true", help="compile and time without symmpatterns too")
    return parser.parse_args(argv)


def empty_cache(shape: Shape, batch: int, tokens: int, ranks: int, device: torch.device) -> Cache:
    """Room for the keys and values of this rank's heads."""
    size = (batch, shape.kv_heads // ranks, tokens, shape.head_dim)
    return [(torch.zeros(size, device=device), torch.zeros(size, device=device)) for _ in range(shape.layers)]


def decode(forward: Forward, prompt: Tensor, new: int, cache: Cache) -> Tensor:
    """The prompt's `new` most likely next tokens, [batch, new]."""
    positions = torch.arange(prompt.shape[1], device=prompt.device)
    token = forward(prompt, positions, cache)[:, -1:].argmax(-1)
    answer = [token]
    position = positions[-1:]
    for _ in range(new - 1):
        position = position + 1
        token = forward(token, position, cache)[:, -1:].argmax(-1)
        answer.append(token)
    return torch.cat(answer, 1)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = start_ranks()
    on_gpu = device.type == "cuda"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dim = args.dim or (4096 if on_gpu else 64)
    shape = Shape(args.layers, dim, heads=max(8, dim // 128), kv_heads=8, hidden=2 * dim, vocabulary=1024)
    prompt = torch.randint(shape.vocabulary, (args.batch, args.prompt), generator=torch.Generator().manual_seed(1)).to(
        device
    )
    room = args.prompt + args.new

    torch.manual_seed(0)  # the same weights on every rank
    model = Llama(shape).to(device)
    expected = decode(model, prompt, args.new, empty_cache(shape, args.batch, room, 1, device))
    parallelize(model, init_device_mesh(device.type, (world_size,)))
    compiled: dict[str, Any] = {"with": torch.compile(model, dynamic=False, fullgraph=True)}
    if args.compare:
        compiled["without"] = torch.compile(model, dynamic=False, fullgraph=True, options=WITHOUT)
    for name, forward in compiled.items():
        tokens = decode(forward, prompt, args.new, empty_cache(shape, args.batch, room, world_size, device))
        assert torch.equal(tokens, expected), f"{name}: {tokens} are not {expected}"

    cache = empty_cache(shape, args.batch, room, world_size, device)
    last = torch.tensor([room - 1], device=device)
    times = time_side_by_side(
        {name: partial(forward, expected[:, :1], last, cache) for name, forward in compiled.items()},
        device,
        args.rounds,
    )
    if rank == 0:
        print(f"checked: {args.new} tokens of {args.batch} texts equal the unsplit model's")
        print(symmpatterns.report())
        print("token: " + ", ".join(f"{name} symmpatterns {time:.0f} us" for name, time in times.items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
