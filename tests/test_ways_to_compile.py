"""One tensor-parallel model, compiled and run in the ways that torch.compile offers: eager's answer, always reported."""

from __future__ import annotations

import contextlib
import time
import unittest
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import checkpoint

import symmpatterns
from symmpatterns.inductor_hook import Chain
from symmpatterns.testing import fake_group, run_ranks

MATMUL = ("template", "matmul_all_reduce", None)
PEER = ("peer_views", "peer_all_reduce", None)
UPSTREAM: list[dict[str, Any]] = [
    {"_micro_pipeline_tp": True},
    {"reorder_for_compute_comm_overlap": True},
    {
        "aten_distributed_optimizations.enable_overlap_scheduling": True,
        "aten_distributed_optimizations.collective_bucketing": True,
    },
]


def mlp(width: int = 32) -> nn.Module:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, width, bias=False), nn.ReLU(), nn.Linear(width, 16, bias=False))
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def rows(n: int = 4) -> Tensor:
    return torch.linspace(-1, 1, n * 16).view(n, 16)


def train(model: nn.Module, fn: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = fn(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.to_local() for p in model.parameters())]


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def records() -> list[tuple]:
    """(strategy, family, code) of what happened since the last look."""
    report = symmpatterns.report()
    answer = [(r.strategy, r.family, r.code) for r in report.records]
    report.clear()
    torch._dynamo.reset()
    return answer


@contextlib.contextmanager
def expect(*wanted: tuple) -> Iterator[None]:
    """In any order: a graph from the cache tells what became of it in another one."""
    records()
    yield
    got = records()
    assert sorted(got, key=str) == sorted(wanted, key=str), f"expected {wanted}, got {got}"


def partial_sum(x: Tensor, w: Tensor) -> Tensor:
    return funcol.all_reduce(x @ w, "sum", dist.group.WORLD)


# --- cheap enough for every run ---------------------------------------------------------------------------------


def _shapes() -> None:
    model = mlp()
    with expect(MATMUL, MATMUL):  # forward and backward, for every size
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for n in (4, 6, 9):
            same(train(model, compiled, rows(n)), train(model, model, rows(n)))
    with torch.no_grad():
        with expect(MATMUL):
            compiled = torch.compile(model, fullgraph=True)
            for n in (4, 6):
                x = rows(n)
                torch._dynamo.mark_dynamic(x, 0)
                same(compiled(x), model(x))
        with expect(MATMUL, MATMUL):  # the first size, then one graph for all others
            compiled = torch.compile(model, fullgraph=True)
            for n in (4, 6, 9):
                same(compiled(rows(n)), model(rows(n)))


def _graph_break() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        torch._dynamo.graph_break()
        return funcol.all_reduce(y, "sum", dist.group.WORLD)

    x, w = rows(), rows(16)
    with expect(PEER):  # its input comes from outside of the graph: one store
        same(torch.compile(fn)(x, w), fn(x, w))
    with expect((None, None, "no_pattern")), symmpatterns.config.patch(peer_views=False):
        same(torch.compile(fn)(x, w), fn(x, w))
        (declined,) = symmpatterns.report().declined
        assert declined.producer == "graph input", declined


