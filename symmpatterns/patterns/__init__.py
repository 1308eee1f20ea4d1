"""The pattern families, in the order in which they are tried; the first that takes a collective keeps it."""

from __future__ import annotations

from torch.fx import Graph

from symmpatterns import compat
from symmpatterns.operators import precompile
from symmpatterns.patterns import (
    all_gather_matmul,
    all_reduce_rms_norm,
    allocation,
    matmul_all_reduce,
    matmul_reduce_scatter,
    peer_collectives,
)
from symmpatterns.patterns._declared import is_marker
from symmpatterns.patterns._order import keep_order_of_calls
from symmpatterns.patterns._rewriting import Rewriting
from symmpatterns.patterns._vllm import restore, translate
from symmpatterns.patterns._vocabulary import ask_inputs_for_sizes, collectives, drop_repeated_waits

FAMILIES = (
    matmul_all_reduce,  # one kernel in place of GEMM, collective and their round trip through memory: the most to gain
    matmul_reduce_scatter,  # the same at half the transfer
    all_gather_matmul,  # after reduce-scatter: a gather whose matmul is itself reduced is better fused there
    all_reduce_rms_norm,  # before peer views, which take it where a barrier costs little
    peer_collectives,  # whatever no template took: any producer and consumer, as long as Inductor generates the code
    allocation,  # what is left and declared: the collective stays, its input is produced in symmetric memory
)


def rewrite(graph: Graph) -> None:
    """Rewrites a post-grad graph in place and records what became of each of its collectives."""
    compat.order_kernels()  # of every graph: its kernels run before and behind ours
    translated = translate(graph)
    if not collectives(graph) and not any(is_marker(node) for node in graph.nodes):
        return
    drop_repeated_waits(graph)
    ask_inputs_for_sizes(graph)
    rewriting = Rewriting(graph)
    for family in FAMILIES:
        family.apply(rewriting)
    rewriting.finish()
    restore(rewriting, translated)
    keep_order_of_calls(graph)
    if rewriting.launches_early():
        compat.launch_early(graph)
    precompile.begin(graph)
