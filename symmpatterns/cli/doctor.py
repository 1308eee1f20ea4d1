"""``doctor``: what works on this machine, what does not and why, and what to do about it.

Every section is a function that returns rows of (name, text) and appends what is wrong to `Findings.problems`, in plain
words with a remedy. Nothing is guessed that can be tried: the backends are tried out with two real ranks.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from symmpatterns import config, groups, inductor_hook
from symmpatterns.cli import trial
from symmpatterns.report import report

Rows = list[tuple[str, str]]

_TESTED_TORCH = "2.13, and 2.11 on GPUs"
_LOW_MEMORY = 1 << 30
_LOW_DISK = 1 << 28


@dataclass
class Findings:
    """What the sections found: `problems` for a person, `possible` backends, and the `working` ones of the trial."""

    problems: list[str] = field(default_factory=list)
    possible: dict[str, int] = field(default_factory=dict)  # backend -> ranks for the trial
    working: list[str] = field(default_factory=list)
    verbose: bool = False


def run(*, with_trial: bool = True, verbose: bool = False) -> int:
    """Prints the diagnosis; returns 0, or 1 when no backend works. `verbose` prints failed trials with tracebacks."""
    print(f"symmpatterns doctor: {platform.node()}")
    findings = Findings(verbose=verbose)
    sections: list[tuple[str, Callable[[Findings], Rows]]] = [
        ("Versions", versions),
        ("GPUs", gpus),
        ("Backends", backends),
        *([("Trial with real ranks", trials)] if with_trial else []),
        ("Hook", hook),
        ("Rewritten, best first", families),
        ("Configuration", configuration),
        ("Directories and memory", resources),
    ]
    for title, section in sections:
        rows = section(findings)
        print(f"\n{title}")
        width = max((len(name) for name, _ in rows), default=0)
        for name, text in rows:
            lines = text.splitlines() or [""]
            print(f"  {name:<{width}}  {lines[0]}")
            for line in lines[1:]:
                print(f"  {'':<{width}}  {line}")
    usable = findings.working if with_trial else list(findings.possible)
    print(f"\n{verdict(usable, findings.problems)}")
    return 0 if usable else 1


def verdict(usable: list[str], problems: list[str]) -> str:
    """The last lines: whether anything would be fused here, and every problem with its remedy."""
    if usable:
        head = f"Usable here: {', '.join(usable)}."
    else:
        head = "Nothing would be fused on this machine: no backend works."
    if not problems:
        return f"{head} No problems found."
    return "\n".join([f"{head} {len(problems)} problem{'s' * (len(problems) > 1)}:", *(f"  * {p}" for p in problems)])


def versions(findings: Findings) -> Rows:
    from symmpatterns import __version__

    rows = [
        ("symmpatterns", f"{__version__} in {Path(__file__).parents[1]}"),
        ("Python", f"{platform.python_version()} in {sys.prefix}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'} (tested with {_TESTED_TORCH})"),
    ]
    try:
        import triton
    except ImportError as error:
        rows.append(("Triton", f"missing: {error}"))
        findings.problems.append("Triton cannot be imported, so no kernel for GPUs can be built: pip install triton")
    else:
        rows.append(("Triton", str(triton.__version__)))
    rows.append(("system", f"{platform.system()} {platform.release()}, {platform.machine()}, {_cores()} cores usable"))
    return rows


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus(findings: Findings) -> Rows:
    count = torch.cuda.device_count()
    if count == 0:
        why = "torch has no CUDA built in" if torch.version.cuda is None else "CUDA finds none"
        return [("none", f"{why}; CPU processes work without")]
    rows = []
    for index in range(count):
        about = torch.cuda.get_device_properties(index)
        capability = f"compute capability {about.major}.{about.minor}"
        rows.append((f"GPU {index}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {capability}"))
    if count > 1:
        rows.append(("peer access", "from \\ to  " + " ".join(f"{j:>3}" for j in range(count))))
        missing = []
        for i in range(count):
            cells = []
            for j in range(count):
                reachable = i == j or torch.cuda.can_device_access_peer(i, j)
                cells.append("  -" if i == j else "yes" if reachable else " no")
                if not reachable:
                    missing.append(f"{i} to {j}")
            rows.append(("", f"{i:>9}  " + " ".join(cells)))
        if missing:
            findings.problems.append(
                f"GPUs without access to each other's memory: {', '.join(missing)}. Collectives on GPUs stay with NCCL "
                "here; check the topology (nvidia-smi topo -m), virtualisation and IOMMU settings"
            )
    return rows


def backends(findings: Findings) -> Rows:
    from symmpatterns import host_backend

    rows = []
    reason = host_backend.unavailable_reason()
    if reason is None:
        findings.possible["host"] = 2
        rows.append(("host", "possible: CPU tensors of processes on this host"))
    else:
        findings.problems.append(f"CPU tensors cannot be fused: {reason}")
        rows.append(("host", f"not available: {reason}"))
    reason = _no_cuda()
    if reason is None:
        findings.possible["cuda"] = 2
        rows.append(("cuda", f"possible: {torch.cuda.device_count()} GPUs that reach each other"))
    else:
        rows.append(("cuda", f"not available: {reason}"))
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1":
        findings.problems.append(
            "TRITON_INTERPRET=1 is set: Triton kernels run in Python and GPU kernels are not compiled; unset it"
        )
    return rows


def _no_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    count = torch.cuda.device_count()
    if count < 2:
        return f"needs two GPUs, this machine has {count}"
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    if not all(torch.cuda.can_device_access_peer(i, j) for i, j in pairs):
        return "the GPUs cannot all access each other's memory"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is missing"
    return None


def trials(findings: Findings) -> Rows:
    rows = []
    for backend, ranks in findings.possible.items():
        if sys.stderr.isatty():
            print(f"  trying {backend} with {ranks} ranks ...", file=sys.stderr, flush=True)
        outcome = trial.run(backend, ranks)
        rows.append((backend, outcome.details if findings.verbose and outcome.details else outcome.text))
        if outcome.works:
            findings.working.append(backend)
        else:
            more = "" if findings.verbose else "; `python -m symmpatterns doctor --verbose` shows the tracebacks"
            findings.problems.append(f"the {backend} backend failed its trial: {outcome.text}{more}")
    return rows or [("none", "there is no backend to try")]


def hook(findings: Findings) -> Rows:
    installed = inductor_hook.is_installed()
    rows = [("symmpatterns", "installed" if installed else "not installed")]
    rows += [("beside it", f"{type(m).__module__}.{type(m).__qualname__}") for m in inductor_hook.other_passes()]
    if not installed:
        switch = os.environ.get("SYMMPATTERNS")
        findings.problems.append(
            f"SYMMPATTERNS={switch} in the environment: importing symmpatterns installs nothing; unset it, or call "
            "symmpatterns.install()"
            if switch is not None
            else "importing symmpatterns did not install its pass; call symmpatterns.install()"
        )
    findings.problems += report().notes
    return rows


def families(findings: Findings) -> Rows:
    from symmpatterns import patterns

    # A family's docstring starts with its rewrite, before -> after, and remarks far to the right of it.
    heads = {
        family.__name__.rpartition(".")[2]: (family.__doc__ or "").partition("\n")[0] for family in patterns.FAMILIES
    }
    return [(name, " ".join(head.split("     ")[0].split())) for name, head in heads.items()]


def configuration(findings: Findings) -> Rows:
    rows = []
    for name, value in config.options().items():
        source = f"SYMMPATTERNS_{name.upper()}"
        note = f"  (from {source})" if source in os.environ else ""
        rows.append((name, f"{value!r}{note}"))
    if "LOCAL_WORLD_SIZE" in os.environ:
        rows.append(("ranks", groups.topology()))
    if not config.enabled:
        findings.problems.append("config.enabled is False: no graph is rewritten; unset SYMMPATTERNS_ENABLED")
    elif not (config.template or config.peer_views or config.allocation):
        findings.problems.append("template, peer_views and allocation are all off: no graph is rewritten")
    if config.host_kernels == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        findings.problems.append(
            "config.host_kernels is 'triton', which needs TRITON_INTERPRET=1 in the environment before Python starts; "
            "set that, or use host_kernels='aten' (the fast one)"
        )
    return rows


def resources(findings: Findings) -> Rows:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from symmpatterns import host_build

    rows = []
    triton_cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    for name, path, remedy in (
        ("native part", host_build.cache_directory(), "SYMMPATTERNS_CACHE_DIR"),
        ("Inductor's cache", Path(cache_dir()), "TORCHINDUCTOR_CACHE_DIR"),
        ("Triton's cache", triton_cache, "TRITON_CACHE_DIR"),
    ):
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        rows.append((name, f"{path} ({free / 2**30:.1f} GiB free)"))
        if not _is_writable(existing):
            findings.problems.append(f"{path} cannot be written to: set {remedy} to a directory that can")
        elif free < _LOW_DISK:
            findings.problems.append(f"the disk of {path} has {free >> 20} MiB left: free some, or set {remedy}")
    available = _available_memory()
    if available is not None:
        rows.append(("memory", f"{available / 2**30:.1f} GiB available"))
        if available < _LOW_MEMORY:
            findings.problems.append(
                f"only {available >> 20} MiB of memory are available; shared staging memory may fail to be allocated"
            )
    return rows


def _is_writable(folder: Path) -> bool:
    try:  # asking for permissions is not enough: root has them all, and the file system may still refuse
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _available_memory() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
