"""`mm classify` and tools/classify.py: files, folders, lists on stdin and shards in; lines, JSON and tables out."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from random_model import load_random, pictures, tiny

import mm
from mm.api import LoadedModel
from mm.cli import main
from mm.evaluation import picture_files
from tars import END, member, sample

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def loaded(root: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_random(tmp_path_factory.mktemp("runs") / "tiny", tiny(root))


@pytest.fixture
def model(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.setattr(mm, "load", lambda source: loaded)
    return loaded


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mm, "load", load)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures at two depths, and what is none."""
    place = tmp_path / "photos"
    (place / "more").mkdir(parents=True)
    (place / ".hidden").mkdir()
    for number, picture in enumerate(pictures(5, 50)):
        picture.save(place / ("more" if number > 2 else "") / f"{number}.png")
    pictures(1)[0].save(place / ".hidden" / "9.png")
    (place / "notes.txt").write_text("not a picture")
    return place


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


def refused(capsys: Capture, *argv: str) -> str:
    assert main(["classify", "r", *argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("mm: error: ")
    return shown.err


def expected(model: LoadedModel, paths: list[Path], labels: list[str], k: int) -> list[Any]:
    """Each picture by itself, through the Python API."""
    classify, found = model.classifier(labels), []
    for path in paths:
        with Image.open(path) as picture:
            top = [{"label": label, "probability": share} for label, share in classify.top(picture, k)]
        found.append({"image": str(path), "top": top})
    return found


def test_a_folder_is_all_its_pictures_by_name(model: LoadedModel, folder: Path, capsys: Capture) -> None:
    paths = [*(folder / f"{n}.png" for n in range(3)), *(folder / "more" / f"{n}.png" for n in (3, 4))]
    assert main(["classify", "r", str(folder), "--labels", "cat,dog,cow", "--top", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected(model, paths, ["cat", "dog", "cow"], 2)


def test_opened_some_at_a_time_by_threads_the_answers_are_the_same(
    model: LoadedModel, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for batch, workers in ((32, "0"), (2, "0"), (2, "3")):
        monkeypatch.setattr(picture_files, "BATCH", batch)
        assert main(["classify", "r", str(folder), "--labels", "cat,dog", "--json", "--workers", workers]) == 0
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 1


def test_paths_on_stdin_are_answered_a_line_each(
    model: LoadedModel, folder: Path, capsys: Capture, stdin: Callable[[str], None]
) -> None:
    paths = [folder / "2.png", folder / "more" / "3.png"]
    stdin(f"{paths[0]}\n\n{paths[1]}\r\n")
    assert main(["classify", "r", "-", "--labels", "cat,dog", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected(
        model, paths, ["cat", "dog"], 2
    )


def test_labels_with_commas_on_stdin_and_templates_in_a_file(
    model: LoadedModel, folder: Path, tmp_path: Path, capsys: Capture, stdin: Callable[[str], None]
) -> None:
    stdin("cat, sitting\ndog\n")
    (tmp_path / "templates.txt").write_text("an emoji of {}\n{}, drawn\n")
    words = ["--labels-file", "-", "--templates", str(tmp_path / "templates.txt")]
    assert main(["classify", "r", str(folder / "0.png"), *words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    with Image.open(folder / "0.png") as picture:
        classify = model.classifier(["cat, sitting", "dog"], ["an emoji of {}", "{}, drawn"])
        assert [(one["label"], one["probability"]) for one in found["top"]] == classify.top(picture)


def test_names_of_sets_temperature_and_cache_are_handed_on(
    model: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    asked: list[Any] = []
    real = model.classifier
    monkeypatch.setattr(model, "classifier", lambda labels, **more: asked.append((labels, more)) or real(["a", "b"]))
    picture = str(folder / "0.png")
    assert main(["classify", "r", picture, "--labels-from", "imagenet", "--templates", "simple"]) == 0
    assert asked.pop() == ("imagenet", {"templates": "simple", "cache": True, "progress": False})
    words = ["--labels", "a,b", "--temperature", "2.5", "--cache", "--mode", "hybrid"]
    words += ["--option", "draws=8", "--option", "fuse=mean", "--option", "weight=0.5"]
    assert main(["classify", "r", picture, *words]) == 0
    assert asked.pop()[1] == {
        "temperature": 2.5,
        "cache": True,
        "mode": "hybrid",
        "progress": False,
        "draws": 8,
        "fuse": "mean",
        "weight": 0.5,
    }
    assert main(["classify", "r", picture, "--labels-from", "imagenet", "--no-cache"]) == 0
    assert asked.pop() == ("imagenet", {"progress": False})


def test_a_bad_picture_stops_the_job_before_a_model_is_loaded(
    unloadable: None, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (folder / "more" / "bad.png").write_bytes(b"no picture")
    out = tmp_path / "out.jsonl"
    assert "bad.png" in refused(capsys, str(folder), "--labels", "a,b", "--out", str(out))
    assert not list(tmp_path.glob("*out*"))


def test_bad_pictures_are_told_and_left_out_where_asked(model: LoadedModel, folder: Path, capsys: Capture) -> None:
    (folder / "1.png").write_bytes(b"no picture")
    missing = str(folder / "missing.png")
    argv = ["classify", "r", str(folder), missing, "--labels", "cat,dog", "--errors", "skip"]
    assert main(argv) == 1
    shown = capsys.readouterr()
    assert [Path(line.partition(":")[0]).name for line in shown.out.splitlines()] == [
        "0.png",
        "2.png",
        "3.png",
        "4.png",
    ]
    first, second, last = shown.err.splitlines()
    assert first == f"mm: {folder / '1.png'}: not an image that Pillow can read"
    assert second == f"mm: {missing}: No such file or directory"
    assert last == "mm: 2 of 6 images could not be used"


def test_a_bad_picture_on_stdin_stops_with_whole_lines_only(
    model: LoadedModel, folder: Path, capsys: Capture, stdin: Callable[[str], None], tmp_path: Path
) -> None:
    stdin(f"{folder / '0.png'}\n{folder / 'notes.txt'}\n")
    assert main(["classify", "r", "-", "--labels", "cat,dog", "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "notes.txt: not an image" in shown.err
    stdin(f"{folder / '0.png'}\n{folder / 'notes.txt'}\n")
    assert main(["classify", "r", "-", "--labels", "cat,dog", "--out", str(tmp_path / "o.csv")]) == 2
    assert not list(tmp_path.glob("o.csv*"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    bad = member("bad.png", b"no picture") + member("bad.txt", b"text")
    path = tmp_path / "val-0.tar"
    path.write_bytes(b"".join(sample(f"k{number}", number) for number in range(3)) + bad + sample("last", 9) + END)
    return path


def test_shards_are_answered_a_line_a_sample(model: LoadedModel, shards: Path, capsys: Capture) -> None:
    words = ["--shards", str(shards), "--labels", "cat,dog", "--captions", "txt", "--top", "1"]
    assert main(["classify", "r", *words, "--errors", "skip", "--json"]) == 1
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [line["key"] for line in lines] == ["k0", "k1", "k2", "last"]
    assert {line["shard"] for line in lines} == {str(shards)} and lines[3]["captions"] == ["text 9"]
    assert f"{shards}: bad: " in shown.err and "1 of 5 images" in shown.err
    assert main(["classify", "r", *words, "--limit", "2"]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert main(["classify", "r", *words]) == 2
    assert "bad: not a JPEG, PNG or WebP image" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_what_is_written_is_what_is_printed(
    model: LoadedModel, shards: Path, tmp_path: Path, capsys: Capture, kind: str
) -> None:
    words = ["--shards", str(shards), "--labels", "cat,dog,cow", "--captions", "txt", "--top", "2", "--limit", "3"]
    assert main(["classify", "r", *words, "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    out = tmp_path / "new" / f"out{kind}"
    assert main(["classify", "r", *words, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 3 images\n" and list(out.parent.iterdir()) == [out]
    if kind == ".jsonl":
        assert [json.loads(line) for line in out.read_text().splitlines()] == printed
        return
    if kind == ".csv":
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
        tops = [[(row[f"label_{n}"], float(row[f"probability_{n}"])) for n in (1, 2)] for row in rows]
        captions = [json.loads(row["captions"]) for row in rows]
    else:
        import pyarrow.parquet as parquet

        rows = parquet.read_table(out).to_pylist()
        tops = [list(zip(row["labels"], row["probabilities"], strict=True)) for row in rows]
        captions = [row["captions"] for row in rows]
    assert tops == [[(one["label"], one["probability"]) for one in line["top"]] for line in printed]
    for name in ("key", "shard"):
        assert [row[name] for row in rows] == [line[name] for line in printed]
    assert captions == [line["captions"] for line in printed]


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("failure", [ValueError("half way"), KeyboardInterrupt()])
def test_a_job_that_ends_early_leaves_the_old_file(
    model: LoadedModel, shards: Path, tmp_path: Path, kind: str, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / f"out{kind}"
    out.parent.mkdir()
    out.write_text("old")
    from mm.evaluation import labelling

    real = labelling.each

    def cut(source: Any, **more: Any) -> Any:
        for number, prediction in enumerate(real(source, **more)):
            yield prediction
            if number == 1:
                assert list(out.parent.glob(f".out{kind}.*.part"))
                raise failure

    monkeypatch.setattr(labelling, "each", cut)
    words = ["--shards", str(shards), "--labels", "cat,dog", "--out", str(out), "--errors", "skip"]
    assert main(["classify", "r", *words]) == (130 if isinstance(failure, KeyboardInterrupt) else 2)
    assert out.read_text() == "old" and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--labels a,b", "as IMAGE... or as --shards"),
        ("P --shards S --labels a,b", "as IMAGE... or as --shards"),
        ("P", "--labels-from imagenet"),
        ("P --labels a --labels-from imagenet", "once"),
        ("P --labels-from imagnet", "did you mean imagenet"),
        ("P --labels-from ./labels.txt", "--labels-file reads a file"),
        ("P --labels-file missing.txt", "missing.txt"),
        ("P --labels-file PNG", "not UTF-8 text"),
        ("P --labels a,b,a", "labels[2] = 'a': is labels[0] again"),
        ("P --labels ,,", "no label in it"),
        ("P --labels a --templates opanai", "openai, simple, or a file"),
        ("P --labels a --templates PNG", "not UTF-8 text"),
        ("P --labels a --templates LABELS", "has no {} where the label goes"),
        ("P --labels a --templates simple --template x{}", "as --template or as --templates"),
        ("P --labels a --top 0", "--top: 0"),
        ("P --labels a --temperature nan", "--temperature: nan"),
        ("P --labels a --temperature 0", "--temperature: 0"),
        ("P --labels a --mode magic", "--mode"),
        ("P --labels a --option draws=8", "--option draws=8: is for --mode diffusion or hybrid"),
        ("P --labels a --mode hybrid --option draws", "must be NAME=VALUE"),
        ("P --labels a --errors ignore", "--errors"),
        ("P --labels a --workers -1", "--workers"),
        ("P --labels a --limit 3", "--limit: is for --shards"),
        ("P --labels a --captions txt", "--captions: is for --shards"),
        ("P --labels a --out x.png", "x.png: predictions are written as .jsonl, .csv, .parquet"),
        ("P --labels a --out x", "predictions are written as"),
        ("P --labels a --json --out x.jsonl", "--json: prints, and --out writes"),
        ("P --labels a --summary .", "is a folder"),
        ("P - --labels a", "give it alone"),
        ("- --labels-file -", "stdin holds either"),
        ("EMPTY --labels a", "no picture in this folder"),
        ("missing.png --labels a", "missing.png: No such file"),
        ("LABELS --labels a", "not an image"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_loads_no_model(
    unloadable: None, tmp_path: Path, folder: Path, capsys: Capture, argv: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    there = {
        "P": folder / "0.png",
        "PNG": folder / "0.png",
        "EMPTY": tmp_path / "empty",
        "LABELS": tmp_path / "labels.txt",
    }
    assert words in refused(capsys, *(str(there.get(word, word)) for word in argv.split()))


def test_shards_that_are_not_there_are_refused(model: LoadedModel, tmp_path: Path, capsys: Capture) -> None:
    assert "no shard at" in refused(capsys, "--shards", str(tmp_path / "x-*.tar"), "--labels", "a")


def test_the_script_writes_a_folder(
    model: LoadedModel, root: Path, folder: Path, tmp_path: Path, capsys: Capture, stdin: Callable[[str], None]
) -> None:
    spec = importlib.util.spec_from_file_location("tools_classify", root / "tools" / "classify.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    labels, out = tmp_path / "labels.txt", tmp_path / "out"
    labels.write_text("cat, sitting\ndog\n")
    (folder / "1.png").write_bytes(b"no picture")
    assert script.run(["r", str(labels), str(out), str(folder), "--temperature", "2"]) == 1
    assert sorted(path.name for path in out.iterdir()) == ["predictions.jsonl", "summary.json"]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["images"], summary["lost"], summary["temperature"]) == (4, 1, 2.0) and len(lines) == 4
    assert sum(summary["labels"].values()) == 4 and summary["labels"].keys() <= {"cat, sitting", "dog"}
    assert summary["reasons"] == [{"image": str(folder / "1.png"), "reason": "not an image that Pillow can read"}]
    assert summary["mean_confidence"] == pytest.approx(sum(line["top"][0]["probability"] for line in lines) / 4)
    stdin(f"{folder / '0.png'}\n")
    assert script.run(["r", str(labels), str(tmp_path / "piped")]) == 0
    assert json.loads((tmp_path / "piped" / "predictions.jsonl").read_text())["image"] == str(folder / "0.png")
    with pytest.raises(ValueError, match="begin with RUN LABELS OUT"):
        script.run(["r", "--labels", "cat"])
    with pytest.raises(ValueError, match="unknown flag --temprature"):
        script.run(["r", str(labels), str(tmp_path / "never"), "--temprature", "2"])
    assert not (tmp_path / "never").exists()
