"""Builds the native part of the host backend (csrc/) with the system's C++ compiler and keeps it in a cache directory.

Plain g++ calls: no ninja, no setuptools. The cache key covers the sources, torch, Python, the compiler, its flags and
the CPU (the code is compiled for the CPU at hand), so nothing stale or foreign is ever loaded.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from symmpatterns.groups import SymmetricMemoryError

logger = logging.getLogger("symmpatterns")

MODULE_NAME = "_symmpatterns_host"
SOURCES = Path(__file__).parent / "csrc"
_USUAL_SECONDS = 25
_ERROR_LINES = 30


class BuildError(SymmetricMemoryError):
    """The native part could not be built; the text says why and what to install or set."""


def compiler() -> list[str] | None:
    """The C++ compiler's command: ``CXX``, else g++, else clang++; None when there is none."""
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        return command if shutil.which(command[0]) else None
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    return None


def missing() -> str | None:
    """Why a build is impossible here, or None."""
    if sys.platform != "linux":
        return f"the host backend needs Linux (memfd, /proc), this is {sys.platform}"
    if compiler() is None:
        wanted = os.environ.get("CXX")
        if wanted:
            return f"the host backend needs a C++ compiler, and CXX={wanted!r} is not an executable"
        return "the host backend needs a C++ compiler: install g++ (10 or newer), or set CXX"
    return None


def cache_directory() -> Path:
    """``SYMMPATTERNS_CACHE_DIR``, else ``symmpatterns`` in the user's cache directory."""
    chosen = os.environ.get("SYMMPATTERNS_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "symmpatterns"


def library_path() -> Path:
    """Where the library for this machine, torch, Python and these sources is or would be."""
    return cache_directory() / _key() / f"{MODULE_NAME}.so"


def build() -> Path:
    """Makes sure that the library exists and returns its path; of many processes that ask at once, one builds.

    Raises BuildError with the compiler's last lines when the build fails.
    """
    problem = missing()
    if problem is not None:
        raise BuildError(problem)
    path = library_path()
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(path.parent / "lock"):
            if not path.exists():
                _build(path)
    except OSError as error:
        raise BuildError(
            f"cannot write to the cache directory {path.parent}: {error}; set SYMMPATTERNS_CACHE_DIR to a writable one"
        ) from error
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed, also by a killed process
        yield


def _flags() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    folders = [include, include / "torch" / "csrc" / "api" / "include", Path(sysconfig.get_path("include"))]
    flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=off", "-w"]
    if platform.machine() in ("x86_64", "aarch64"):
        flags.append("-march=native")
    flags += [
        f"-DTORCH_EXTENSION_NAME={MODULE_NAME}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    for folder in folders:
        flags += ["-isystem", str(folder)]
    return flags


def _link_flags() -> list[str]:
    libraries = Path(torch.__file__).parent / "lib"
    # torch loads its own libgomp first; the loader then takes that one for us too, because the names are equal.
    flags = ["-shared", "-fopenmp", f"-L{libraries}", "-lc10", "-ltorch_cpu", "-ltorch_python"]
    # The libstdc++ that torch has loaded, by its path: a compiler that finds only its static one would link a second
    # copy into the library, and the first stream that meets a locale of the other copy crashes.
    return flags + _loaded("libstdc++.so")


def _loaded(name: str) -> list[str]:
    """The path of the shared library of that name in this process, if there is one."""
    with open("/proc/self/maps") as file:
        paths = {line.split(maxsplit=5)[-1].strip() for line in file if f"/{name}" in line}
    return sorted(paths)[:1]


@functools.lru_cache(maxsize=8)
def _compiler_version(command: tuple[str, ...]) -> str:
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return result.stdout.split("\n", 1)[0]


def _cpu() -> str:
    """What -march=native depends on."""
    lines = set()
    with open("/proc/cpuinfo") as file:
        for line in file:
            name = line.split(":", 1)[0].strip()
            if name in ("flags", "Features", "model name", "CPU part", "CPU implementer"):
                lines.add(line.strip())
    return "\n".join(sorted(lines))


def _key() -> str:
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    command = compiler() or []
    about = [torch.__version__, torch.__file__, str(torch.version.git_version), sys.version, platform.machine()]
    about += [*command, _compiler_version(tuple(command)) if command else "", *_flags(), *_link_flags(), _cpu()]
    digest.update("\0".join(about).encode())
    return f"host-{digest.hexdigest()[:20]}"


def _build(path: Path) -> None:
    logger.warning("building the host backend (once, about %d s) in %s", _USUAL_SECONDS, path.parent)
    started = time.monotonic()
    command = compiler()
    assert command is not None
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda source: -source.stat().st_size)
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        jobs = [[*command, *_flags(), "-c", str(source), "-o", str(target)] for source, target in zip(sources, objects)]
        with concurrent.futures.ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
            for failure in pool.map(_run, jobs):
                if failure is not None:
                    pool.shutdown(cancel_futures=True)
                    raise BuildError(failure)
        library = Path(folder) / path.name
        failure = _run([*command, *map(str, objects), *_link_flags(), "-o", str(library)])
        if failure is not None:
            raise BuildError(failure)
        os.replace(library, path)  # atomic: nobody ever loads half a file
    logger.info("built the host backend in %.0f s", time.monotonic() - started)


def _run(command: list[str]) -> str | None:
    """Runs a compiler; the text of the error when it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"building the host backend failed: {shlex.join(command[:1])}: {error}"
    if result.returncode == 0:
        return None
    tail = "\n".join((result.stdout + result.stderr).strip().splitlines()[-_ERROR_LINES:])
    return (
        f"building the host backend failed ({command[0]} returned {result.returncode}); it needs a C++20 compiler such "
        f"as g++ 10 or newer (CXX chooses it). The last lines:\n{tail}\nThe command: {shlex.join(command)}"
    )
