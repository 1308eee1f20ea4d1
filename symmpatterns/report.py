"""What was rewritten, how, and what was declined and why.

Each collective of a compiled graph gets one record. A record also travels with Inductor's cached graph: Inductor stores
the growth of its own counters during a compilation beside the graph and applies it again when the graph comes from the
cache, so every record is also written as a counter, and a hit in any process shows up here as if it had been compiled.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from symmpatterns import compat

log = logging.getLogger("symmpatterns")

_COUNTER_PREFIX = "symmpatterns.record "


@dataclass(frozen=True)
class Record:
    """One collective of one compiled graph.

    family      pattern family that took it, or whose reason for declining decided, e.g. "matmul_all_reduce"
    collective  "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast" or a custom operator's name
    strategy    "template", "peer_views" or "allocation"; None when declined
    op          reduction, e.g. "sum"; None for collectives that do not reduce
    shape       of the collective's input; a symbolic size is a string
    dtype       of the collective's input
    producer    operator that computes the collective's input, e.g. "aten.mm"; that a template fused, through any views
    replacement operator now in the graph in place of producer and collective; None when declined
    code        None, or the short stable name of the reason for declining
    reason      None, or the reason as a sentence, with what other families said behind it
    detail      more about the rewrite, e.g. the kind of peer view, and why no template took it
    from_cache  the graph came from Inductor's cache
    """

    family: str | None
    collective: str
    strategy: str | None
    op: str | None
    shape: tuple[int | str, ...]
    dtype: torch.dtype | None
    group_name: str | None
    world_size: int | None
    producer: str | None = None
    replacement: str | None = None
    code: str | None = None
    reason: str | None = None
    detail: str | None = None
    from_cache: bool = False

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape)) or "scalar"
        head = f"{self.collective}({self.op})" if self.op else self.collective
        dtype = str(self.dtype).removeprefix("torch.")
        where = f"{head} {size} {dtype} over group {self.group_name} ({self.world_size} ranks)"
        if self.strategy is None:
            return f"declined {where}: {self.reason} [{self.code}]"
        return f"{self.strategy} {where}: {self.producer} -> {self.replacement}"


def _encode(record: Record) -> str:
    fields: dict[str, Any] = dict(record.__dict__)
    fields["dtype"] = None if record.dtype is None else str(record.dtype).removeprefix("torch.")
    fields.pop("from_cache")
    return _COUNTER_PREFIX + json.dumps(fields, sort_keys=True)


def _decode(key: str) -> Record:
    fields = json.loads(key[len(_COUNTER_PREFIX) :])
    fields["shape"] = tuple(fields["shape"])
    if fields["dtype"] is not None:
        fields["dtype"] = getattr(torch, fields["dtype"])
    return Record(**fields, from_cache=True)


@dataclass
class Report:
    """The records of this process since it started or since ``clear()``, in order."""

    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rewrites(self) -> list[Record]:
        """Records of collectives that were rewritten."""
        return [r for r in self.records if r.strategy is not None]

    @property
    def declined(self) -> list[Record]:
        """Records of collectives that were left as they were, each with `code` and `reason`."""
        return [r for r in self.records if r.strategy is None]

    def clear(self) -> None:
        """Forgets every record of this process."""
        _forget()
        self.records.clear()

    def save(self, path: str) -> None:
        """Writes the report to `path` as one self-contained HTML page. Raises OSError where that cannot be written."""
        from symmpatterns.report_html import render

        with open(os.fspath(path), "w", encoding="utf-8") as file:  # an int would be a file descriptor
            file.write(render(self))

    def __str__(self) -> str:
        lines = [f"symmpatterns: {len(self.rewrites)} collectives rewritten, {len(self.declined)} declined"]
        lines += [f"note: {note}" for note in self.notes]
        lines += _table(self.rewrites, ("strategy", "producer", "replacement", "detail"))
        lines += _table(self.declined, ("producer", "code", "reason"))
        return "\n".join(lines)

    __repr__ = __str__


def _table(records: list[Record], columns: tuple[str, ...]) -> list[str]:
    if not records:
        return []
    head = ("count", "collective", "shape", "dtype", "group", "ranks", *columns)
    counted = collections.Counter(replace(r, from_cache=False) for r in records)
    rows = [head]
    for r, count in counted.items():
        collective = f"{r.collective} {r.op}" if r.op else r.collective
        dtype = str(r.dtype).removeprefix("torch.")
        cells: list[Any] = [count, collective, "x".join(map(str, r.shape)), dtype, r.group_name, r.world_size]
        cells += [getattr(r, column) or "-" for column in columns]
        rows.append(tuple(map(str, cells)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    rule = "  ".join("-" * width for width in widths[:-1] + [min(widths[-1], 40)])
    return ["", text[0], rule, *text[1:]]


note_sources: list[Callable[[], str | None]] = []  # who may have something to say beside the records (the hook)
_lock = threading.Lock()
_report = Report()
_seen: collections.Counter[str] = collections.Counter()
_seen_in: Any = None  # the Counter object that _seen was read from: clearing torch's counters makes a new one


def add(record: Record) -> None:
    """Adds a record: to this process's report, to the log, to torch's counters (and so to Inductor's cache entry)."""
    with _lock:
        _collect_cached()
        _report.records.append(record)
        key = _encode(record)
        compat.inductor_counters()[key] += 1
        _seen[key] += 1
    own = compat.own_counters()
    if record.strategy is None:
        own["declined"] += 1
        own[f"declined.{record.code}"] += 1
        log.info("%s", record)
    else:
        own["rewritten"] += 1
        own[f"{record.strategy}.{record.family}"] += 1
        log.info("%s", record)


def _collect_cached() -> None:
    """Takes over the records that cache hits have added to Inductor's counters since the last look."""
    global _seen_in
    current = compat.inductor_counters()
    if current is not _seen_in or any(current[key] < count for key, count in _seen.items()):
        _seen.clear()
        _seen_in = current
    for key in [k for k in current if isinstance(k, str) and k.startswith(_COUNTER_PREFIX)]:
        for _ in range(current[key] - _seen[key]):
            _report.records.append(_decode(key))
        _seen[key] = current[key]


def _forget() -> None:
    with _lock:
        current = compat.inductor_counters()
        for key in [k for k in current if isinstance(k, str) and k.startswith(_COUNTER_PREFIX)]:
            del current[key]
        _seen.clear()
        _report.records.clear()


def add_once(record: Record) -> None:
    """`add`, unless this process's report has the same record."""
    with _lock:
        is_known = record in _report.records
    if not is_known:
        add(record)


def report() -> Report:
    """The report of this process: ``.rewrites``, ``.declined``, ``.clear()``, ``.save(path)``; ``str()`` is a table.

    The object is a snapshot: compile again and call again to see more.
    """
    with _lock:
        _collect_cached()
        snapshot = Report(list(_report.records))
    for source in note_sources:
        note = source()
        if note is not None:
            snapshot.notes.append(note)
            log.warning("%s", note)
    return snapshot
