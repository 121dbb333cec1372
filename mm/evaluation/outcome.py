"""What a measurement is: a number with its standard error and the number of samples it is of, and a record a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 1000  # of a bootstrap
FEWEST = 100  # resamples where samples are very many
_MOST_DRAWS = 50_000_000  # numbers drawn for one bootstrap: a few seconds
_AT_ONCE = 4_000_000  # numbers held


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

    @classmethod
    def resampled(
        cls,
        statistic: Callable[[np.ndarray], np.ndarray],
        counts: Sequence[int] | np.ndarray,
        *,
        value: float | None = None,
        seed: int = 0,
        resamples: int = RESAMPLES,
    ) -> Metric:
        """`bootstrap` for a statistic of how often each of G groups of like samples was drawn: all draws at once.

        `counts` `[G]`: the samples in each group; samples are alike where the statistic cannot tell them apart, so that
        a thousand right answers are one group, and drawing them is one multinomial number. `statistic` is given float64
        `[R, G]` and returns `[R]`, where NaN means that it has none of such a draw; `value` is the measured one, by
        default that of `counts` themselves. Draws are fewer where groups are so many that they would take minutes.
        """
        groups = np.asarray(counts, np.int64)
        n = int(groups.sum())
        if value is None:
            value = float(statistic(groups[None].astype(np.float64))[0])
        if n < 2:
            return cls(value, math.nan, n)
        draws = draw_groups(statistic, groups, seed=seed, resamples=resamples)
        draws = draws[np.isfinite(draws)]
        return cls(value, float(np.std(draws, ddof=1)) if len(draws) > 1 else math.nan, n)

    @classmethod
    def ratio(
        cls,
        hits: Sequence[float] | np.ndarray,
        of: Sequence[float] | np.ndarray | None = None,
        *,
        value: float | None = None,
        seed: int = 0,
    ) -> Metric:
        """The sum of `hits` over that of `of` (1 each by default: the mean), its error by `resampled`.

        A sample is an element of both, so that what it brings along (five captions of an image) is drawn with it.
        `n` is the sum of `of`.
        """
        above = np.asarray(hits, np.float64)
        below = np.ones_like(above) if of is None else np.asarray(of, np.float64)
        if not len(above):
            return cls(math.nan, math.nan, 0)
        pairs, counts = np.unique(np.stack([above, below], 1), axis=0, return_counts=True)
        found = cls.resampled(lambda w: (w @ pairs[:, 0]) / (w @ pairs[:, 1]), counts, value=value, seed=seed)
        return cls(found.value, found.error, int(below.sum()))


def draw_groups(
    statistic: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """The statistic `[R]` of each of R bootstrap draws, as `Metric.resampled` takes it."""
    n, groups = int(counts.sum()), len(counts)
    rng = np.random.default_rng(seed)
    total = max(min(resamples, FEWEST), min(resamples, _MOST_DRAWS // groups))
    rows = max(1, _AT_ONCE // groups)
    parts = []
    for start in range(0, total, rows):
        size = min(rows, total - start)
        if groups == n:  # each sample by itself: counting is ten times as fast as a multinomial of so many
            drawn = np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(size)])
        else:
            drawn = rng.multinomial(n, counts / n, size=size)
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(np.asarray(statistic(drawn.astype(np.float64)), np.float64))
    return np.concatenate(parts)


@dataclass
class Outcome:
    """What one task found.

    `metrics` by name (CLIP_benchmark's names where it has one: acc1, acc5, mean_per_class_recall,
    image_retrieval_recall@5). `records`: one JSON object a sample, each with its "key", for the per-sample file; a
    field named as a metric is what that sample adds to it, a number, or a list of them where it is asked several times,
    and two results can then be compared sample by sample. `detail`: anything else that JSON can hold and a report may
    draw, such as a confusion matrix. `hashes`: of what the task read beside the data ("labels", "templates").
    """

    metrics: dict[str, Metric]
    records: list[dict[str, Any]] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
