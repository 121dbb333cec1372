"""`mm report` puts what a run folder holds and what its model does on one page, whatever lies in it."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import Page, result, write_run

from mm.adapters.text import train_tokenizer
from mm.cli import main
from mm.evaluation.confusion import checked, heatmap, pairs_of, pairs_table
from mm.evaluation.report_run import write_run_report
from mm.models.export import save_export
from mm.objectives.step import build_step
from mm.settings import load as load_config
from mm.settings import save

HOSTILE = '<script>alert("1")</script>'


def task(name: str, metrics: dict[str, Any], detail: Any, **more: Any) -> dict[str, Any]:
    errors = dict.fromkeys(metrics, 0.0123)
    row = {"name": name, "kind": name, "task": name, "dataset": HOSTILE, "metrics": metrics, "errors": errors}
    return row | {"n": dict.fromkeys(metrics, 42), "detail": detail} | more


def tasks() -> list[dict[str, Any]]:
    confusion = {"labels": ["cat", HOSTILE, "dog"], "counts": [[7, 3, 0], [0, 5, 0], [1, 0, 9]], "left_out": 0}
    curve = {"sigma": [0.25, 0.5, 0.75], "curve": [1.0, 0.5, 0.25], "unconditional_curve": [1.0, 0.75, None]}
    table = {"severities": [1, 5], "table": {"glass_blur": [0.5, 0.125], HOSTILE: [0.4, None]}}
    return [
        task("classification", {"acc1": 0.84, "ece": None}, {"confusion": confusion}),
        task("denoising", {f"loss@{n}": n / 16 for n in range(16)}, curve),
        task("robustness", {"acc1": 0.9}, table),
    ]


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def read(path: Path) -> Page:
    source = path.read_text(encoding="utf-8")
    page = Page(source.replace("<rect", "<g").replace("</rect>", "</g>"))
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")], "needs something else, or runs it"
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(', source)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    names = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(names)) == len(names)
    assert {str(attrs["href"])[1:] for tag, attrs in page.tags if tag == "a"} <= set(names)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg")
    for svg in re.findall(r"<svg.*?</svg>", source):
        ElementTree.fromstring(svg)
    return page


def test_everything_in_a_run_folder_is_on_one_page(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "config.json").unlink()
    old = result(0, 0.6612) | {"samples": [{"key": "a", "caption": "cat", "all_names": ["dog"]}]}
    write(tmp_path, "evaluation.json", old)
    new = result(0, 0.5) | {"tasks": tasks(), "data": [HOSTILE], "commit": HOSTILE}
    for part in ("zero_shot", "generation", "retrieval"):
        del new[part]
    write(tmp_path, "tasks.json", new)
    write(tmp_path, "results.json", {"results": [old], "seconds": {"training": 475.0}, "machine": {"cores": HOSTILE}})
    write(tmp_path, "broken.json", "{")
    write(tmp_path, "other.json", {"a": 1})
    left_out = write_run_report(tmp_path, tmp_path / "x" / "report.html")
    assert [line.split(":")[0] for line in left_out] == ["broken.json"]
    page = read(tmp_path / "x" / "report.html")
    for words in (
        *("66.1 %", "± 3.0 standard error, n = 215", "Contrastive loss", "7 min 55 s", "broken.json: not read"),
        *("84.0", "± 1.2 standard error, n = 42", "0.84 ± 0.012 42", "ece – ± 0.012"),
        *(f"cat taken for {HOSTILE}: 3 of 10", f"cat {HOSTILE} 3 of 10", "dog: 9 of 10 right"),
        *("with the caption", "without a caption", "glass blur 50.0 12.5", "clean 90.0 %", "16 numbers"),
    ):
        assert words in page.text, words
    assert "nan" not in page.text.lower().replace("finance", "") and "None" not in page.text
    assert page.text.count("evaluation.json") == 1, "the same result in two files is shown once"
    headings = Counter(tag for tag, _ in page.tags)
    assert headings["section"] == 6 and headings["nav"] == 1


def test_wrong_names_are_listed_where_there_is_no_confusion_matrix(tmp_path: Path) -> None:
    samples = [("cat", "dog"), ("fox", "dog"), ("dog", "dog"), (HOSTILE, "cat")]
    found = [{"key": str(n), "caption": true, "all_names": [guess]} for n, (true, guess) in enumerate(samples)]
    write(tmp_path, "a.json", result(0, 0.5) | {"samples": found})
    write_run_report(tmp_path, tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert "3 of 4 pictures were given another's name" in page.text
    assert "dog cat, fox 2" in page.text and f"cat {HOSTILE} 1" in page.text


@pytest.mark.parametrize(
    "detail",
    [
        *(None, [], {"confusion": 3}, {"confusion": {"labels": ["a"], "counts": [[1, 2]]}}),
        *({"confusion": {"labels": ["a"], "counts": [["x"]]}}, {"confusion": {"labels": [], "counts": []}}),
        *({"sigma": 3, "curve": "x", "severities": 1, "table": {"a": 2}}, {"severities": [1], "table": {"a": ["x"]}}),
    ],
)
def test_a_detail_of_another_shape_is_left_out_and_nothing_else(tmp_path: Path, detail: Any) -> None:
    rows = [task(name, {"acc1": 0.5}, detail) for name in ("classification", "denoising", "robustness")]
    rows += [3, {"metrics": 4}, task("x", {"acc1": "high"}, detail, errors=None, n=7)]  # type: ignore[list-item]
    write(tmp_path, "a.json", {"versions": {}, "seed": 0, "step": 3, "tasks": rows})
    write_run_report(tmp_path, tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert "All numbers" in page.text and "taken for" not in page.text


def test_a_heatmap_shows_the_classes_that_have_most_samples() -> None:
    labels = [f"class {n}" for n in range(70)]
    counts = [[0] * 70 for _ in range(70)]
    for n in range(70):
        counts[n][n] = n
    counts[69][68] = 5
    drawn = heatmap(labels, counts, title='a "matrix"')
    svg = ElementTree.fromstring(drawn.removeprefix('<div class="heat">').removesuffix("</div>"))
    titles = [node.text for node in svg.iter("title")]
    assert len(titles) == 61 and "class 69 taken for class 68: 5 of 74" in titles
    assert "class 10: 10 of 10 right" in titles and not any("class 9:" in str(title) for title in titles)
    assert pairs_of(labels, counts) == {("class 69", "class 68"): 5}
    assert "5 of 74" in pairs_table(pairs_of(labels, counts), {"class 69": 74})
    assert checked({"labels": ["a", "b"], "counts": [[1, 0], [0, 1]]}) == (["a", "b"], [[1, 0], [0, 1]])


@pytest.fixture(scope="module")
def run(root: Path, openmoji_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in a run folder, with a shard of 12 pictures, one of which has a hostile caption."""
    folder, config = tmp_path_factory.mktemp("runs") / "tiny", load_config(root / "configs" / "debug.py")
    torch.manual_seed(0)
    step = build_step(config, train_tokenizer(["red heart", "a flag"] * 9, config.model.text.vocab_size))
    save_export(folder / "export", step.state_dict(), config, step.model.tokenizer.to_json(), {"step": "7"})
    write_run(folder)
    with tarfile.open(next(openmoji_shards.glob("val-*.tar"))) as tar, tarfile.open(folder / "val-0.tar", "w") as out:
        members = tar.getmembers()
        keys = list(dict.fromkeys(member.name.split(".")[0] for member in members))[:12]
        for member in members:
            if member.name.split(".")[0] in keys:
                data = tar.extractfile(member)
                if member.name == f"{keys[0]}.txt":
                    write(folder, "caption", HOSTILE)
                    member.size, data = len(HOSTILE), open(folder / "caption", "rb")  # noqa: SIM115
                out.addfile(member, data)
    config.data.val = str(folder / "val-*.tar")
    save(config, folder / "config.json")
    return folder


