"""The tables of README.md and docs/figures.md, made from the rows in bench/results.

    python bench/table.py            writes each table between its two marks
    python bench/table.py --check    exit code 1 if a table there is not what the rows say

A table stands between ``<!-- rows: NAME -->`` and ``<!-- end of rows -->``, with NAME.csv in bench/results.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "figures.md")
RESULTS = ROOT / "bench" / "results"
LIMIT = "mm alone"
INTERPRETED = "fused, interpreted"
OWN = ("fused", "peer views", "template", "in place")  # how the names of our implementations begin
_MARKED = re.compile(r"(<!-- rows: ([\w-]+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)


def table(name: str) -> str:
    """A Markdown table of the p50 times in NAME.csv, with the speed-up, and a line on their origin."""
    with open(RESULTS / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return _models(rows) if "model" in rows[0] else _shapes(rows)


def _shapes(rows: list[dict[str, str]]) -> str:
    """A line for each shape, dtype and launch; the speed-up is of the quickest of ours over the best of the others."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    names.sort(key=lambda n: (n == LIMIT, n.startswith(OWN)))  # alternatives, ours, limit
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        shape = " x ".join(row[size] for size in "MNK" if row[size] != "0")
        cases.setdefault((shape, row["dtype"], row["launch"]), {})[row["implementation"]] = float(row["p50_us"])
    with_launch = len({key[2] for key in cases}) > 1
    sizes = " x ".join("MNK"[: 1 + max(key[0].count("x") for key in cases)])
    head = [sizes, "dtype", *(["launch"] if with_launch else []), *names, "speed-up"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---|" * with_launch + "---:|" * (len(names) + 1)]
    for (shape, dtype, launch), times in sorted(cases.items(), key=_order):
        ours = [time for n, time in times.items() if n.startswith(OWN) and n != INTERPRETED]
        others = [time for n, time in times.items() if n != LIMIT and not n.startswith(OWN)]
        speed_up = f"{min(others) / min(ours):.2f}x" if others and ours else ""
        cells = [shape, dtype, *([launch] if with_launch else []), *(_short(times.get(n)) for n in names), speed_up]
        lines.append("| " + " | ".join(cells) + " |")
    first = rows[0]
    load = _range(float(row["load"] or 0) for row in rows)
    busy = any(float(row["load"] or 0) > 1.0 for row in rows)
    noise = f" Other programs were running at the time (load average {load}), so expect noise." if busy else ""
    threads = _range(int(row["threads"]) for row in rows)
    threads += " thread" if threads == "1" else " threads"
    made = ", ".join(
        f"{date} (commit {commit})" for date, commit in sorted({(row["date"], row["commit"]) for row in rows})
    )
    lines += [
        "",
        f"Microseconds, p50 of {_range(int(row['samples']) for row in rows)} interleaved samples, slowest rank; "
        f"{first['world_size']} ranks on {first['device']}, {threads} a rank, torch {first['torch']}; {made}.{noise}",
    ]
    return "\n".join(lines) + "\n"


def _order(case: tuple[tuple[str, ...], dict[str, float]]) -> tuple[object, ...]:
    """By dtype, then N, K and M."""
    shape, dtype, launch = case[0]
    m, *others = map(int, shape.split(" x "))
    return dtype != "bfloat16", others, m, launch


def _range(values: Iterable[float]) -> str:
    found = sorted(set(values))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def _models(rows: list[dict[str, str]]) -> str:
    """A line for each model and job; the speed-up is over the quickest of the others."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    names.sort(key=lambda n: n == "symmpatterns")
    cases: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        cases.setdefault((row["model"], row["job"]), {})[row["implementation"]] = float(row["p50_us"])
    lines = ["| model | job | " + " | ".join(names) + " | speed-up |", "|---|---|" + "---:|" * (len(names) + 1)]
    for (model, job), times in sorted(cases.items(), key=lambda case: case[0][0]):
        best = min(time for n, time in times.items() if n != "symmpatterns")
        cells = [model, job, *(_short(times.get(n)) for n in names), f"{best / times['symmpatterns']:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    first = rows[0]
    lines += [
        "",
        f"Microseconds, p50, slowest rank; {first['layers']} layers, {first['world_size']} ranks on {first['device']}, "
        f"torch {first['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def _short(microseconds: float | None) -> str:
    if microseconds is None:
        return ""
    return f"{microseconds:.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


def updated(text: str) -> str:
    """`text` with every marked table made anew."""
    return _MARKED.sub(lambda match: match[1] + table(match[2]) + match[3], text)


def main() -> int:
    stale = False
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        after = updated(before)
        if "--check" not in sys.argv[1:]:
            path.write_text(after, encoding="utf-8")
        elif before != after:
            print(f"{path.name} does not show what bench/results says: run `python bench/table.py`", file=sys.stderr)
            stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
