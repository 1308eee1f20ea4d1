"""FSDP beside tensor parallelism on a 2x2 mesh: the tensor-parallel collectives are rewritten, FSDP's are left."""

from __future__ import annotations

import tempfile
import unittest

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import symmpatterns
from symmpatterns.testing import run_ranks

DIM = 16
F = nn.functional


def _records() -> list[tuple]:
    report = symmpatterns.report()
    answer = sorted((r.group_name, r.family, r.code or "") for r in report.records)
    report.clear()
    return answer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM, bias=False), nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def _fsdp2(mesh) -> dict[str, object]:
    """As torchtitan does it: tensor parallelism, then each block compiled, then FSDP around each block."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(mesh["dp"].get_local_rank())
    x = torch.randn(2, 8, DIM)

    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(7)
        model = nn.Sequential(Block())
        for block in model:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            if compiled:
                block.compile(fullgraph=True)
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        seen = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), x)
            loss.backward()
            optimizer.step()
            seen.append(float(loss.detach()))
        return seen

    return {"actual": losses(compiled=True), "expected": losses(compiled=False), "records": _records()}


def _in_the_graph(mesh) -> dict[str, object]:
    """Both kinds of parallelism as collectives of one graph: sequence-parallel activations, sharded weights."""
    dp, tp = mesh["dp"].get_group(), mesh["tp"].get_group()
    torch.manual_seed(torch.distributed.get_rank())
    parameters = [torch.randn(DIM // 2, 2 * DIM), torch.randn(DIM, DIM), torch.randn(DIM // 2)]
    x = torch.randn(8, DIM)

    def block(x: Tensor, up: Tensor, down: Tensor, norm: Tensor) -> Tensor:
        up, down, norm = (funcol.all_gather_tensor_autograd(shard, 0, dp) for shard in (up, down, norm))
        whole = funcol.all_gather_tensor_autograd(F.rms_norm(x, (DIM,)) * norm, 0, tp)
        return x + funcol.reduce_scatter_tensor_autograd(F.gelu(whole @ up) @ down, "sum", 0, tp)

    def gradients(fn) -> list[Tensor]:
        inputs = [each.clone().requires_grad_() for each in (x, *parameters)]
        fn(*inputs).square().sum().backward()
        return [each.grad for each in inputs]

    expected = gradients(block)
    return {"actual": gradients(torch.compile(block, fullgraph=True)), "expected": expected, "records": _records()}


def _replicated(mesh, placements: list) -> dict[str, object]:
    """DDP, or FSDP within and DDP between rows of the mesh, as DTensor traces them into the graph."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    weight = nn.Parameter(distribute_tensor(torch.randn(DIM, DIM), mesh, placements))
    x = torch.randn(4, DIM) + torch.distributed.get_rank()

    def fn(x: Tensor, weight: Tensor) -> Tensor:
        whole = weight.redistribute(placements=[Replicate()] * 2)
        return torch.tanh(x @ whole.to_local(grad_placements=[Partial()] * 2))

    def gradient(call) -> Tensor:
        weight.grad = None
        call(x, weight).square().sum().backward()
        return weight.grad.to_local()

    expected = gradient(fn)
    return {"actual": gradient(torch.compile(fn, fullgraph=True)), "expected": expected, "records": _records()}


def _twice_with_one_cache(rank: int, world_size: int) -> dict[str, object]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "fsdp"))
    result = _replicated(mesh, [Replicate(), Shard(0)])
    result["records"] = [record[1:] for record in result["records"]]
    return result


def _run(rank: int, world_size: int) -> tuple:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return mesh["dp"].get_group().group_name, mesh["tp"].get_group().group_name, _fsdp2(mesh), _in_the_graph(mesh)


class FullyShardTest(unittest.TestCase):
    def test_gradients_of_replicated_weights_in_the_graph(self) -> None:
        """Twice: the second time from the cache, in which torch's key of a graph with DTensors is that of all four ranks."""
        wanted = [
            ("matmul_all_reduce", "weight_gradient"),
            ("peer_all_gather", "graph_input"),
            ("peer_reduce_scatter", "weight_gradient"),
        ]
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(2):
                for result in run_ranks(_twice_with_one_cache, 4, timeout=280, env={"TORCHINDUCTOR_CACHE_DIR": folder}):
                    torch.testing.assert_close(result["actual"], result["expected"], rtol=1e-4, atol=1e-4)
                    self.assertEqual(result["records"], wanted)

    def test_on_a_mesh(self) -> None:
        for dp, tp, fsdp2, in_the_graph in run_ranks(_run, 4, timeout=280):
            for result in (fsdp2, in_the_graph):
                torch.testing.assert_close(result["actual"], result["expected"], rtol=1e-4, atol=1e-4)
            # FSDP2 communicates outside of the compiled graphs: there is nothing of it to decline.
            self.assertEqual(fsdp2["records"], [(tp, "matmul_all_reduce", "")] * 2)
            wanted = [
                *[(dp, "matmul_reduce_scatter", "weight_gradient")] * 2,
                *[(dp, "peer_all_gather", "graph_input")] * 3,
                (dp, "peer_reduce_scatter", "weight_gradient"),
                *[(tp, "all_gather_matmul", "")] * 2,
                *[(tp, "matmul_reduce_scatter", "")] * 2,
            ]
            self.assertEqual(in_the_graph["records"], sorted(wanted))
