"""wait(collective(x))  ->  store_ into peers' memory, one barrier_, reads: by whatever kernels Inductor makes around it

No pattern for each producer or consumer: Inductor generates both, so the store becomes part of the producer's loop and
the load part of the consumer's. Pays wherever a launch, a copy or a collective's latency counts; cost_model.py decides.

Codes with which a collective is declined here, beside those of ``Rewriting.can_reach_peers``:

cpp_wrapper                 the graph is compiled without Python, and the operators need it
nested_graph                the graph calls another graph that communicates itself, so the order of slots is unknown
no_metadata                 the graph does not say shape and dtype
unsupported_form            a variant of the operator that is not handled (in place, with an output argument)
device, dtype, reduce_op    there is no symmetric memory, no arithmetic, or no such reduction here
scalar                      a 0-dimensional tensor cannot be gathered, scattered or exchanged
uneven                      sizes that do not divide by the world size; on CUDA splits that are not all equal
unbacked_shape              a size is known only after earlier work of the graph has run
collective_has_other_users  the collective's result is used besides its wait
overlapped                  a matmul, convolution or attention between start and wait hides the collective already
weight_gradient             a reduce-scatter of a weight's gradient that leaves the graph (FSDP's): the same
graph_input                 an all-gather of a graph input (an FSDP parameter): schedulers hide it behind earlier work
cost_model                  the collective is estimated to be faster
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from symmpatterns import config, cost_model
from symmpatterns.patterns import _peer_forms as forms
from symmpatterns.patterns._gradients import gradient_problem
from symmpatterns.patterns._peer_sites import Site, emit
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vocabulary import CAST, RESHAPE, aten, collectives, hidden_work, num_bytes
from symmpatterns.peer_views import lowerings  # noqa: F401  registers how Inductor compiles what this file emits
from symmpatterns.peer_views.operators import REDUCE_OPS, check_reduction

_SAME_DATA = {*RESHAPE, *CAST, aten.clone.default, aten.constant_pad_nd.default}
_NESTED = torch.ops.symmpatterns.barrier_.default

Decline = Callable[[str, str], bool]


def apply(rewriting: Rewriting) -> None:
    """Rewrites every collective of the graph that is worth it."""
    if not config.peer_views:
        return
    sites = [site for start in collectives(rewriting.graph) for site in _sites(rewriting, start)]
    if not sites:
        return
    emit(rewriting.graph, sites)


def _sites(rewriting: Rewriting, start: Node) -> list[Site]:
    """The sites that replace `start`; none when it is declined or was taken already."""
    if rewriting.is_rewritten(start):
        return []
    form = forms.recognise(start)
    if form is None:
        decline: Decline = partial(rewriting.decline, start, "peer_views")
        decline("unsupported_form", f"{start.target} is not handled: only the functional, out-of-place form is")
        return []
    if not _is_possible(rewriting, start, form) or not _is_worthwhile(rewriting, start, form):
        return []
    group = rewriting.can_reach_peers(start, form.family, form.group_name)
    if group is None:
        return []
    decline = partial(rewriting.decline, start, form.family)
    problem = forms.shape_problem(form, group.world_size)
    if problem is not None:
        decline(*problem)
        return []
    size = sum(num_bytes(value) for value in form.values)
    verdict = cost_model.peer_views(form.collective, size, group.world_size, form.values[0].device)
    if not verdict.fuse and not config.force:
        decline("cost_model", verdict.why)
        return []
    # In a pretended group nobody reduces the other ranks' blocks.
    sites = forms.sites_of(form, start, group.world_size, one_shot=group.is_fake)
    replacement = torch.ops.symmpatterns.reduce_peers if form.reduce_op else torch.ops.symmpatterns.store_
    rewriting.rewrote(start, form.family, "peer_views", replacement.default, sites[0].detail)
    return sites


def _is_possible(rewriting: Rewriting, start: Node, form: forms.Form) -> bool:
    """Whether peer views can do what the collective does."""
    from torch._inductor import config as inductor_config

    decline: Decline = partial(rewriting.decline, start, form.family)
    if inductor_config.cpp_wrapper:
        return decline("cpp_wrapper", "the graph is compiled without Python, which the operators of peer views need")
    if _calls_communicating_graph(rewriting.graph):
        return decline("nested_graph", "the graph calls another graph that uses peer views itself")
    if len(form.values) != len(form.sources):
        return decline("no_metadata", "its input carries no shape information")
    if not form.waits:
        return decline("collective_has_other_users", f"{start.name} is used besides its wait")
    for value in form.values:
        if value.device.type not in ("cpu", "cuda") or value.device != form.values[0].device:
            return decline("device", f"there is no symmetric memory on device {value.device}")
        if value.dtype.is_complex or value.dtype.itemsize > 8 or value.is_sparse or value.is_quantized:
            return decline("dtype", f"Inductor generates no code for {value.dtype}")
        if free_unbacked_symbols(tuple(value.shape)):
            return decline("unbacked_shape", "its size is known only after earlier work of the graph has run")
        if form.reduce_op is not None:
            if form.reduce_op not in REDUCE_OPS:
                known = ", ".join(REDUCE_OPS)
                return decline("reduce_op", f'reductions here are {known}, not "{form.reduce_op}"')
            try:
                check_reduction(value.dtype, form.reduce_op)
            except TypeError as error:
                return decline("dtype", str(error))
    return True


def _is_worthwhile(rewriting: Rewriting, start: Node, form: forms.Form) -> bool:
    """Whether rewriting leaves overlap alone: of the graph's own order, and of what schedulers make of it later."""
    decline: Decline = partial(rewriting.decline, start, form.family)
    if not config.keep_overlap:
        return True
    for wait in form.waits:
        hidden = hidden_work(start, wait)
        if hidden is not None:
            return decline("overlapped", f"its wait comes after {hidden}, which hides it already")
    if form.collective in ("reduce_scatter", "all_reduce"):
        problems = [gradient_problem(source, start, wait) for source, wait in zip(form.sources, form.waits)]
        if problems[0] is not None and all(problems):
            return decline(*problems[0])
    if form.collective == "all_gather" and not config.force and all(map(_is_graph_input, form.sources)):
        return decline(
            "graph_input",
            "it gathers a graph input, such as an FSDP parameter, which schedulers start early and hide behind other "
            "work; config.force or config.keep_overlap=False rewrites it nevertheless",
        )
    return True


def _is_graph_input(node: Node) -> bool:
    """Whether `node` is a graph input, through reshapes, casts and copies.

    And through padding: of a dimension that does not divide, some ranks pad their shard and others need not, and all
    have to decide alike.
    """
    while node.target in _SAME_DATA and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.op == "placeholder"


def _calls_communicating_graph(graph: Graph) -> bool:
    """Whether a graph that this one calls (a higher-order operator's) uses peer views: inner graphs come first."""
    owner = graph.owning_module
    if owner is None:
        return False
    inner = [
        module.graph for module in owner.modules() if module is not owner and isinstance(module, torch.fx.GraphModule)
    ]
    return any(node.target is _NESTED for each in inner for node in each.nodes)
