"""A linear probe finds what is there and nothing else, and never looks at the test pictures to choose anything."""

from __future__ import annotations

import io
import tomllib
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import tars
from mm.adapters.text import train_tokenizer
from mm.config import ConfigError
from mm.evaluation import samples
from mm.evaluation.inference import Inference
from mm.evaluation.job import Job
from mm.evaluation.labels import Label, ordered, read_label
from mm.evaluation.outcome import Outcome
from mm.evaluation.probe import checked, probe, training_files
from mm.evaluation.regression import choose, few, linear_probe, part
from mm.evaluation.robustness import _guesses, _zero_shot, measured, robustness
from mm.evaluation.robustness import checked as checked_robustness
from mm.objectives.step import build_step
from mm.settings import load as load_config

COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


def blobs(count: int, classes: int, distance: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, 24))
    truth = rng.integers(0, classes, count)
    return (distance * centres[truth] + rng.standard_normal((count, 24))).astype(np.float32), truth


@pytest.fixture(scope="module")
def inference(root: Path) -> Inference:
    torch.manual_seed(0)
    config = load_config(root / "configs" / "debug.py")
    step = build_step(config, train_tokenizer(COLOURS * 4, config.model.text.vocab_size))
    return Inference(step.model.eval(), config, {})


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP_benchmark's layout: train/0.tar, train/1.tar and test/0.tar of coloured pictures with `cls`, and names.

    One test sample has no class, and one picture is damaged.
    """
    folder = tmp_path_factory.mktemp("wds")
    rng = np.random.default_rng(0)

    def shard(path: Path, count: int, more: bytes = b"") -> None:
        data = b""
        for number in range(count):
            kind = number % len(COLOURS)
            base = np.array(Image.new("RGB", (1, 1), COLOURS[kind])).astype(int)
            pixels = np.clip(base + rng.normal(0, 25, (40, 40, 3)), 0, 255).astype(np.uint8)
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            data += tars.member(f"s{number:07}.cls", str(kind).encode())
            data += tars.member(f"s{number:07}.png", stream.getvalue())
            data += tars.member(
                f"s{number:07}.json", b'{"kind": {"warm": %s}}' % (b"true" if kind in (0, 3) else b"false")
            )
            data += tars.member(f"s{number:07}.txt", f"a {COLOURS[kind]} picture".encode())
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data + more + tars.END)

    shard(folder / "train" / "0.tar", 30)
    shard(folder / "train" / "1.tar", 30)
    bad = tars.member("x1.png", tars.png()) + tars.member("x2.cls", b"1") + tars.member("x2.png", b"\x89PNG broken")
    shard(folder / "test" / "0.tar", 24, bad)
    (folder / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} picture\n{c}\n")
    return folder


def job(inference: Inference, data: Path) -> Job:
    files, reference = samples.around(str(data), None)
    return Job(inference, files=files, reference=reference)


def run(inference: Inference, data: Path, **settings: Any) -> Outcome:
    return probe(job(inference, data), settings)


@pytest.mark.parametrize("classes", [2, 5])
def test_separable_features_are_told_apart_and_shuffled_labels_are_not(classes: int) -> None:
    train, known = blobs(300, classes, 4.0)
    test, truth = blobs(500, classes, 4.0, seed=1)
    assert (linear_probe(train, known, test).scores.argmax(1) == truth).mean() == 1.0
    shuffled = np.random.default_rng(2).permutation(known)
    chance = (linear_probe(train, shuffled, test).scores.argmax(1) == truth).mean()
    assert abs(chance - 1 / classes) < 0.15


@pytest.mark.parametrize("classes", [2, 4])
def test_the_fit_is_scikit_learns_at_the_strength_that_was_chosen(classes: int) -> None:
    train, known = blobs(200, classes, 0.7)
    test, truth = blobs(300, classes, 0.7, seed=1)
    fit = linear_probe(train, known, test)
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=fit.c, max_iter=1000, tol=1e-8)).fit(train, known)
    assert (plain.predict(test) == fit.scores.argmax(1)).mean() > 0.99
    away = part(known, 0.2, 0)
    for c, share in fit.curve.items():
        again = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(train[~away], known[~away])
        assert again.score(train[away], known[away]) == pytest.approx(share, abs=1.5 / away.sum())
    assert fit.curve[fit.c] == max(fit.curve.values()) and fit.validation == away.sum() and fit.converged
    assert len(fit.curve) == 7 + 2 * 4 - sum(abs(np.log10(fit.c)) == 6 for _ in range(4))
    assert 0.3 < (fit.scores.argmax(1) == truth).mean() < 1, "too easy to say anything"


def test_strengths_are_halved_around_the_best_to_eight_a_decade() -> None:
    train, known = blobs(200, 4, 0.7)
    c, curve, _ = choose(train, known)
    exponents = np.round(np.log10(sorted(curve)), 6)
    assert set(range(-6, 7, 2)) <= set(exponents.tolist())
    near = exponents[np.abs(exponents - np.log10(c)) < 0.13]
    assert len(near) == 3 and np.allclose(np.diff(near), 0.125)


def test_nothing_is_chosen_or_scaled_with_test_pictures() -> None:
    train, known = blobs(150, 3, 0.7)
    test, _ = blobs(60, 3, 0.7, seed=1)
    fit, other = linear_probe(train, known, test), linear_probe(train, known, 50 * test[::-1] + 3)
    assert fit.c == other.c and fit.curve == other.curve
    alone = linear_probe(train, known, test[:1])
    assert np.allclose(alone.scores[0], fit.scores[0], atol=1e-9)


def test_the_validation_part_is_of_every_class_and_leaves_some_of_each() -> None:
    classes = np.repeat([0, 1, 2, 3], [50, 3, 2, 1])
    away = part(classes, 0.2, 0)
    assert [int(away[classes == one].sum()) for one in range(4)] == [10, 1, 1, 0]
    assert np.array_equal(away, part(classes, 0.2, 0)) and not np.array_equal(away, part(classes, 0.2, 1))
    assert [int((classes[few(classes, 2, 0)] == one).sum()) for one in range(4)] == [2, 2, 2, 1]
    with pytest.raises(ConfigError, match="no class has two training pictures"):
        choose(np.zeros((3, 2), np.float32), np.arange(3))
    with pytest.raises(ConfigError, match="of one class"):
        linear_probe(np.zeros((3, 2), np.float32), np.zeros(3, int), np.zeros((1, 2)))


def test_clip_benchmarks_shards_are_probed_as_they_are(inference: Inference, clips: Path) -> None:
    found = run(inference, clips / "test")
    assert found.metrics["acc1"].n == 24 and found.metrics["acc1"].value > 0.9
    assert found.metrics["acc5"].value >= found.metrics["acc1"].value
    assert found.detail["training_pictures"] == 60 and found.detail["classes"] == 6
    assert found.detail["unusable"] == 2 and found.detail["unusable_training"] == 0
    right = np.mean([record["truth"] == record["guess"] for record in found.records])
    assert right == found.metrics["acc1"].value == np.mean([record["acc1"] for record in found.records])
    again = run(inference, clips / "test")
    assert again == found, "not the same twice"
    assert run(inference, clips / "test", features="tokens").metrics["acc1"].value > 0.9


def test_shards_without_the_label_are_said_to_lack_it(inference: Inference, openmoji_shards: Path) -> None:
    with pytest.raises(ConfigError, match="label = 'cls': .*no cls beside.*name a label"):
        run(inference, openmoji_shards / "val-000000.tar", train=str(openmoji_shards / "train-000000.tar"))


def test_few_shots_read_only_so_many_pictures_of_each_class(inference: Inference, clips: Path) -> None:
    found = run(inference, clips / "test", shots=3, c=1.0)
    assert found.detail["training_pictures"] == 18 and found.detail["c"] == 1.0
    assert found.detail["validation_pictures"] == 0 and found.metrics["acc1"].value > 0.8


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        ("json.kind.warm", {"True", "False"}),
        ("caption:red|blue", {"red", "blue", "(none)"}),
        (r"caption:a (\w+)", set(COLOURS)),
    ],
)
def test_classes_come_from_json_and_captions_too(
    inference: Inference, clips: Path, label: str, classes: set[str]
) -> None:
    found = run(inference, clips / "test", label=label, c=10.0)
    assert {record["truth"] for record in found.records} == classes
    assert found.metrics["acc1"].value > 0.8


def test_recall_and_its_error_are_those_of_scikit_learn_and_of_draws(inference: Inference, clips: Path) -> None:
    from sklearn.metrics import balanced_accuracy_score

    found = run(inference, clips / "test", label="caption:red|blue", c=1e-5)
    truth, guess = ([record[name] for record in found.records] for name in ("truth", "guess"))
    assert found.metrics["mean_per_class_recall"].value == pytest.approx(balanced_accuracy_score(truth, guess))


def test_training_shards_are_found_and_never_the_held_out_ones(clips: Path, openmoji_shards: Path) -> None:
    held_out, reference = samples.around(str(clips / "test"), None)
    assert [Path(file).parent.name for file in training_files(held_out, reference)] == ["train", "train"]
    held_out, reference = samples.around(str(openmoji_shards / "val-*.tar"), None)
    files = training_files(held_out, reference)
    assert files and all(Path(file).name.startswith("train-") for file in files)
    with pytest.raises(ConfigError, match="is held out too"):
        training_files(held_out, reference, str(openmoji_shards / "val-*.tar"))
    held_out, reference = samples.around(str(clips / "train"), None)
    with pytest.raises(ConfigError, match="name training shards"):
        training_files(held_out, reference)


@pytest.mark.parametrize(
    "spec",
    ["", "json", "json.", "json.a..b", "txt", "cls:a", "caption:", "caption:(", "caption:" + "a" * 300, "json.a:b"],
)
def test_labels_that_cannot_be_read_are_one_line(spec: str) -> None:
    with pytest.raises(ValueError, match="^label = ") as raised:
        Label(spec)
    assert "\n" not in str(raised.value)


def test_a_label_is_bounded_text_whatever_a_shard_holds() -> None:
    assert Label("cls")([], {"cls": b" 12\n"}) == "12"
    assert Label("cls")([], {"cls": b"007"}) == "7"
    assert Label("json.a.b")([], {"json": b'{"a": {"b": 3}}'}) == "3"
    assert Label(r"caption:^(\w+)?")(["-"], {}) == "(none)"
    assert ordered(["10", "9", "b", "a", "9"]) == ["9", "10", "a", "b"]
    for label, data in (
        ("cls", b""),
        ("cls", b"\xff"),
        ("cls", b"x" * 1000),
        ("json.a", b"[" * 100_000),
        ("json.a", b'{"a": [1]}'),
        ("json.a", b'{"a": null}'),
        ("json.a", b"5"),
    ):
        with pytest.raises(ValueError):
            Label(label)([], {label.split(".")[0]: data})


@pytest.mark.parametrize(
    "setting",
    [
        {"features": "pixels"},
        {"shots": -1},
        {"shots": True},
        {"shots": 1.5},
        {"validation": 1.0},
        {"validation": float("nan")},
        {"c": -1.0},
        {"iterations": 0},
        {"seed": "1"},
        {"label": "nonsense"},
        {"label": "caption"},
        {"label": ""},
    ],
)
def test_wrong_settings_of_a_probe_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(setting))} = "):
        checked(setting)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"corruptions": ["rain"]}, "corruption 'rain'"),
        ({"corruptions": "fog"}, r"corruptions = 'fog'.*\['fog'\]"),
        ({"severities": [0]}, "severity = 0"),
        ({"severities": []}, "give at least one"),
        ({"severities": [1, 1]}, "each once"),
        ({"limit": -1}, "limit = -1"),
        ({"classes": "nowhere.txt"}, "classes = 'nowhere.txt': no such file"),
        ({"classes": "openai"}, "classes = 'openai': no such file; give shards, imagenet"),
        ({"templates": []}, "templates = .*at least one"),
        ({"label": "json"}, "label = 'json'"),
    ],
)
def test_wrong_settings_of_robustness_are_refused(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        checked_robustness(setting)


def by_colour(job: Job, names: Sequence[str], templates: Sequence[str]) -> Callable[[torch.Tensor], torch.Tensor]:
    """In the place of a model: the name of the colour that is nearest to a picture's mean."""
    assert templates == ["red {}"] or templates == (["{}"] if names[0].startswith("a ") else ["a {} picture", "{}"])
    words = [next((word for word in name.split() if word in COLOURS), "red") for name in names]
    colours = torch.tensor([ImageColor.getrgb(word) for word in words]).float()
    return lambda images: torch.cdist(images.float().mean((2, 3)), colours).argmin(1)


