"""The tables of README.md, made from the rows in bench/results.

    python bench/table.py            writes each table between its two marks in README.md
    python bench/table.py --check    exit code 1 if a table there is not what the rows say

A table stands between ``<!-- rows: NAME -->`` and ``<!-- end of rows -->``, with NAME.csv in bench/results.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
LIMIT = "mm alone"
_MARKED = re.compile(r"(<!-- rows: ([\w-]+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)


def table(name: str) -> str:
    """A Markdown table of the p50 times in NAME.csv, with the fused operator's speed-up, and a line on their origin."""
    with open(RESULTS / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    names.sort(key=lambda n: (n == LIMIT, n.startswith("fused")))  # alternatives, fused, limit
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        key = (f"{row['M']} x {row['N']} x {row['K']}", row["dtype"], row["launch"])
        cases.setdefault(key, {})[row["implementation"]] = float(row["p50_us"])
    with_launch = len({key[2] for key in cases}) > 1
    head = ["M x N x K", "dtype", *(["launch"] if with_launch else []), *names, "speed-up"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---|" * with_launch + "---:|" * (len(names) + 1)]
    for (shape, dtype, launch), times in cases.items():
        others = [time for n, time in times.items() if n != LIMIT and not n.startswith("fused")]
        speed_up = f"{min(others) / times['fused']:.2f}x" if others and "fused" in times else ""
        cells = [shape, dtype, *([launch] if with_launch else []), *(_short(times.get(n)) for n in names), speed_up]
        lines.append("| " + " | ".join(cells) + " |")
    first = rows[0]
    busy = float(first["load"] or 0) > 1.0
    noise = f" Other programs were running at the time (load average {first['load']}), so expect noise." if busy else ""
    threads = "1 thread" if first["threads"] == "1" else f"{first['threads']} threads"
    lines += [
        "",
        f"Microseconds, p50 of {first['samples']} interleaved samples, slowest rank; {first['world_size']} ranks on "
        f"{first['device']}, {threads} a rank, torch {first['torch']}, commit {first['commit']}, "
        f"{first['date']}.{noise}",
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
    before = README.read_text(encoding="utf-8")
    after = updated(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            print("README.md does not show what bench/results says: run `python bench/table.py`", file=sys.stderr)
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
