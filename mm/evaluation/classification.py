"""What is measured of guesses: mean recall over the classes, calibration error, the confusion matrix.

Letters: N samples, C classes, R bootstrap draws. A statistic takes how often each sample (or group of like samples) was
drawn, float64 `[R, N]`, and returns `[R]`; see `mm.evaluation.outcome.Metric.resampled`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm.evaluation.outcome import Metric

MOST_CLASSES = 60  # in a confusion matrix
BINS = 15
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def mean_per_class_recall(truth: NDArray[np.int64], right: NDArray[np.bool_], seed: int = 0) -> Metric:
    """The mean over the classes that occur in `truth` `[N]` of the share of right guesses: scikit-learn's balanced
    accuracy, which CLIP_benchmark reports. A draw in which a class does not occur is averaged over the others."""
    classes, place = np.unique(truth, return_inverse=True)
    counts = np.zeros((2, len(classes)), np.int64)  # wrong, right
    np.add.at(counts, (right.astype(np.int64), place), 1)

    def statistic(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        wrong, hits = drawn[:, : len(classes)], drawn[:, len(classes) :]
        return np.nanmean(hits / (wrong + hits), axis=1)

    value = float(np.mean(counts[1] / counts.sum(0)))
    return Metric.resampled(statistic, counts.ravel(), value=value, seed=seed)


def per_class_statistic(truth: NDArray[np.int64], right: NDArray[np.bool_]) -> Statistic:
    """`mean_per_class_recall` as a statistic of samples, or of groups of samples alike in both."""
    classes, place = np.unique(truth, return_inverse=True)
    each = np.eye(len(classes))[place]  # [N, C]
    hits = each * right[:, None]
    return lambda drawn: np.nanmean((drawn @ hits) / (drawn @ each), axis=1)


def calibration_statistic(confidence: NDArray[Any], right: NDArray[np.bool_], bins: int = BINS) -> Statistic:
    """Expected calibration error (arXiv 1706.04599): |accuracy - confidence| in `bins` equal parts of (0, 1], weighted.

    `confidence` `[N]`: probability of the guess. The same number as `mm.evaluation.calibration`'s, of any draw.
    """
    place = np.clip(np.ceil(confidence.astype(np.float64) * bins), 1, bins).astype(np.int64) - 1
    order = np.argsort(place, kind="stable")
    gaps: NDArray[np.float64] = (right - confidence.astype(np.float64))[order]
    starts = np.searchsorted(place[order], np.unique(place))

    def statistic(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.add.reduceat(drawn[:, order] * gaps, starts, axis=1)
        return np.abs(sums).sum(1) / drawn.sum(1)

    return statistic


def confusion(truth: NDArray[np.int64], guess: NDArray[np.int64], names: Sequence[str]) -> dict[str, Any]:
    """`labels` and `counts`, a row for each true class and a column for each guess, of the classes that occur most.

    `left_out`: samples that are in no cell, because one of their two classes is not among these.
    """
    totals = np.bincount(truth, minlength=len(names))
    shown = np.sort(np.argsort(-totals, kind="stable")[:MOST_CLASSES])
    where = np.full(len(names), -1)
    where[shown] = np.arange(len(shown))
    row, column = where[truth], where[guess]
    inside = (row >= 0) & (column >= 0)
    counts = np.zeros((len(shown), len(shown)), np.int64)
    np.add.at(counts, (row[inside], column[inside]), 1)
    labels = [names[place] for place in shown]
    return {"labels": labels, "counts": counts.tolist(), "left_out": int((~inside).sum())}
