"""Peer views between real processes: every collective against gloo, late reads, kept results, several groups."""

from __future__ import annotations

import re
import unittest
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from parameterized import parameterized
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import symmpatterns
from symmpatterns import config, cost_model
from symmpatterns.inductor_hook import Chain
from symmpatterns.testing import assert_same_on_all_ranks, compiled_code, run_ranks

warnings.filterwarnings("ignore", category=FutureWarning)


FAMILIES = {"peer_all_reduce", "peer_all_gather", "peer_reduce_scatter", "peer_all_to_all", "peer_broadcast"}


def world() -> Any:
    return dist.group.WORLD


def waited(results: Any) -> list[torch.Tensor]:
    return [r.wait() if hasattr(r, "wait") else r for r in results]


def compare(compiled: Any, eager: Any, what: str) -> None:
    for number, (one, other) in enumerate(zip(waited(compiled), waited(eager), strict=True)):
        loose = 2e-2 if one.dtype in (torch.bfloat16, torch.float16) else 1e-4
        torch.testing.assert_close(
            one, other, rtol=loose, atol=loose, msg=lambda text, n=number: f"{what}, result {n}: {text}"
        )


def families() -> set[str | None]:
    return {record.family for record in symmpatterns.report().rewrites}


# --- every collective, in one graph each ----------------------------------------------------------------------------


def reductions(x: torch.Tensor, y: torch.Tensor, ints: torch.Tensor, half: torch.Tensor) -> Any:
    total = funcol.all_reduce(torch.nn.functional.gelu(x) * 2, "sum", world())
    largest = funcol.all_reduce(x + 1, "max", world())
    product = funcol.all_reduce(torch.softmax(x, -1), "product", world())
    whole = funcol.all_reduce(ints * 3, "sum", world())
    smallest = funcol.all_reduce(ints + 1, "min", world())
    rounded = funcol.all_reduce(half.sin(), "sum", world())
    rows = funcol.all_reduce(y.sum(-1), "sum", world())
    scalar = funcol.all_reduce(x.sum(), "sum", world())
    pair = funcol.all_reduce_coalesced([x * 3, x.tanh()], "sum", world())
    again = funcol.all_reduce(rows.softmax(0), "sum", world())  # the input of one is the result of another
    transposed = funcol.all_reduce(y.t() + 1, "sum", world())
    return total, largest, product, whole, smallest, rounded, rows, scalar, *pair, again, transposed


def movements(x: torch.Tensor, y: torch.Tensor, ints: torch.Tensor, half: torch.Tensor) -> Any:
    rows = funcol.all_gather_tensor(x.sin(), 0, world())
    columns = funcol.all_gather_tensor(half.cos(), 1, world())
    scattered = funcol.reduce_scatter_tensor(y.cos(), "sum", 0, world())
    cut = funcol.reduce_scatter_tensor(y.exp(), "sum", 1, world())
    exchanged = funcol.all_to_all_single(y * 5, None, None, world())
    part = y.shape[0] // dist.get_world_size()
    parts = [part] * dist.get_world_size()
    split = funcol.all_to_all_single(y * 6, parts, parts, world())
    spread = funcol.broadcast(x.tan(), 1, world())
    pair = funcol.all_gather_into_tensor_coalesced([x * 3, ints * 2], world())
    both = funcol.reduce_scatter_tensor_coalesced([y * 3, y * 2], "sum", [0, 0], world())
    return rows, columns, scattered, cut, exchanged, split, spread, *pair, *both