def _checkpointing() -> None:
    model = mlp()

    def fn(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    with expect(MATMUL, MATMUL):
        same(train(model, torch.compile(fn, fullgraph=True), rows()), train(model, fn, rows()))


def _modes() -> None:
    model = mlp()
    contexts: list[Any] = [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
    with expect(MATMUL, MATMUL, MATMUL):  # one graph each
        compiled = torch.compile(model, fullgraph=True)
        for context in [*contexts, *contexts]:
            with context():
                actual, expected = compiled(rows()), model(rows())
            assert actual.dtype == expected.dtype
            loose = 0.05 if actual.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(actual, expected, rtol=loose, atol=loose)


def _nested_regions() -> None:
    """A layer that is compiled once and called three times by the graph around it."""

    @torch.compiler.nested_compile_region
    def layer(x: Tensor, w: Tensor) -> Tensor:
        return funcol.all_reduce(torch.relu(partial_sum(x, w)) + x, "max", dist.group.WORLD)

    def fn(x: Tensor, ws: list[Tensor]) -> Tensor:
        for w in ws:
            x = layer(x, w)
        return partial_sum(x, ws[0]) + funcol.all_reduce(x, "sum", dist.group.WORLD)

    ws = [rows(16) + i for i in range(3)]
    with expect(MATMUL, PEER, MATMUL, (None, "peer_all_reduce", "nested_graph")):
        compiled = torch.compile(fn, fullgraph=True)
        for _ in range(3):
            same(compiled(rows(), ws), fn(rows(), ws))


def _several_models() -> None:
    models = [mlp(width) for width in (32, 64)]
    with torch.no_grad():
        with expect(MATMUL, MATMUL):
            compiled = [torch.compile(model, fullgraph=True) for model in models]
            for _ in range(2):  # they take turns in one group's memory
                for fn, model in zip(compiled, models):
                    same(fn(rows()), model(rows()))
        with expect(MATMUL, MATMUL):
            same(compiled[0](rows()), models[0](rows()))
            torch._dynamo.reset()  # the same function is compiled and rewritten anew
            same(compiled[0](rows()), models[0](rows()))


def _several_groups(world_size: int) -> None:
    groups = [dist.group.WORLD, *(dist.new_group(list(range(world_size))) for _ in range(2))]
    w = rows(16)

    def model(group: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: funcol.all_reduce(x @ w, "sum", group)

    def all_of_them(x: Tensor) -> Tensor:
        for group in groups:
            x = model(group)(torch.relu(x))
        return x

    with expect(MATMUL, MATMUL, MATMUL):
        for group in groups:
            same(torch.compile(model(group), fullgraph=True)(rows()), model(group)(rows()))
        assert {r.group_name for r in symmpatterns.report().records} == {group.group_name for group in groups}
    with expect(MATMUL, MATMUL, MATMUL):
        same(torch.compile(all_of_them, fullgraph=True)(rows()), all_of_them(rows()))


def _group_made_again(rank: int, world_size: int) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return funcol.all_reduce(torch.relu(partial_sum(x, w)), "sum", dist.group.WORLD)

    store = dist.distributed_c10d._get_default_store()
    for number in range(3):
        x, w = rows() * (rank + 1 + number), rows(16)
        with expect(MATMUL, PEER):
            same(torch.compile(fn, fullgraph=True)(x, w), fn(x, w))
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=world_size)


def _sequence_parallel(x: Tensor, w: Tensor) -> Tensor:
    whole = funcol.all_gather_tensor(x, 0, dist.group.WORLD)
    return funcol.reduce_scatter_tensor(torch.relu(whole @ w) @ w, "sum", 0, dist.group.WORLD)


def _upstreams_own_passes() -> None:
    """Each of them, then all at once; on CPU none of them takes a collective."""
    model, w = mlp(), rows(16)
    pair = [("template", "all_gather_matmul", None), ("template", "matmul_reduce_scatter", None)]
    together = {name: value for each in UPSTREAM for name, value in each.items()}
    for options in (*UPSTREAM, together):
        with inductor_config.patch(options), torch.no_grad():
            with expect(MATMUL):
                same(torch.compile(model, fullgraph=True)(rows()), model(rows()))
            with expect(*pair):
                compiled = torch.compile(_sequence_parallel, fullgraph=True)
                same(compiled(rows(), w), _sequence_parallel(rows(), w))


def _quick(rank: int, world_size: int) -> bool:
    _shapes()
    _graph_break()
    _checkpointing()
    _modes()
    _nested_regions()
    _several_models()
    _several_groups(world_size)
    _upstreams_own_passes()
    _group_made_again(rank, world_size)
    return True


# --- slow: each compiles a lot, or through a compiler of its own --------------------------------------------------


def _tuned(rank: int, world_size: int) -> bool:
    model = mlp()
    for mode in ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"):
        with expect(MATMUL, MATMUL):
            same(train(model, torch.compile(model, mode=mode, fullgraph=True), rows()), train(model, model, rows()))
    with expect(MATMUL, MATMUL), inductor_config.patch(coordinate_descent_tuning=True):
        same(train(model, torch.compile(model, fullgraph=True), rows()), train(model, model, rows()))
    return True


class _Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows(16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = partial_sum(x, self.weight)
        return total, funcol.all_reduce(torch.relu(total), "max", dist.group.WORLD)


def _without_python(rank: int, world_size: int) -> bool:
    wanted = [MATMUL, (None, "peer_all_reduce", "cpp_wrapper")]
    model, x = _Exported(), rows() * (rank + 1)
    with torch.no_grad():
        with expect(*wanted), inductor_config.patch(cpp_wrapper=True):
            compiled = torch.compile(model, fullgraph=True)
            for _ in range(2):
                same(compiled(x), model(x))
        with expect(*wanted):
            package = torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)))
            loaded, expected = torch._inductor.aoti_load_package(package), list(model(x))
            for _ in range(2):
                # AOTInductor's code keeps Python's lock while it runs, and gloo's thread needs it, and may have gloo's own
                # lock then, when it lets go of the tensors of the call before: give it the time to.
                time.sleep(0.5)
                same(list(loaded(x)), expected)
    return True


class _Recorder(CustomGraphPass):
    """Behind our pass: the operators of the graph that is left."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.called = [str(node.target) for node in graph.nodes if node.op == "call_function"]

    def uuid(self) -> Any:
        return None


class WaysToCompileTest(unittest.TestCase):
    def test_quick_ones(self) -> None:
        self.assertEqual(run_ranks(_quick, 2, timeout=280), [True, True])

    @parameterized.expand([("tuned", _tuned), ("without python", _without_python)])
    @pytest.mark.slow
    @pytest.mark.timeout(600)
    def test_slow(self, _: str, run: Callable[..., bool]) -> None:
        self.assertEqual(run_ranks(run, 2, timeout=580), [True, True])

    @pytest.mark.slow
    def test_what_upstream_took_stays_its_own(self) -> None:
        """Each collective has one owner. Upstream takes some in builds with NCCL, and its kernels do not run on CPU."""
        from torch.distributed import _symmetric_memory

        recorder = _Recorder()
        with fake_group(2) as name, warnings.catch_warnings(), contextlib.suppress(NotImplementedError):
            warnings.simplefilter("ignore", FutureWarning)
            _symmetric_memory.enable_symm_mem_for_group(name)
            hook = Chain((symmpatterns.post_grad_pass, recorder))
            with inductor_config.patch(_micro_pipeline_tp=True, post_grad_custom_post_pass=hook), torch.no_grad():
                torch.compile(_sequence_parallel, fullgraph=True)(rows(), rows(16))
        ours = sum(each.startswith("symmpatterns.") for each in recorder.called)
        upstreams = sum(each.startswith("symm_mem.fused") for each in recorder.called)
        self.assertEqual(ours + upstreams, 2, recorder.called)
        self.assertFalse(any("_c10d_functional" in each for each in recorder.called), recorder.called)
        self.assertEqual(len(symmpatterns.report().records), ours)
