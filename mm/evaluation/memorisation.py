"""Does a model draw its training pictures? Drawings are no nearer to them than real pictures it never saw, or they are.

The distance of a drawing to its nearest training picture says nothing by itself: some pictures are near to others. So
it is compared with that of real held-out pictures, as in arXiv 1904.06991's and 2211.14680's searches by neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mm.evaluation.fidelity import nearest
from mm.evaluation.measured import Pictures
from mm.evaluation.outcome import Metric

QUANTILES = (0.01, 0.05)  # of the real pictures' distances: a drawing below them is suspiciously near
NAMED = 10  # closest drawings that are named


def memorisation(
    drawn: Pictures,
    unseen: Pictures,
    train: Pictures,
    train_keys: Sequence[str],
    records: list[dict[str, Any]],
    pixels_too: bool,
) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Metrics and detail; `records`, one a drawing, get their nearest training picture and its distance.

    `unseen`: held-out real pictures; those that equal a training picture were seen after all, and do not count. By
    features and, with `pixels_too`, by 16 x 16 averages: then names begin with `pixels_`. `train_distance_ratio` below
    1: drawings lie nearer to training pictures than real ones do. `nearer_than_1pct`: the share of drawings that are
    no farther than the nearest 1 % of the real ones; about 0.01 for a model that knows no training picture by heart.
    No metrics where no real picture is left to compare with.
    """
    metrics: dict[str, Metric] = {}
    new = nearest(unseen.pixels, train.pixels)[0].nonzero()[:, 0].tolist()
    detail: dict[str, Any] = {"train": len(train), "unseen": len(new), "equal_to_train": len(unseen) - len(new)}
    if not new:
        return metrics, detail
    unseen = unseen[new]
    views = [("", "features"), *([("pixels_", "pixels")] if pixels_too else [])]
    for prefix, view in views:
        ours, places = nearest(getattr(drawn, view), getattr(train, view))
        theirs, _ = nearest(getattr(unseen, view), getattr(train, view))
        distances, honest = ours.numpy(), theirs.numpy()
        limits = {f"{prefix}nearer_than_{round(100 * q)}pct": float(np.quantile(honest, q)) for q in QUANTILES}
        each = {f"{prefix}train_distance_ratio": distances / (honest.mean() or np.nan)}
        each |= {name: (distances <= limit).astype(np.float64) for name, limit in limits.items()}
        metrics |= {name: Metric.mean(values) for name, values in each.items()}
        for row, (record, place) in enumerate(zip(records, places.tolist(), strict=True)):
            record |= {f"{prefix}train_key": train_keys[place], f"{prefix}train_distance": float(distances[row])}
            record |= {name: float(values[row]) for name, values in each.items()}
        order = np.argsort(distances, kind="stable")[:NAMED].tolist()
        names = ("key", "caption", "seed", f"{prefix}train_key", f"{prefix}train_distance")
        detail[view] = {
            "mean_distance": float(distances.mean()),
            "mean_distance_of_unseen": float(honest.mean()),
            "limits": limits,
            "closest": [
                {name: records[row][name] for name in names}
                | {"nearer_than_unseen": float((honest >= distances[row]).mean())}
                for row in order
            ],
        }
    return metrics, detail