def late(x: torch.Tensor, y: torch.Tensor, ints: torch.Tensor, half: torch.Tensor) -> Any:
    """Slots are read long after their site: as a residual, through views, by the caller, as what was written to."""
    full = funcol.all_gather_tensor(x.cos(), 0, world())
    middle = funcol.all_reduce(full[: x.shape[0]].sum(0), "sum", world())
    product = full * middle
    stream = funcol.all_reduce(x * 0.5, "sum", world()) + x
    twice = funcol.all_reduce(stream.relu(), "sum", world()) + stream
    thrice = funcol.all_reduce(twice.relu(), "sum", world()) + stream + twice
    chained = funcol.all_gather_tensor(full + 1, 0, world())
    direct = funcol.all_reduce(funcol.all_reduce(x * 2, "sum", world()), "sum", world())
    first = torch.zeros(1, dtype=torch.long)
    # Inductor writes to the result of a call in place when nobody else reads it.
    written = funcol.all_gather_tensor(x.tan(), 0, world()).index_put((first,), x[:1])
    spread = funcol.broadcast(x.exp(), 1, world()).index_put((first,), x[:1])
    views = full.view(-1), full.t(), full[1:]
    return product, *views, stream, thrice, chained.split(x.shape[0])[1], direct, written, spread


def _arguments(rank: int, world_size: int, n: int, call: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1000 * call + rank)
    x = torch.randn(n, 8)
    y = torch.randn(2 * world_size * n, 3 * world_size)
    return x, y, torch.randint(-5, 5, (n, 7)), torch.randn(n, 6).bfloat16()


def _each_collective(rank: int, world_size: int, sizes: list[int]) -> Any:
    reduced: list[torch.Tensor] = []
    for graph in (reductions, movements, late) if world_size == 2 else (movements, late):
        # Overlap is not the question here: whatever is not used at once in these graphs would be left alone.
        with config.patch(force=True, keep_overlap=False):
            compiled = torch.compile(graph, fullgraph=True)
            kept = []
            for call, n in enumerate(sizes):
                arguments = _arguments(rank, world_size, n, call)
                kept.append((compiled(*arguments), graph(*arguments)))
                compare(*kept[-1], f"{graph.__name__}, call {call}")
        for call, (one, other) in enumerate(kept):  # what the caller kept must not be slot memory
            compare(one, other, f"{graph.__name__}, call {call}, looked at later")
        if graph is reductions:
            reduced = [tensor for one, _ in kept for tensor in one]
    assert not symmpatterns.report().declined, symmpatterns.report()
    assert families() == FAMILIES, families()
    return reduced


# --- a pass of the host's behind ours ---------------------------------------------------------------------------------


