"""What a measurement is: a number with its standard error and the number of samples it is of, and a record a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 1000  # of a bootstrap


@dataclass(frozen=True)
class Metric:
    """A value, its standard error (NaN where none is known) and how many samples it is of."""

    value: float
    error: float = math.nan
    n: int = 0

    @classmethod
    def mean(cls, values: Sequence[float] | np.ndarray) -> Metric:
        """The mean of one number a sample; the error is that of the mean, s / √n with s of n - 1."""
        array = np.asarray(values, np.float64)
        if not len(array):
            return cls(math.nan, math.nan, 0)
        spread = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.nan
        return cls(float(array.mean()), spread, len(array))

    @classmethod
    def bootstrap(
        cls, statistic: Callable[[np.ndarray], float], n: int, *, seed: int = 0, resamples: int = RESAMPLES
    ) -> Metric:
        """`statistic` of the places 0 ... n - 1, and its standard deviation over so many draws with replacement.

        `statistic` is given int64 places `[n]` and returns a number (Efron, 1979).
        """
        value = float(statistic(np.arange(n)))
        rng = np.random.default_rng(seed)
        draws = [float(statistic(rng.integers(0, n, n))) for _ in range(resamples)]
        return cls(value, float(np.std(draws, ddof=1)) if resamples > 1 else math.nan, n)


@dataclass
class Outcome:
    """What one task found.

    `metrics` by name (CLIP_benchmark's names where it has one: acc1, acc5, mean_per_class_recall,
    image_retrieval_recall@5). `records`: one JSON object a sample, each with its "key", for the per-sample file.
    `detail`: anything else that JSON can hold and a report may draw, such as a confusion matrix.
    """

    metrics: dict[str, Metric]
    records: list[dict[str, Any]] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)
