"""Two results: paired where they are of the same samples, and significant where chance is not enough."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm.cli import main
from mm.config import ConfigError
from mm.evaluation.classification import mean_per_class_recall
from mm.evaluation.compare import compare, mcnemar, read_result
from mm.evaluation.compare_table import table, what_differs
from mm.evaluation.outcome import Metric

N = 400


def result(right: np.ndarray, **changes: Any) -> dict[str, Any]:
    """Of a classification and a retrieval task with the same hits."""
    truth = np.arange(N) % 5
    lists = [[int(hit), int(hit), 0] for hit in right]
    found = {
        "acc1": Metric.ratio(right),
        "mean_per_class_recall": mean_per_class_recall(truth, right > 0),
        "image_retrieval_recall@1": Metric.ratio([sum(one) for one in lists], np.full(N, 3)),
        "fid": Metric(changes.pop("fid", 10.0), 1.0, N),
    }
    row = {
        "name": "classification",
        "dataset": "wds/pets",
        "metrics": {name: metric.value for name, metric in found.items()},
        "errors": {name: metric.error for name, metric in found.items()},
        "n": {name: metric.n for name, metric in found.items()},
        "task_version": 1,
        "settings": {"bins": 15, "templates": "shards"},
        "hashes": {"data": "d", "images": None, "labels": "l", "templates": "t", "task": "k", "model": "m"},
        "outcomes": {
            "keys": [f"s{n}" for n in range(N)],
            "acc1": right.tolist(),
            "truth": truth.tolist(),
            "image_retrieval_recall@1": lists,
        },
    }
    about = {"run": "a", "step": 1, "seed": 0, "commit": "c", "versions": {"torch": "2"}, "settings": {}}
    return {**about, **changes, "tasks": [row]}


def hits(seed: int, share: float) -> np.ndarray:
    return (np.random.default_rng(seed).random(N) < share).astype(int)


def by_metric(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {one.metric: one for one in compare(a, b)}


def test_pairs_show_a_difference_that_the_two_errors_hide() -> None:
    first = hits(0, 0.5)
    better = first.copy()
    better[np.flatnonzero(first == 0)[:12]] = 1  # twelve pictures more, and none fewer
    a, b = result(first), result(better)
    found = by_metric(a, b)
    assert (
        found["acc1"].how == "McNemar" and found["acc1"].p == pytest.approx(2 * 0.5**12) and found["acc1"].significant
    )
    assert found["acc1"].b - found["acc1"].a == pytest.approx(12 / N)
    assert found["mean_per_class_recall"].how == "paired" and found["mean_per_class_recall"].significant
    assert found["image_retrieval_recall@1"].how == "paired" and found["image_retrieval_recall@1"].significant
    assert found["acc1"].error == pytest.approx((12 / N * (1 - 12 / N) / N) ** 0.5, rel=0.01)
    assert found["fid"].how == "unpaired" and found["fid"].error == pytest.approx(2**0.5) and found["fid"].p == 1
    b["tasks"][0]["outcomes"] = None
    unpaired = by_metric(a, b)["acc1"]
    assert unpaired.how == "unpaired" and not unpaired.significant and unpaired.error > 3 * found["acc1"].error


def test_paired_bootstrap_is_the_deviation_of_the_difference() -> None:
    first, second = hits(0, 0.5), hits(1, 0.55)
    found = by_metric(result(first), result(second))
    plain = Metric.bootstrap(lambda rows: float((second - first)[rows].mean()), N)
    assert found["acc1"].error == pytest.approx(plain.error, rel=0.1)
    assert found["image_retrieval_recall@1"].error == pytest.approx(plain.error * 2 / 3, rel=0.1)


def test_models_that_are_alike_differ_significantly_about_one_time_in_twenty() -> None:
    false = [by_metric(result(hits(2 * n, 0.5)), result(hits(2 * n + 1, 0.5))) for n in range(12)]
    for metric in ("acc1", "mean_per_class_recall", "image_retrieval_recall@1"):
        assert sum(one[metric].significant for one in false) <= 2  # more has a probability of 2 %


@pytest.mark.parametrize(("gains", "losses"), [(0, 0), (1, 0), (5, 2), (30, 11), (300, 270)])
def test_mcnemar_is_the_binomial_test(gains: int, losses: int) -> None:
    n, low = gains + losses, min(gains, losses)
    exact = sum(math.comb(n, k) for k in range(low + 1)) * 2 / 2**n
    assert mcnemar(gains, losses) == pytest.approx(min(1.0, exact), rel=1e-6) == mcnemar(losses, gains)


def test_a_field_that_is_not_what_the_metric_is_of_is_not_paired() -> None:
    a, b = result(hits(0, 0.5)), result(hits(1, 0.5))
    b["tasks"][0]["metrics"]["acc1"] += 0.01
    assert by_metric(a, b)["acc1"].how == "unpaired"
    del a["tasks"][0]["outcomes"]["truth"]
    assert by_metric(a, b)["mean_per_class_recall"].how == "unpaired"


def test_what_differs_is_said() -> None:
    a = result(hits(0, 0.5))
    assert what_differs(a, copy.deepcopy(a)) == []
    b = result(hits(1, 0.5), run="b", versions={"torch": "3"})
    b["tasks"][0]["hashes"] |= {"data": "other", "templates": "other", "model": "other"}
    b["tasks"][0]["settings"] |= {"templates": "openai"}
    said = what_differs(a, b)
    assert "classification: NOT THE SAME DATA: wds/pets and wds/pets" in said and "torch: 2 against 3" in said
    assert "classification: other templates" in said and "classification: templates = shards against openai" in said
    assert by_metric(a, b)["acc1"].how == "unpaired"
    shown = table(a, b, ("a.json", "b.json"))
    assert "NOT THE SAME DATA" in shown and "B - A" in shown and "expected to say so by chance" in shown


def test_the_command_prints_a_table_or_json_and_refuses_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, right in (("a", hits(0, 0.4)), ("b", hits(1, 0.6))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(result(right)))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b" / "results.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"][0]["significant"] and found["metrics"][0]["metric"] == "acc1" and found["differs"] == []
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "McNemar" in capsys.readouterr().out
    wrong = {"none.json": None, "text.json": "{", "old.json": '{"run": "x"}', "demo.json": '{"results": []}'}
    for name, text in wrong.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        assert main(["compare", str(tmp_path / name), str(tmp_path / "a")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and name in error
    other = result(hits(0, 0.5))
    other["tasks"][0]["name"] = "mine"
    with pytest.raises(ConfigError, match="no metric is in both"):
        compare(result(hits(0, 0.5)), other)
    assert read_result(tmp_path / "a")["run"] == "a"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outcomes": {"acc1": [1]}}, "outcomes have no keys"),
        ({"outcomes": []}, "outcomes have no keys"),
        ({"outcomes": {"keys": ["a"], "acc1": [1, 0]}}, "outcomes.acc1 is no list of 1"),
        ({"outcomes": {"keys": ["a"], "acc1": ["yes"]}}, "outcomes.acc1 holds what is no number"),
        ({"outcomes": {"keys": ["a"], "acc1": [[]]}}, "outcomes.acc1 holds what is no number"),
        ({"n": {"acc1": "x"}}, "n.acc1 = 'x' is no number"),
        ({"metrics": {"acc1": True}}, "metrics.acc1 = 'True' is no number"),
        ({"errors": {"acc1": [0.1]}}, "errors.acc1"),
    ],
)
def test_a_results_file_that_was_tampered_with_is_one_clear_error(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    row = {"name": "t", "metrics": {"acc1": 1.0}, "errors": {}, "n": {}, "hashes": {}, "settings": {}, **change}
    (tmp_path / "a.json").write_text(json.dumps({"tasks": [row]}))
    with pytest.raises(ConfigError, match=words):
        read_result(tmp_path / "a.json")


def test_hundreds_of_classes_are_compared_in_little_memory() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 300, 10_000)
    sides = []
    for share in (0.5, 0.53):
        right = (rng.random(10_000) < share).astype(int)
        recall = mean_per_class_recall(truth, right > 0)
        columns = {"keys": [str(n) for n in range(10_000)], "truth": truth.tolist(), "acc1": right.tolist()}
        row = {"name": "c", "metrics": {"mean_per_class_recall": recall.value}, "errors": {}, "n": {}, "settings": {}}
        sides.append({"tasks": [{**row, "hashes": {"data": "x"}, "outcomes": columns}]})
    (found,) = compare(*sides)
    assert found.how == "paired" and found.significant and found.error == pytest.approx(0.0070, rel=0.1)
