"""What was measured on which GPUs: the shipped tables, and one of the user's own that comes first.

measured  fused against best unfused times, from which cost_model.py decides whether to fuse
choices   the quickest kernel of a family for a shape, which the operators take

The shipped ones are measured.json and choices.json. The user's is one file with both, {"measured": [...], "choices":
[...]}, as ``python -m symmpatterns tune`` writes it: ``config.tuning_table``, or tuning.json in symmpatterns' cache folder.
An entry is of a family, device, world size, dtype and size [M, N, K], those of a rank's own matmul.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from symmpatterns import config

_NEAR = 2.0  # how far an entry may be, as `distance` says
# The same processor with another memory: what was measured on one is taken for the other where that has no nearer entry.
_RELATIVES = {"NVIDIA H200": "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3": "NVIDIA H200"}
_KEYS = {"family", "device", "world_size", "dtype", "size"}


def user_file() -> Path:
    """Where the user's table is, or would be."""
    if config.tuning_table:
        return Path(config.tuning_table)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "symmpatterns" / "tuning.json"


def device_name(device: torch.device) -> str:
    """How tables name a device: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def fingerprint() -> str:
    """Of the user's table; the shipped ones are part of the sources."""
    try:
        return hashlib.sha256(user_file().read_bytes()).hexdigest()
    except OSError:
        return "none"


def nearest(
    kind: str, family: str, size: tuple[int, int, int], dtype: torch.dtype, device: str, **wanted: object
) -> dict[str, Any] | None:
    """The entry of table `kind` nearest to `size`, of what has the `wanted` values too; None if none is near.

    The user's entries come first. Then those of the device and of one with the same processor together: the same size
    there says more than another one here. Of equally near ones the device's own come first, then the larger.

    Raises ValueError for a user's table that is not as described above.
    """

    def order(entry: dict[str, Any]) -> tuple[object, ...]:
        return distance(entry, size), entry["device"] != device, [-n for n in entry["size"]]

    users, *shipped = _entries(kind, family, dtype, device, wanted)
    for entries in (users, [entry for several in shipped for entry in several]):
        near = [entry for entry in entries if distance(entry, size) <= _NEAR]
        if near:
            return min(near, key=order)
    return None


def distance(entry: dict[str, Any], size: tuple[int, int, int]) -> float:
    """The sum of |log2| of the ratios of M, N and K."""
    return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(size, entry["size"]))


def by_rows(
    kind: str, family: str, n: int, k: int, dtype: torch.dtype, device: str, **wanted: object
) -> list[dict[str, Any]]:
    """All entries with that K and the smallest N of at least `n`, by M, of the first source that has any.

    Sources and errors are those of `nearest`.
    """
    for entries in _entries(kind, family, dtype, device, wanted):
        wide = [entry for entry in entries if entry["size"][1] >= n and entry["size"][2] == k]
        if wide:
            narrowest = min(entry["size"][1] for entry in wide)
            return sorted((e for e in wide if e["size"][1] == narrowest), key=lambda entry: entry["size"][0])
    return []


def _entries(
    kind: str, family: str, dtype: torch.dtype, device: str, wanted: dict[str, object]
) -> Iterator[list[dict[str, Any]]]:
    """Of each source in turn the entries that have the wanted values."""
    name = str(dtype).removeprefix("torch.")
    name = "bfloat16" if name == "float16" else name  # the same rates and bytes
    sources = [(_users(kind), device), (_shipped(kind), device)]
    if device in _RELATIVES:
        sources.append((_shipped(kind), _RELATIVES[device]))
    for entries, own in sources:
        values = {"family": family, "dtype": name, "device": own, **wanted}
        yield [entry for entry in entries if all(entry.get(key) == value for key, value in values.items())]


@functools.cache
def _shipped(kind: str) -> list[dict[str, Any]]:
    return json.loads((Path(__file__).parent / f"{kind}.json").read_text())


def _users(kind: str) -> Iterable[dict[str, Any]]:
    path = user_file()
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        if config.tuning_table:
            raise ValueError(f"config.tuning_table: there is no file {path}") from None
        return []
    return _read(path, changed)[kind]


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> dict[str, list[dict[str, Any]]]:
    try:
        table = json.loads(path.read_text())
        entries = {kind: list(table.get(kind, [])) for kind in ("measured", "choices")}
        for each in (entry for several in entries.values() for entry in several):
            if not set(each) >= _KEYS or len(each["size"]) != 3:
                raise ValueError(f"an entry needs {', '.join(sorted(_KEYS))}; this one is {each}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is no tuning table of symmpatterns ({error}): make it again with python -m symmpatterns tune, or "
            "remove it"
        ) from error
    return entries