def test_the_command_draws_and_finds_with_the_runs_own_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--draw", "2"]) == 0
    printed = capsys.readouterr().out
    assert "report.html" in printed and "left out: numbers: no results" in printed
    page = read(run / "report.html")
    for words in ("Drawn from captions", "Pictures found by captions", "Captions found by pictures", "million param"):
        assert words in page.text, words
    assert HOSTILE in page.text and page.text.count("✓") >= 2
    images = [str(attrs.get("class")) for tag, attrs in page.tags if tag == "img"]
    assert images.count("drawn") == images.count("reference") == 2
    assert len(images) == 2 * 2 + 8 * 5 + 8, "two drawn beside the real, five pictures a caption, and a picture each"


def test_a_run_without_model_or_shards_is_still_reported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("export", "val-*"))
    assert main(["report", str(bare), "--out", str(tmp_path / "a.html")]) == 0
    assert "the run has no export/ yet" in capsys.readouterr().out
    write(bare, "config.json", (bare / "config.json").read_text().replace("val-*.tar", "gone-*.tar"))
    assert main(["report", str(bare), "--out", str(tmp_path / "a.html")]) == 0
    assert "is not there any more; --data SHARDS says where it is" in capsys.readouterr().out
    assert "Left out" in read(tmp_path / "a.html").text


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nowhere"], "nowhere: no such run folder"),
        (["RUN", "--out", "x.pdf"], "end its name in .html"),
        (["RUN", "--data", "nothing-*.tar"], "no shard at"),
        (["RUN", "--draw", "-1"], "must be an int at least 0"),
        (["EMPTY"], "nothing to report"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused_in_one_line(
    run: Path, tmp_path: Path, words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *(word.replace("RUN", str(run)).replace("EMPTY", str(tmp_path)) for word in words)]) == 2
    printed = capsys.readouterr().err
    assert error in printed and printed.count("\n") == 1
