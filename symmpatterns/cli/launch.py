"""``demo``, ``tune`` and ``bench``: start a script of the source tree on several ranks with torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCE_TREE = Path(__file__).resolve().parents[2]


def command(script: Path, ranks: int, arguments: list[str]) -> list[str]:
    """The torchrun command line for `ranks` processes on this host."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={ranks}"]
    # A free port of the loopback address: host names often resolve to something else, or to nothing, in containers.
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    return [*torchrun, *rendezvous, str(script), *arguments]


def environment(ranks: int) -> dict[str, str]:
    """This process's environment, with the source tree importable and the cores shared out between the ranks."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(p for p in (str(SOURCE_TREE), env.get("PYTHONPATH")) if p)
    cores = len(os.sched_getaffinity(0))
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    return env


def run(script: str, ranks: int, arguments: list[str]) -> int:
    """Runs a script of the source tree on `ranks` processes; returns torchrun's exit code."""
    path = SOURCE_TREE / script
    if not path.is_file():
        print(
            f"{script} is part of the source tree, not of the installed package: run this in a clone of the repository",
            file=sys.stderr,
        )
        return 2
    if ranks < 1:
        print(f"--ranks must be at least 1, not {ranks}", file=sys.stderr)
        return 2
    try:
        done = subprocess.run(command(path, ranks, arguments), env=environment(ranks), stdin=subprocess.DEVNULL)
    except KeyboardInterrupt:
        return 130
    return done.returncode
