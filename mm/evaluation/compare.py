"""Two results, metric by metric: the difference, its standard error, and whether it may be chance.

Where both are of the same samples they are compared pair by pair: what is hard for one model is hard for the other, and
the difference is known better than either number. Letters: N samples, R bootstrap draws.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm.config import ConfigError
from mm.evaluation.classification import BINS, Statistic, calibration_statistic, per_class_statistic
from mm.evaluation.outcome import draw_groups

LARGEST = 1 << 30  # bytes of a results file
LEVEL = 0.05  # a difference is significant where chance alone gives as large a one less often
Columns = Mapping[str, list[Any]]


@dataclass
class Difference:
    """`b - a` of one metric, its standard error, and how probable as large a one is if the models are alike.

    `how`: "McNemar" (exact, of yes-or-no outcomes in pairs), "paired" (bootstrap over the pairs) or "unpaired" (from
    the two standard errors). NaN where an error is not known.
    """

    task: str
    metric: str
    a: float
    b: float
    error: float
    p: float
    n: int
    how: str

    @property
    def significant(self) -> bool:
        return self.p < LEVEL

    def row(self) -> dict[str, Any]:
        """As JSON has it; None for what is not known."""
        known = {name: None if value != value else value for name, value in (("error", self.error), ("p", self.p))}
        about = {"task": self.task, "metric": self.metric, "a": self.a, "b": self.b, "difference": self.b - self.a}
        return {**about, **known, "significant": self.significant, "n": self.n, "how": self.how}


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `mm evaluate --out` wrote: the file, or the folder with its `results.json`. Raises ConfigError."""
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        if file.stat().st_size > LARGEST:
            raise ConfigError(f"{path}: over {LARGEST >> 20} MB; give a file that mm evaluate --out wrote")
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give what mm evaluate --out wrote") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({' '.join(str(error).split())[:80]})") from error
    if isinstance(found, dict) and "tasks" not in found and isinstance(found.get("results"), list):
        raise ConfigError(f"{path}: holds the evaluations of several runs; give one run's evaluation.json")
    rows = found.get("tasks") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows or not all(map(_whole, rows)):
        raise ConfigError(f"{path}: has no tasks as mm evaluate --out writes them; evaluate again with this version")
    for row in rows:
        problem = _problem(row)
        if problem:
            raise ConfigError(f"{path}: task {row['name'][:80]!r}: {problem}; evaluate again with this version")
    return found


def _whole(row: Any) -> bool:
    kinds = {"name": str, "metrics": dict, "errors": dict, "n": dict, "hashes": dict, "settings": dict}
    return isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in kinds.items())