def test_robustness_of_shards_with_classes_and_of_captions(
    inference: Inference, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"corruptions": ["contrast", "brightness"], "severities": [1, 5], "limit": 10}
    robustness(job(inference, clips / "test"), settings)  # a real model, if a bad one
    monkeypatch.setattr("mm.evaluation.robustness._zero_shot", by_colour)
    found = robustness(job(inference, clips / "test"), settings)
    assert found.detail["label"] == "cls" and found.detail["classes"] == 6 and found.detail["unlabelled"] == 1
    table = np.array(list(found.detail["table"].values()))
    assert table.shape == (2, 2)
    metrics = {name: metric.value for name, metric in found.metrics.items()}
    assert metrics["acc1_corrupted"] == pytest.approx(table.mean())
    assert metrics["acc1_severity_5"] == pytest.approx(table[:, 1].mean())
    assert metrics["acc1"] == 1 and 0 < metrics["acc1_brightness"] < 1
    assert metrics["acc1_brightness"] == pytest.approx(table[1].mean())
    assert metrics["acc1_brightness"] == pytest.approx(np.mean([row["acc1_brightness"] for row in found.records]))
    assert found.detail["unusable"] == 1  # the damaged one
    assert len(found.records) == 9 and len({record["truth"] for record in found.records}) > 3, "not spread evenly"
    assert robustness(job(inference, clips / "test"), settings) == found
    named = robustness(job(inference, clips / "test"), settings | {"label": "caption"})
    assert named.detail["label"] == "caption" and named.detail["classes"] == 6  # equal captions are one
    assert named.metrics["acc1"].value == 1
    for name in found.metrics.keys() - {"relative_drop"}:  # so that two results can be compared sample by sample
        assert metrics[name] == pytest.approx(np.mean([row[name] for row in found.records])), name
    warm = settings | {"label": "json.kind.warm", "classes": ["False", "True"], "templates": ["red {}"]}
    assert robustness(job(inference, clips / "test"), warm).detail["classes"] == 2
    assert read_label("", [str(clips / "test" / "0.tar")]).spec == "cls"


