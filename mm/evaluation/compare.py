"""Two results, metric by metric: the difference, its standard error, and whether it may be chance.

Where both are of the same samples they are compared pair by pair: what is hard for one model is hard for the other, and
the difference is known better than either number. Letters: N samples, R bootstrap draws.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm.config import ConfigError
from mm.evaluation.classification import Statistic, calibration_statistic, per_class_statistic
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
    return found


def _whole(row: Any) -> bool:
    kinds = {"name": str, "metrics": dict, "errors": dict, "n": dict, "hashes": dict, "settings": dict}
    return isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in kinds.items())


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
    if not one or not other or one["keys"] != other["keys"] or a["hashes"].get("data") != b["hashes"].get("data"):
        return None
    if metric in STATISTICS:
        statistics = [STATISTICS[metric](row["outcomes"], row["settings"]) for row in (a, b)]
        counts = np.ones(len(one["keys"]), np.int64)
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


def _mean_statistic(sums: NDArray[np.float64], of: NDArray[np.float64]) -> Statistic:
    return lambda drawn: (drawn @ sums) / (drawn @ of)


def _per_class(columns: Columns, settings: Mapping[str, Any]) -> Statistic:
    return per_class_statistic(np.array(columns["truth"]), np.array(columns["acc1"]) > 0)


def _calibration(columns: Columns, settings: Mapping[str, Any]) -> Statistic:
    return calibration_statistic(np.array(columns["confidence"]), np.array(columns["acc1"]) > 0, settings["bins"])


STATISTICS = {"mean_per_class_recall": _per_class, "ece": _calibration}


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


def _float(value: Any) -> float:
    return float(value) if _number(value) else math.nan


def what_differs(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """A line for each thing beside the numbers that is not the same in both."""
    found = [f"{name}: {_short(one)} against {_short(other)}" for name, one, other in _facts(a, b) if one != other]
    theirs = {row["name"]: row for row in b["tasks"]}
    for row in a["tasks"]:
        if row["name"] not in theirs:
            found.append(f"{row['name']}: only in A")
            continue
        other = theirs.pop(row["name"])
        hashes = (row["hashes"], other["hashes"])
        if any(one.get("data") != two.get("data") for one, two in [hashes]) or _differ(hashes, "images"):
            found.append(f"{row['name']}: NOT THE SAME DATA: {row.get('dataset')} and {other.get('dataset')}")
        for name in ("truth", "labels", "templates"):
            if _differ(hashes, name):
                found.append(f"{row['name']}: other {name}")
        for key in dict.fromkeys([*row["settings"], *other["settings"]]):
            one, two = row["settings"].get(key), other["settings"].get(key)
            if one != two:
                found.append(f"{row['name']}: {key} = {_short(one)} against {_short(two)}")
        if row.get("task_version") != other.get("task_version"):
            found.append(f"{row['name']}: version {row.get('task_version')} against {other.get('task_version')}")
    return found + [f"{name}: only in B" for name in theirs]


def _facts(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What the results say of themselves, by name."""
    for name in ("run", "step", "seed", "commit", "split"):
        yield name, a.get(name), b.get(name)
    for group in ("settings", "versions"):
        one, other = a.get(group) or {}, b.get(group) or {}
        for key in dict.fromkeys([*one, *other]):
            if group == "versions" or key == "precision":  # the other settings are the tasks' own
                yield key, one.get(key), other.get(key)
    models = [row["hashes"].get("model") for row in (a["tasks"][0], b["tasks"][0])]
    yield "model", *models


def _differ(hashes: tuple[dict[str, Any], dict[str, Any]], name: str) -> bool:
    """Whether both have such a hash and it is not the same."""
    one, other = (found.get(name) for found in hashes)
    return one is not None and other is not None and one != other


def _short(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value)
    return shown if len(shown) <= 60 else shown[:59] + "…"


def table(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str]) -> str:
    """Both results side by side, and below what else differs."""
    lines = [f"A: {names[0]} ({_about(a)})", f"B: {names[1]} ({_about(b)})", ""]
    found = compare(a, b)
    width = max(24, *(len(one.metric) + 2 for one in found))
    lines.append(f"{'':{width}} {'A':>10} {'B':>10} {'B - A':>10}   {'error':>8} {'p':>8}")
    task = ""
    for one in found:
        if one.task != task:
            lines.append(one.task)
            task = one.task
        error, p = ("?" if number != number else f"{number:.2g}" for number in (one.error, one.p))
        mark = "*" if one.significant else " "
        numbers = f"{one.a:10.4f} {one.b:10.4f} {one.b - one.a:+10.4f} ± {error:>8} {p:>8} {mark}"
        lines.append(f"  {one.metric:{width - 2}} {numbers} {one.how}, n = {one.n}")
    expected = LEVEL * len(found)
    lines.append("")
    lines.append(f"* p < {LEVEL}: of {len(found)} comparisons, {expected:.1f} are expected to say so by chance alone")
    others = what_differs(a, b)
    lines += ["what else differs:", *(f"  {line}" for line in others)] if others else ["nothing else differs"]
    return "\n".join(lines)


def _about(result: dict[str, Any]) -> str:
    step = "" if result.get("step") is None else f", step {result['step']}"
    return f"{result.get('run')}{step}, seed {result.get('seed')}"
