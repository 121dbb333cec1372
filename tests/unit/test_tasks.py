"""Tasks are what their files say; a mistyped file is refused in a line; results say what they are of and go on."""

from __future__ import annotations

import csv
import json
import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_clips import tiny_clip
from wds import classification, retrieval

from mm.cli import main
from mm.commands_evaluate import elsewhere
from mm.config import ConfigError
from mm.evaluation.classification import calibration_statistic, confusion, mean_per_class_recall, per_class_statistic
from mm.evaluation.outcome import Metric
from mm.evaluation.run import evaluate, summary
from mm.evaluation.task import FOLDER, KINDS, read_task, read_tasks, shipped

NAMES, TEMPLATES = ["red cat", "blue dog", "green sun", "moon", "tree"], ["a {c}", "one {c}."]
LABELS = [number * 7 % 5 for number in range(45)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "model", seed=1)[1]


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classification(tmp_path_factory.mktemp("data") / "wds_pets", LABELS, NAMES, TEMPLATES)


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_task_has_a_kind_that_takes_all_its_settings(name: str) -> None:
    task = read_task(name)
    module = import_module(KINDS[task.kind].module)
    assert task.name == name and callable(getattr(module, KINDS[task.kind].function))
    assert getattr(module, "DEFAULTS", task.settings).keys() == task.settings.keys()
    assert len(task.hash) == 16 and task.hash == read_task(name).hash


