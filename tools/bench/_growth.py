"""How a cost grows with a size: the slope of a line through the logarithms, and the plots."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float, float]]


def slopes(points: Points) -> dict[str, Any]:
    """The exponent p of cost ~ size^p: overall by least squares, and between every two neighbours."""
    logs = [(math.log(size), math.log(cost)) for size, cost in points if cost > 0]
    if len(logs) < 2:
        return {"overall": None, "segments": []}
    middle = [sum(values) / len(logs) for values in zip(*logs, strict=True)]
    across = sum((x - middle[0]) ** 2 for x, _ in logs)
    overall = sum((x - middle[0]) * (y - middle[1]) for x, y in logs) / across
    pairs = itertools.pairwise(logs)
    return {"overall": round(overall, 3), "segments": [round((d - b) / (c - a), 3) for (a, b), (c, d) in pairs]}


def save_curves(
    path: Path, panels: Mapping[str, Mapping[str, Points]], across: str, up: str, *, logarithmic: bool = True
) -> None:
    """A PNG of one panel a title, each of named lines; on logarithmic axes, or plain ones with a grid."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.0), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3.5, label=name)
        if logarithmic:
            axis.set_xscale("log")
            axis.set_yscale("log")
        axis.set(title=title, xlabel=across, ylabel=up)
        axis.title.set_fontsize(10)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