def _problem(row: dict[str, Any]) -> str:
    """What of a task's row is not as `mm evaluate` writes it, or ""."""
    for name, allowed in (("metrics", _number), ("errors", _number), ("n", _count)):
        bad = next((key for key, value in row[name].items() if value is not None and not allowed(value)), None)
        if bad is not None:
            return f"{name}.{bad[:40]} = {str(row[name][bad])[:40]!r} is no number"
    columns = row.get("outcomes")
    if columns is None:
        return ""
    keys = columns.get("keys") if isinstance(columns, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        return "outcomes have no keys"
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != len(keys):
            return f"outcomes.{name[:40]} is no list of {len(keys)}"
        whole = (value if isinstance(value, list) else [value] for value in values)
        if name != "keys" and not all(one and all(map(_number, one)) for one in whole):
            return f"outcomes.{name[:40]} holds what is no number"
    return ""


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Every metric of every task that both have. Raises ConfigError where there is none."""
    ours, theirs = ({row["name"]: row for row in result["tasks"]} for result in (a, b))
    found = [
        _difference(ours[task], theirs[task], metric)
        for task in ours
        if task in theirs
        for metric, value in ours[task]["metrics"].items()
        if _number(value) and _number(theirs[task]["metrics"].get(metric))
    ]
    if not found:
        tasks = [", ".join(rows) for rows in (ours, theirs)]
        raise ConfigError(f"compare: no metric is in both; one has the tasks {tasks[0]}, the other {tasks[1]}")
    return found


def _difference(a: dict[str, Any], b: dict[str, Any], metric: str) -> Difference:
    one, other = a["metrics"][metric], b["metrics"][metric]
    pair = _paired(a, b, metric)
    if pair is not None:
        return Difference(a["name"], metric, one, other, *pair)
    error = math.hypot(*(_float(row["errors"].get(metric)) for row in (a, b)))
    n = min(int(row["n"].get(metric) or 0) for row in (a, b))
    return Difference(a["name"], metric, one, other, error, _two_sided(other - one, error), n, "unpaired")


def _paired(a: dict[str, Any], b: dict[str, Any], metric: str) -> tuple[float, float, int, str] | None:
    """Error, p, pairs and how; None where the two are not of the same samples, or do not say what each adds."""
    one, other = a.get("outcomes"), b.get("outcomes")
    data = a["hashes"].get("data")
    if not one or not other or one["keys"] != other["keys"] or not data or data != b["hashes"].get("data"):
        return None
    if metric in STATISTICS:
        statistic, needs = STATISTICS[metric]
        if not all(name in columns for name in needs for columns in (one, other)):
            return None
        columns, counts = _groups(one, other, needs)
        statistics = [statistic(found, row["settings"]) for found, row in zip(columns, (a, b), strict=True)]
        whole = [float(found(counts[None].astype(np.float64))[0]) for found in statistics]
        if not all(_is(value, row["metrics"][metric]) for value, row in zip(whole, (a, b), strict=True)):
            return None
    else:
        if metric not in one or metric not in other:
            return None
        (x, of), (y, other_of) = _sums(one[metric]), _sums(other[metric])
        if not np.array_equal(of, other_of):
            return None
        if not _is(x.sum() / of.sum(), a["metrics"][metric]) or not _is(y.sum() / of.sum(), b["metrics"][metric]):
            return None  # the metric is not the mean of what stands under its name
        if _yes_or_no(x, of) and _yes_or_no(y, of):
            gains, losses = int((y > x).sum()), int((y < x).sum())
            spread = float((y - x).std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.nan
            return spread, mcnemar(gains, losses), len(x), "McNemar"
        rows, counts = np.unique(np.stack([x, y, of], 1), axis=0, return_counts=True)
        statistics = [_mean_statistic(rows[:, side], rows[:, 2]) for side in (0, 1)]
    draws = draw_groups(lambda drawn: statistics[1](drawn) - statistics[0](drawn), counts)
    error = float(np.std(draws[np.isfinite(draws)], ddof=1)) if len(one["keys"]) > 1 else math.nan
    return error, _two_sided(b["metrics"][metric] - a["metrics"][metric], error), len(one["keys"]), "paired"


def _groups(one: Columns, other: Columns, needs: tuple[str, ...]) -> tuple[list[Columns], NDArray[np.int64]]:
    """Both sides' columns of groups of samples that are alike on both, and how many are in each group.

    Samples of a class that are right or wrong alike are many, and then one number is drawn for all of them.
    """
    table = np.array([columns[name] for columns in (one, other) for name in needs], np.float64)
    rows, counts = np.unique(table, axis=1, return_counts=True)
    found = np.split(rows, 2)
    return [dict(zip(needs, side, strict=True)) for side in found], counts


def _mean_statistic(sums: NDArray[np.float64], of: NDArray[np.float64]) -> Statistic:
    return lambda drawn: (drawn @ sums) / (drawn @ of)


def _per_class(columns: Columns, settings: Mapping[str, Any]) -> Statistic:
    return per_class_statistic(np.array(columns["truth"]), np.array(columns["acc1"]) > 0)


def _calibration(columns: Columns, settings: Mapping[str, Any]) -> Statistic:
    return calibration_statistic(
        np.array(columns["confidence"]), np.array(columns["acc1"]) > 0, settings.get("bins", BINS)
    )


STATISTICS = {  # and the columns that each needs
    "mean_per_class_recall": (_per_class, ("truth", "acc1")),
    "ece": (_calibration, ("confidence", "acc1")),
}


def mcnemar(gains: int, losses: int) -> float:
    """The probability of so uneven a split of the pairs that differ, or a more uneven one, if either way is as likely.

    Exact and two-sided (McNemar, 1947, with the binomial distribution).
    """
    n, fewer = gains + losses, min(gains, losses)
    if not n:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - n * math.log(2)) for log in logs))


def _two_sided(difference: float, error: float) -> float:
    """p of a difference that is normal with this standard error; NaN where none is known."""
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / error / math.sqrt(2))


def _sums(column: list[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each sample adds, and to how many questions."""
    lists = [value if isinstance(value, list) else [value] for value in column]
    return np.array([sum(one) for one in lists], np.float64), np.array([len(one) for one in lists], np.float64)


def _yes_or_no(sums: NDArray[np.float64], of: NDArray[np.float64]) -> bool:
    return bool((of == 1).all()) and bool(np.isin(sums, (0, 1)).all())


def _is(mean: float, value: float) -> bool:
    return math.isclose(mean, value, rel_tol=1e-5, abs_tol=1e-7)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _float(value: Any) -> float:
    return float(value) if _number(value) else math.nan
