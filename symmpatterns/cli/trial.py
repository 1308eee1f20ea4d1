"""A backend tried out with real ranks: a small program is compiled, its collective fused, and its result checked."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

_TIMEOUT = 240.0  # the first use may have to build the native part


@dataclass(frozen=True)
class Outcome:
    """Whether the backend works, and a sentence that says what was seen."""

    works: bool
    text: str
    details: str = ""  # tracebacks of the ranks


def run(backend: str, ranks: int) -> Outcome:
    """Starts `ranks` processes on `backend` ("host" or "cuda") and lets each run `program`."""
    from symmpatterns.testing import RankError, run_ranks

    start = time.monotonic()
    try:
        answers = run_ranks(program, ranks, backend, timeout=_TIMEOUT, backend="nccl" if backend == "cuda" else "gloo")
    except RankError as error:
        return Outcome(False, _summary(str(error)), str(error))
    if len(set(answers)) > 1:
        return Outcome(False, "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(answers)))
    works, text = answers[0]
    return Outcome(works, f"{text} ({ranks} ranks, {time.monotonic() - start:.1f} s)")


def _summary(tracebacks: str) -> str:
    """The exceptions that ended the ranks, without their tracebacks."""
    pattern = r"^(?:rank \d+: )?([\w.]*(?:Error|Exception|Timeout|no result within).*)"
    exceptions = re.findall(pattern, tracebacks, re.MULTILINE)
    return "; ".join(dict.fromkeys(exceptions)) or tracebacks.splitlines()[-1]


def program(rank: int, world_size: int, backend: str) -> tuple[bool, str]:
    """Compiles matmul -> all-reduce on this rank, runs it, compares with the sum of all partial products."""
    import symmpatterns

    device = torch.device("cuda", rank) if backend == "cuda" else torch.device("cpu")
    # Small integers: every order of summation gives the same bits, so the comparison can be exact.
    generator = torch.Generator().manual_seed(7)
    a = torch.randint(-4, 5, (world_size, 64, 96), generator=generator).float()
    b = torch.randint(-4, 5, (world_size, 96, 80), generator=generator).float()
    expected = torch.bmm(a, b).sum(0)
    group = dist.group.WORLD
    assert group is not None

    def matmul_all_reduce(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return funcol.all_reduce(x @ y, "sum", group)

    symmpatterns.install()
    symmpatterns.report().clear()
    with symmpatterns.config.patch(enabled=True, force=True, timeout_s=60.0):
        result = torch.compile(matmul_all_reduce)(a[rank].to(device), b[rank].to(device))
    report = symmpatterns.report()
    if not torch.equal(result.cpu(), expected):
        return False, "matmul -> all-reduce gave a WRONG result; please report this with the output of the doctor"
    if not report.rewrites:
        return False, f"the result was right but nothing was fused: {report.declined[0] if report.declined else report}"
    rewritten = report.rewrites[0]
    return True, f"works: {rewritten.producer} -> {rewritten.collective} became {rewritten.replacement}, result exact"
