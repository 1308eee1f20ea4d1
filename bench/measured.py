"""Turns the rows in bench/results into symmpatterns/measured.json, the cost model's measured table.

    python bench/measured.py

A point compares what the library does with the best that a program can have that is not rewritten: the backend's
collective, or torch's own fused operator where a pass of torch's puts it there. Only GPU
rows: on CPU the fused operators are used at every size. The rows of bench/tune.py are not read.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

from _common import BY_HAND, LIMIT

ROOT = Path(__file__).resolve().parents[1]
# family: (benchmark, its implementation there, whether its size is the KiB of a rank's contribution)
FAMILIES = {
    "matmul_all_reduce": ("matmul_all_reduce", "fused", False),
    "matmul_reduce_scatter": ("matmul_reduce_scatter", "fused", False),
    "all_gather_matmul": ("all_gather_matmul", "fused", False),
    "all_reduce_rms_norm": ("peer_views_all_reduce", "template", False),
    "peer_views_all_reduce": ("peer_views_all_reduce", "peer views", True),
    "peer_views_all_gather": ("peer_views_all_gather", "peer views", True),
    "peer_views_all_to_all_single": ("peer_views_all_to_all", "peer views", True),
}
NO_ALTERNATIVE = (LIMIT, *BY_HAND, "peer views, push", "template")
BENCHMARKS = {benchmark for benchmark, _, _ in FAMILIES.values()}


def main() -> None:
    times: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for path in sorted((ROOT / "bench" / "results").glob("*.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row.get("benchmark") in BENCHMARKS and row["launch"] in ("eager", "graph"):
                    if row["device"].startswith("NVIDIA"):
                        key = ("benchmark", "device", "world_size", "launch", "dtype", "M", "N", "K")
                        times[tuple(row[name] for name in key)][row["implementation"]] = float(row["p50_us"])
    points = []
    for family, (wanted, fused, in_kib) in FAMILIES.items():
        for (benchmark, device, world_size, launch, dtype, m, n, k), by_name in times.items():
            others = [t for name, t in by_name.items() if name != fused and name not in NO_ALTERNATIVE]
            if benchmark == wanted and fused in by_name and others:
                size = [int(m) * int(n) * 2 >> 10, 1, 1] if in_kib else [int(m), int(n), int(k) or 1]
                points.append(
                    {
                        "family": family,
                        "device": device,
                        "world_size": int(world_size),
                        "launch": launch,
                        "dtype": dtype,
                        "size": size,
                        "fused_us": by_name[fused],
                        "best_other_us": min(others),
                        **({"alone_us": by_name[LIMIT]} if LIMIT in by_name else {}),
                    }
                )
    lines = ",\n".join(json.dumps(point) for point in points)
    (ROOT / "symmpatterns" / "measured.json").write_text(f"[\n{lines}\n]\n")
    print(f"{len(points)} points")


if __name__ == "__main__":
    main()