class _RemoveClones(CustomGraphPass):
    """As vLLM has one: a clone that nobody writes to seems superfluous."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target is torch.ops.aten.clone.default:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)

    def uuid(self) -> Any:
        return None


def _clones_removed(rank: int, world_size: int) -> Any:
    def fn(x: torch.Tensor) -> Any:
        kept = funcol.all_gather_tensor(x.tanh(), 0, world()), funcol.broadcast(x.cos(), 1, world())
        return *kept, funcol.all_reduce(kept[0].sin(), "sum", world())

    hook = Chain((symmpatterns.post_grad_pass, _RemoveClones()))
    with config.patch(force=True), inductor_config.patch(post_grad_custom_post_pass=hook):
        compiled = torch.compile(fn, fullgraph=True)
        arguments = [torch.full((4, 16), float(call + rank)) for call in range(4)]
        results = [compiled(x) for x in arguments]
    for call, (one, x) in enumerate(zip(results, arguments)):  # looked at when the slots have been used again
        compare(one, fn(x), f"call {call}")
    return len(symmpatterns.report().rewrites)


# --- as it ships: nothing forced, overlap kept ------------------------------------------------------------------------


def _decided_alike(rank: int, world_size: int) -> Any:
    """Ranks whose own tensors differ in size; several collectives, of which one must not count as the other's cover."""

    def fn(x: torch.Tensor, own: torch.Tensor) -> Any:
        scale = x.abs().amax() / 448
        q = (x / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        rows = funcol.all_gather_tensor(q, 0, world()).view(torch.float8_e4m3fn).float()
        scales = funcol.all_gather_tensor(scale.view(1), 0, world())
        mean = funcol.all_reduce(x.mean(0), "avg", world())
        square = funcol.all_reduce((x * x).mean(0), "avg", world())
        first = funcol.broadcast(own.mean(0), 0, world())
        weights = (own.sin() * own.cos()).softmax(-1)
        mine = weights * weights.sum(0)
        return rows.view(world_size, -1) * scales[:, None], square - mean * mean, mine + first

    x, own = torch.randn(128, 64), torch.randn((4, 4000)[rank], 32)
    with config.patch(timeout_s=60):
        compare(torch.compile(fn, fullgraph=True)(x, own), fn(x, own), "as it ships")
    return sorted(str(record.collective) for record in symmpatterns.report().rewrites)


# --- graphs in turn, groups, training, caller's tensors --------------------------------------------------------------


def _graphs_and_groups(rank: int, world_size: int) -> Any:
    everyone = dist.group.WORLD
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[rank // 2]

    def odd(x: torch.Tensor) -> torch.Tensor:
        return funcol.all_reduce(x * 2, "sum", everyone) + 1

    def mixed(x: torch.Tensor) -> torch.Tensor:
        kept = funcol.broadcast(x.cos(), 1, mine)
        a = funcol.all_reduce(x.sin(), "sum", mine)
        b = funcol.all_gather_tensor(a + 1, 0, everyone)
        c = funcol.reduce_scatter_tensor(b * 2, "sum", 0, everyone)
        d = funcol.all_reduce(c.relu(), "max", mine) + a
        # What lay in one group's slot goes through another's, when the slot has been used again.
        return funcol.all_reduce(d * 2, "max", mine) + funcol.all_reduce(kept, "sum", everyone)

    with config.patch(force=True, keep_overlap=False):
        one, two = torch.compile(odd, fullgraph=True), torch.compile(mixed, fullgraph=True)
        for call, name in enumerate("ababbaaabab"):
            torch.manual_seed(100 * call + rank)
            x = torch.randn(4, 6)
            compiled, eager = (one, odd) if name == "a" else (two, mixed)
            compare([compiled(x)], [eager(x)], f"call {call} of {eager.__name__}")
    assert len(symmpatterns.report().rewrites) == 8, symmpatterns.report()


def _training(rank: int, world_size: int) -> Any:
    class Layer(torch.autograd.Function):
        """all-reduce forward, all-gather backward: what tensor parallelism makes of a linear layer, without one."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return funcol.all_reduce(x, "sum", world())

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return funcol.all_gather_tensor(gradient, 0, world())[: gradient.shape[0]]

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = Layer.apply(torch.tanh(x * w)) + x
        return (Layer.apply(torch.sigmoid(h)) * h).sum()

    with config.patch(force=True, keep_overlap=False):
        compiled = torch.compile(loss, fullgraph=True)
        for call in range(3):
            torch.manual_seed(10 * call + rank)
            values = torch.randn(4, 6), torch.randn(6)
            gradients = []
            for fn in (compiled, loss):
                leaves = [value.clone().requires_grad_() for value in values]
                fn(*leaves).backward()
                gradients.append([leaf.grad for leaf in leaves])
            compare(*gradients, f"gradients of call {call}")
        with torch.inference_mode():
            values = torch.randn(4, 6), torch.randn(6)
            compare([compiled(*values)], [loss(*values)], "inference")
    assert {"peer_all_reduce", "peer_all_gather"} == families(), symmpatterns.report()


def _callers_tensors(rank: int, world_size: int) -> Any:
    """The caller's tensors are read and written as the program says: in place, as views, by the caller in between."""

    def fn(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        before = funcol.all_reduce(x, "sum", world())
        x.mul_(2)
        after = funcol.all_reduce(x, "sum", world())
        out.copy_(before)
        out[1:].add_(after[1:])
        return after.view(-1)[::2]

    with config.patch(force=True, keep_overlap=False):
        compiled = torch.compile(fn, fullgraph=True)
        for call in range(3):
            torch.manual_seed(10 * call + rank)
            values = torch.randn(4, 6), torch.randn(4, 6)
            tensors = [[value.clone() for value in values] for _ in range(2)]
            results = [run(*mine) for run, mine in zip((compiled, fn), tensors)]
            compare([results[0], *tensors[0]], [results[1], *tensors[1]], f"call {call}")
            results[0].fill_(7)  # the result is the caller's: writing to it must not reach anybody's slot
    assert families() == {"peer_all_reduce"}, symmpatterns.report()


def _calls_and_concatenations(rank: int, world_size: int) -> Any:
    """Matmuls that write into slots, also in a loop, and concatenations whose parts are stored one by one."""

    def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
        early = x @ w.cos()
        h = x
        for _ in range(3):
            h = torch.relu(funcol.all_reduce(h @ w, "sum", world())) / world_size
        rows = funcol.all_gather_tensor(torch.cat([h @ w, h.softmax(-1), early]), 0, world())
        columns = funcol.all_gather_tensor(torch.cat([x, h.sin(), h[:, 1:]], 1), 0, world())
        both = funcol.all_reduce(torch.cat([x @ w, h, h @ w]), "sum", world())
        return h, rows + 1, columns, both, funcol.all_reduce(early, "sum", world())

    results = []
    with config.patch(template=False, force=True, keep_overlap=False):
        for dynamic in (False, True):
            compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic)
            for call, n in enumerate((4, 6, 6)):
                torch.manual_seed(10 * call + rank)
                values = torch.randn(n, 8), torch.randn(8, 8) / 4
                got = compiled(*values)
                compare(got, fn(*values), f"call {call}")
                results += [got[0], got[3], got[4]]
    assert not symmpatterns.report().declined, symmpatterns.report()
    return results


def two_shots(x: torch.Tensor, y: torch.Tensor, ints: torch.Tensor, half: torch.Tensor) -> Any:
    """Sizes that the ranks do not divide, empty ones too; results read late, through views, by the caller."""
    total = funcol.all_reduce(x.sin(), "sum", world())
    stream = funcol.all_reduce(torch.relu(total) @ x.t(), "sum", world()) + 1
    scalar = funcol.all_reduce(y.sum(), "sum", world())
    largest = funcol.all_reduce(stream * scalar, "max", world())
    pair = funcol.all_reduce_coalesced([x * 3, x.tanh().t()], "sum", world())
    gathered = funcol.all_gather_tensor(half.cos(), 0, world())
    rounded = funcol.all_reduce(half.sin(), "avg", world())
    whole = funcol.all_reduce(ints * 3, "sum", world())
    flags = funcol.all_reduce(ints > 0, "sum", world())
    direct = funcol.all_reduce(funcol.all_reduce(x * 2, "sum", world()), "sum", world())
    return total, total.t()[1:], stream, scalar, largest, *pair, gathered, rounded, whole, flags, direct, total.sum(0)


def _two_shot(rank: int, world_size: int) -> Any:
    cost_model._ONE_SHOT_BYTES["cpu"] = -1  # whatever its size

    def one_chain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        h = funcol.all_reduce(x @ weight, "sum", world()) + 1
        return torch.nn.functional.rms_norm(h, (h.shape[1],))

    torch.manual_seed(rank)
    arguments = torch.randn(5, 7), torch.randn(7, 7)  # blocks that do not divide
    with config.patch(template=False, force=True, keep_overlap=False), inductor_config.patch(fx_graph_cache=False):
        result, code = compiled_code(one_chain, *arguments)
    compare([result], [one_chain(*arguments)], "two-shot")
    body = code[code.index("def call(") : code.index("def get_args")]
    called = re.findall(r"(cpp_fused|mm|peer_buffers|barrier_|peer_sources)(?:_\w+)?(?:\.default)?\(", body)
    return called, result


def _two_shots(rank: int, world_size: int, sizes: list[int]) -> list[torch.Tensor]:
    cost_model._ONE_SHOT_BYTES["cpu"] = -1
    results: list[torch.Tensor] = []
    with config.patch(template=False, force=True, keep_overlap=False), inductor_config.patch(fx_graph_cache=False):
        compiled = torch.compile(two_shots, fullgraph=True)
        kept = []
        for call, n in enumerate(sizes):
            arguments = _arguments(rank, world_size, n, call)
            kept.append((compiled(*arguments), two_shots(*arguments)))
            compare(*kept[-1], f"call {call}")
        for call, (one, other) in enumerate(kept):
            compare(one, other, f"call {call}, looked at later")
            results += [tensor for number, tensor in enumerate(one) if number != 7]
        assert not symmpatterns.report().declined, symmpatterns.report()
        reductions = [r.detail for r in symmpatterns.report().rewrites if r.collective == "all_reduce"]
        assert set(reductions) == {"shard"}, symmpatterns.report()
    return results


def _given_splits(rank: int, world_size: int) -> Any:
    """All-to-alls whose splits differ from rank to rank and from call to call, also where a rank's own stay."""

    def fn(x: torch.Tensor, to_each: list[int], from_each: list[int]) -> Any:
        there = funcol.all_to_all_single(x.sin(), from_each, to_each, world())
        back = funcol.all_to_all_single(there * 2, to_each, from_each, world())
        return there + 1, back.sum(-1), funcol.all_reduce(back.sum(0), "sum", world())

    tables = [
        [[2, 3, 4], [5, 6, 7], [8, 9, 10]],
        [[2, 2, 2], [2, 3, 4], [2, 4, 5]],  # equal for rank 0
        [[2, 2, 2], [2, 5, 4], [2, 3, 5]],  # the same for rank 0
        [[400, 2, 3], [2, 5, 4], [4, 3, 5]],
    ]
    with config.patch(force=True, keep_overlap=False):
        compiled = torch.compile(fn, fullgraph=True, dynamic=True)
        for call, table in enumerate(tables):
            torch.manual_seed(10 * call + rank)
            to_each, from_each = table[rank], [row[rank] for row in table]
            x = torch.randn(sum(to_each), 6)
            compare(compiled(x, to_each, from_each), fn(x, to_each, from_each), f"call {call}")
        assert not symmpatterns.report().declined, symmpatterns.report()
        assert {r.detail for r in symmpatterns.report().rewrites} == {"exchange:3", "pull"}, symmpatterns.report()
        # Splits that do not fit are one error for all; the group lives on.
        wrong = [5, 2, 2] if rank == 1 else [3, 3, 3]
        try:
            compiled(torch.ones(9, 6), wrong, [3, 3, 3])
        except symmpatterns.DivergenceError as error:
            text = str(error)
        to_each, from_each = tables[0][rank], [row[rank] for row in tables[0]]
        x = torch.randn(sum(to_each), 6)
        compare(compiled(x, to_each, from_each), fn(x, to_each, from_each), "after an error")
    return text


def _empty(rank: int, world_size: int) -> Any:
    def fn(x: torch.Tensor) -> Any:
        a = funcol.all_reduce(x * 2, "sum", world())
        return a, funcol.all_gather_tensor(a + 1, 0, world())

    with config.patch(force=True, keep_overlap=False):
        compiled = torch.compile(fn, fullgraph=True)
        for n in (0, 3, 0):
            a, b = compiled(torch.ones(n, 4))
            assert a.shape == (n, 4) and b.shape == (world_size * n, 4)
            assert bool((a == 2 * world_size).all()) and bool((b == 2 * world_size + 1).all())


# --- one cached graph for all ranks, and for the next process ---------------------------------------------------------


def _with_cache(rank: int, world_size: int) -> Any:
    from torch._dynamo.utils import counters

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = funcol.all_gather_tensor(x.sin() * 3, 0, world())
        return funcol.reduce_scatter_tensor(y + 1, "sum", 0, world()) * 2

    compiled = torch.compile(fn, fullgraph=True)
    x = torch.randn(4, 4)
    with config.patch(force=True, keep_overlap=False):
        compare([compiled(x)], [fn(x)], "cached")
    return dict(counters["inductor"]), len(symmpatterns.report().rewrites)


class RanksTest(unittest.TestCase):
    def test_each_collective(self) -> None:
        self.check_each_collective(2, [4, 4])

    @pytest.mark.slow
    def test_each_collective_of_changing_sizes(self) -> None:
        self.check_each_collective(2, [4, 4, 6, 5])

    @pytest.mark.slow
    def test_each_collective_on_three_ranks(self) -> None:
        self.check_each_collective(3, [2, 3])

    def check_each_collective(self, world_size: int, sizes: list[int]) -> None:
        results = run_ranks(_each_collective, world_size, sizes, timeout=300)
        for tensors in zip(*results, strict=True):
            assert_same_on_all_ranks(tensors)

    def test_a_pass_that_removes_clones(self) -> None:
        self.assertEqual(run_ranks(_clones_removed, 2, timeout=200), [3, 3])

    def test_as_it_ships_on_ranks_with_tensors_of_different_sizes(self) -> None:
        everything = ["all_gather", "all_gather", "all_reduce", "all_reduce", "broadcast"]
        self.assertEqual(run_ranks(_decided_alike, 2, timeout=200), [everything] * 2)

    def test_graphs_in_turn_and_several_groups(self) -> None:
        run_ranks(_graphs_and_groups, 4, timeout=200)

    @pytest.mark.slow
    def test_training_and_inference(self) -> None:
        run_ranks(_training, 2, timeout=200)

    def test_callers_tensors(self) -> None:
        run_ranks(_callers_tensors, 2, timeout=200)

    @pytest.mark.slow  # generated code is tested in one process, and the stores between ranks by the stress tests
    def test_calls_that_write_into_slots_and_concatenations(self) -> None:
        for tensors in zip(*run_ranks(_calls_and_concatenations, 2, timeout=200), strict=True):
            assert_same_on_all_ranks(tensors)

    def test_two_shot(self) -> None:
        """Its kernels: none for the matmul's store, one that reduces a block and sends it to all, one that consumes."""
        answers = run_ranks(_two_shot, 2, timeout=200)
        site = ["barrier_", "peer_sources", "cpp_fused"]
        self.assertEqual(answers[0][0], ["peer_buffers", "mm", *site, *site])
        assert_same_on_all_ranks([result for _, result in answers])

    @parameterized.expand([(2, [4, 5]), (3, [4, 5, 7, 1, 300])])
    @pytest.mark.slow
    def test_two_shot_chains(self, world_size: int, sizes: list[int]) -> None:
        for tensors in zip(*run_ranks(_two_shots, world_size, sizes, timeout=300), strict=True):
            assert_same_on_all_ranks(tensors)

    @pytest.mark.slow  # the stress tests' exchanges have such splits
    def test_splits_that_differ_between_ranks(self) -> None:
        for text in run_ranks(_given_splits, 3, timeout=200):
            self.assertIn("rank 0 expects 3 rows from rank 1, which sends it 5", text)

    def test_empty_tensors(self) -> None:
        run_ranks(_empty, 2, timeout=200)

    @pytest.mark.slow
    def test_cached_graph_serves_other_ranks_and_processes(self) -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            env = {"TORCHINDUCTOR_CACHE_DIR": folder}
            run_ranks(_with_cache, 2, timeout=200, env=env)
            for counted, rewrites in run_ranks(_with_cache, 2, timeout=200, env=env):
                self.assertEqual(counted.get("fxgraph_cache_hit"), 1, counted)
                self.assertEqual(counted.get("fxgraph_cache_miss", 0), 0, counted)
                self.assertEqual(rewrites, 2)