def test_robustness_says_which_names_are_missing(inference: Inference, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="classes: '0' is none of the 2 there are"):
        robustness(job(inference, clips / "test"), {"classes": ["red", "green"]})
    with pytest.raises(ConfigError, match=r"label = 'json.colour': no sample of .* has one"):
        robustness(job(inference, clips / "test"), {"label": "json.colour"})
    for data, says in ((b"red\n\nblue\n", "line 2 is blank"), (b"", "line 1 is blank"), (b"\xff", "not UTF-8")):
        (tmp_path / "names").write_bytes(data)  # a name that is left out would shift all others
        with pytest.raises(ValueError, match=says):
            robustness(job(inference, clips / "test"), {"classes": str(tmp_path / "names")})


def test_guesses_are_the_nearest_names_and_of_equal_names_the_first(inference: Inference, clips: Path) -> None:
    names = ["red", "green", "red", "blue"]
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = inference.encode("text", [f"a {name}" for name in names])
    cosines = inference.embed("image", (images,)) @ texts.T
    found = _zero_shot(job(inference, clips / "test"), names, ["a {}"])(images)
    margin = cosines[:, [0, 1, 3]].topk(2, dim=1).values.diff(dim=1).abs()[:, 0] > 1e-5
    assert 2 not in found.tolist() and margin.sum() > 20
    expected = torch.tensor([0, 1, 3])[cosines[:, [0, 1, 3]].argmax(1)]
    assert torch.equal(found[margin], expected[margin]) and len(found.unique()) > 1


