"""Plots of benchmark rows, where matplotlib is installed (``pip install 'symmpatterns[bench]'``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _common import Row


def plot(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Draws p50 with p20 to p80 of every implementation over the shapes, a panel for each dtype and way of launching.

    Returns False, and draws nothing, without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row.dtype, row.launch) for row in rows))
    names = list(dict.fromkeys(row.implementation for row in rows))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(1.5 + 6.0 * len(panels), 4.8), squeeze=False, sharey=True)
    for axis, (dtype, launch) in zip(axes[0], panels):
        here = [row for row in rows if (row.dtype, row.launch) == (dtype, launch)]
        shapes = list(dict.fromkeys((row.M, row.N, row.K) for row in here))
        for index, name in enumerate(names):
            mine = [row for row in here if row.implementation == name]
            weights = list(dict.fromkeys((row.N, row.K) for row in mine))
            for n, k in weights:  # a line joins the batch sizes of one weight
                chosen = [row for row in mine if (row.N, row.K) == (n, k)]
                axis.errorbar(
                    [shapes.index((row.M, n, k)) for row in chosen],
                    [row.p50_us for row in chosen],
                    yerr=[[row.p50_us - row.p20_us for row in chosen], [row.p80_us - row.p50_us for row in chosen]],
                    label=name if (n, k) == weights[0] else None,
                    color=f"C{index}",
                    marker="o",
                    markersize=4,
                    capsize=2,
                )
        axis.set_yscale("log")
        axis.set_xticks(range(len(shapes)), ["x".join(map(str, shape)) for shape in shapes], rotation=60, ha="right")
        axis.set_title(f"{dtype}, {launch}")
        axis.grid(True, which="both", axis="y", alpha=0.25)
    axes[0][0].set_ylabel("microseconds (p50, bars p20 to p80)")
    axes[0][0].legend()
    figure.suptitle(title)
    figure.supxlabel("M x N x K of each rank")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