def test_changes_reach_the_tasks_that_have_such_a_setting(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('name = "mine"\nkind = "generation"\nversion = 3\nsteps = 4\nguidance = 2\n')
    own, drawn, other = read_tasks([str(mine), "generation", "retrieval"], {"seed": 5, "limit": 7})
    assert (own.settings["steps"], own.settings["seed"], own.version, own.called) == (4, 5, 3, "generation")
    assert drawn.settings["limit"] == other.settings["limit"] == 7 and "seed" not in other.settings
    assert own.hash != drawn.hash


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('kind = "retreival"', r"kind = 'retreival': no such kind; did you mean retrieval\?"),
        ('name = "x"', "names no kind; there are zero_shot"),
        ('kind = "retrieval"\nkss = [1]', r"kss: retrieval has no such setting; did you mean ks\?"),
        ('kind = "retrieval"\nks = [0]', r"ks = \[0\]: must be a list of whole numbers above 0"),
        ('kind = "retrieval"\nks = 5', "ks = 5: must be a text or a list"),
        ('kind = "retrieval"\nlimit = "all"', "limit = 'all': must be a whole number"),
        ('kind = "retrieval"\nlimit = true', "limit = True: must be"),
        ('kind = "retrieval"\nlines = "maybe"', "lines = 'maybe': must be one of auto, yes, no"),
        ('kind = "retrieval"\ncaptions = "tyt"', "'tyt' is no place for a caption"),
        ('kind = "classification"\ntemplates = ["no hole"]', "'no hole': has no {}"),
        ('kind = "classification"\ntemperature = 0.0', "temperature = 0.0: must be a number above 0"),
        ('kind = "classification"\nlabel = "clz"', "label = 'clz': must be cls, or a field"),
        ('kind = "classification"\nclasses = []', r"classes = \[\]: must be a list of texts"),
        ('kind = "generation"\nsteps = 0', "steps = 0: must be at least 1"),
        ('kind = "generation"\nversion = "2"', "version = '2': must be a int"),
        ('kind = "generation"\nneeds = ["diffusoin"]', "no such objective"),
        ("kind = ", "not TOML"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match) as error:
        read_task(str(path))
    assert "\n" not in str(error.value) and "wrong.toml" in str(error.value)


def test_names_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no task 'retreval'; did you mean retrieval\?"):
        read_task("retreval")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_task(str(tmp_path / "none.toml"))
    (tmp_path / "retrieval.toml").write_text('kind = "retrieval"')
    with pytest.raises(ConfigError, match="called 'retrieval', as another is"):
        read_tasks(["retrieval", str(tmp_path / "retrieval.toml")])
    assert FOLDER.is_dir()


def test_a_result_is_written_in_every_form_and_gone_on_with(
    clip: str, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, records = tmp_path / "results", tmp_path / "records.parquet"
    given: dict[str, Any] = {"data": str(pets), "out": f"{out}/", "records": records, "progress": False}
    result = evaluate(clip, **given, load=elsewhere)
    (row,) = result["tasks"]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(result))
    (file,) = (out / "clip_benchmark").iterdir()
    theirs = json.loads(file.read_text())
    assert list(theirs) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    assert theirs["metrics"] == row["metrics"] and theirs["dataset"] == "wds/pets" and str(tmp_path) not in str(theirs)
    assert set(row["hashes"]) >= {"data", "images", "labels", "templates", "task", "model", "truth"}
    assert row["errors"].keys() == row["n"].keys() == row["metrics"].keys() and row["n"]["ece"] == 45

    import pyarrow.parquet as parquet

    table = parquet.read_table(records).to_pylist()
    assert len(table) == 45 and table[7]["key"] == "s0000007" and table[7]["task"] == "classification"
    assert sum(line["acc1"] for line in table) / 45 == row["metrics"]["acc1"]
    assert "classification acc1" in summary(result)

    monkeypatch.setattr("mm.evaluation.task.Task.run", lambda task, job: pytest.fail("measured again"))
    assert evaluate(clip, **given, resume=True, load=elsewhere)["tasks"] == json.loads(json.dumps(result["tasks"]))
    changes: list[dict[str, Any]] = [{"precision": "fp32"}, {"settings": {"templates": "{}"}}, {"limit": 3}]
    for change in changes:
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            evaluate(clip, **given, **change, resume=True, load=elsewhere)
    templates = pets / "zeroshot_classification_templates.txt"
    before = templates.read_text()
    templates.write_text("a photo of {c}\n")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        evaluate(clip, **given, resume=True, load=elsewhere)
    templates.write_text(before)


def test_what_is_interrupted_leaves_nothing(
    clip: str, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mm.evaluation.job.Job.embed", stop)
    out, records = tmp_path / "a" / "results.json", tmp_path / "b" / "records.jsonl"
    argv = ["evaluate", clip, "--data", str(pets), "--out", str(out), "--records", str(records)]
    assert main(argv) == 130 and not list(tmp_path.iterdir())
    assert main([*argv[:4], "--records", "x.csv"]) == 2
    assert "must end in .jsonl or .parquet" in capsys.readouterr().err


def test_a_list_of_evaluations_becomes_a_table(
    clip: str, pets: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(root / "tools" / "evaluate.py"))["evaluate_all"]
    captions = retrieval(tmp_path / "wds_pairs", [["a cat", "one cat"], ["a dog"], ["the sun", "sun", "a sun"]])
    file, out = tmp_path / "list.txt", tmp_path / "out"
    lines = [f"{clip} --data {pets} --limit 20", f"{clip} --data {captions}", f"{clip} --data {tmp_path}/none"]
    file.write_text("\n".join(["# ours", *lines]))
    assert script([str(file), str(out)]) == 2
    said = capsys.readouterr()
    assert "2 of 3 evaluated" in said.out and "none" in said.err
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert {row["dataset"] for row in rows} == {"wds/pets", "wds/pairs"}
    first = next(row for row in rows if row["metric"] == "acc1")
    assert first["n"] == "20" and 0 <= float(first["value"]) <= 1 and float(first["error"]) >= 0
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/results.json")}
    file.write_text("\n".join(lines[:2]))
    assert script([str(file), str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written and len(written) == 2
    file.write_text(f"{clip} --data {pets} --out x")
    with pytest.raises(ValueError, match="leave --out out"):
        script([str(file), str(out)])


def test_bootstrap_errors_are_those_of_plain_resampling() -> None:
    rng = np.random.default_rng(0)
    hits = rng.random(300) < 0.3
    assert Metric.ratio(hits).error == pytest.approx((0.3 * 0.7 / 300) ** 0.5, rel=0.12)
    sums, of = rng.integers(0, 3, 200), rng.integers(2, 6, 200)
    plain = Metric.bootstrap(lambda rows: sums[rows].sum() / of[rows].sum(), 200)
    grouped = Metric.ratio(sums, of)
    assert grouped.value == plain.value and grouped.n == of.sum()
    assert grouped.error == pytest.approx(plain.error, rel=0.12)  # 1,000 draws know a deviation to 2 % each
    truth = rng.integers(0, 4, 200)
    right = rng.random(200) < 0.2 * (truth + 1)
    recall = lambda rows: np.mean([right[rows][truth[rows] == c].mean() for c in range(4)])  # noqa: E731
    plain, grouped = Metric.bootstrap(recall, 200), mean_per_class_recall(truth, right)
    assert grouped.value == pytest.approx(plain.value) and grouped.error == pytest.approx(plain.error, rel=0.12)
    assert per_class_statistic(truth, right)(np.ones((1, 200)))[0] == pytest.approx(plain.value)
    confidence = rng.random(200)

    def ece(rows: np.ndarray) -> float:
        bins = np.clip(np.ceil(confidence[rows] * 15), 1, 15)
        gaps = [abs((right[rows] - confidence[rows])[bins == part].sum()) for part in range(1, 16)]
        return sum(gaps) / len(rows)

    plain = Metric.bootstrap(ece, 200)
    grouped = Metric.resampled(calibration_statistic(confidence, right), np.ones(200, int))
    assert grouped.value == pytest.approx(plain.value) and grouped.error == pytest.approx(plain.error, rel=0.12)
    assert Metric.ratio([]).n == 0 and np.isnan(Metric.ratio([1.0]).error) and Metric.ratio([1, 1]).error == 0


def test_calibration_is_that_of_the_classifier() -> None:
    calibration = pytest.importorskip("mm.evaluation.calibration")
    import torch

    probabilities = torch.rand(500, 7, generator=torch.Generator().manual_seed(0)).softmax(1)
    truth = torch.arange(500) % 7
    confidence, guess = probabilities.max(1)
    found = calibration_statistic(confidence.numpy(), (guess == truth).numpy())(np.ones((1, 500)))[0]
    assert found == pytest.approx(calibration.expected_calibration_error(probabilities, truth), abs=1e-9)


def test_a_confusion_of_very_many_classes_shows_those_that_occur_most() -> None:
    truth = np.concatenate([np.arange(100), np.full(9, 99), [3, 3]])
    found = confusion(truth, np.where(truth == 99, 3, truth), [f"c{number}" for number in range(100)])
    assert len(found["labels"]) == 60 and found["labels"][-1] == "c99" and found["left_out"] == 40
    assert found["counts"][-1][found["labels"].index("c3")] == 10 and sum(map(sum, found["counts"])) == 71


def test_a_cut_shard_is_refused_and_not_measured_in_part(clip: str, openmoji_shards: Path, tmp_path: Path) -> None:
    whole = next(iter(sorted(openmoji_shards.glob("val-*.tar"))))
    (tmp_path / "val-000000.tar").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"val-000000.tar: cut at byte \d+.*mm shards verify"):
        evaluate(clip, data=str(tmp_path / "val-000000.tar"), tasks=["zero_shot"], load=elsewhere, progress=False)