def test_what_robustness_reports_is_of_the_outcomes_and_their_draws() -> None:
    rng = np.random.default_rng(0)
    right = np.concatenate([np.ones((400, 1), bool), rng.random((400, 4)) < [0.9, 0.5, 0.8, 0.2]], axis=1)
    found = measured(right, ["a", "b"], [1, 5])
    assert found.metrics["acc1"].value == 1 and found.metrics["acc1"].error == 0
    assert found.metrics["acc1_a"].value == pytest.approx(right[:, 1:3].mean())
    assert found.metrics["acc1_severity_5"].value == pytest.approx(right[:, [2, 4]].mean())
    assert found.metrics["acc1_corrupted"].error == pytest.approx(right[:, 1:].mean(1).std() / 20, rel=0.1)
    assert found.metrics["relative_drop"].value == pytest.approx(1 - right[:, 1:].mean())
    assert found.metrics["relative_drop"].error == pytest.approx(found.metrics["acc1_corrupted"].error, rel=1e-6)
    assert np.isnan(measured(np.ones((1, 5), bool), ["a", "b"], [1, 5]).metrics["acc1"].error)
    assert np.isnan(measured(np.zeros((5, 5), bool), ["a", "b"], [1, 5]).metrics["relative_drop"].value)


def test_a_classifier_that_is_perfect_on_clean_pictures_loses_with_noise() -> None:
    from mm.evaluation.stream import Chunk

    prints = torch.from_numpy(np.random.default_rng(3).integers(116, 141, (40, 3, 16, 16), dtype=np.uint8))

    def nearest(images: torch.Tensor) -> torch.Tensor:
        return torch.cdist(images.flatten(1).float(), prints.flatten(1).float()).argmin(1)

    keys = [str(number) for number in range(40)]
    chunk = Chunk(keys, [""] * 40, prints, [[]] * 40, [{}] * 40)
    guesses = _guesses(chunk, nearest, ["gaussian_noise", "defocus_blur"], [1, 3, 5], 0, lambda done: None)
    found = measured((guesses == torch.arange(40)[:, None]).numpy(), ["gaussian_noise", "defocus_blur"], [1, 3, 5])
    table = found.detail["table"]["gaussian_noise"]
    assert found.metrics["acc1"].value == 1 and table[0] == 1 and table[-1] < 1


@pytest.mark.parametrize("name", ["probe", "robustness"])
def test_the_shipped_task_says_every_setting_with_its_default(name: str, root: Path) -> None:
    module = import_module(f"mm.evaluation.{name}")
    said = tomllib.loads((root / "mm" / "evaluation" / "tasks" / f"{name}.toml").read_text())
    assert {key: said.pop(key) for key in ("name", "kind", "version")} == {"name": name, "kind": name, "version": 1}
    assert said.pop("needs", ["contrastive"]) == ["contrastive"]
    assert said == module.DEFAULTS == module.checked(said)
