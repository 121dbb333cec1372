"""The report is one file that needs no other and says what was measured; the demo makes it and goes on where it was."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mm import demo
from mm.config import ConfigError
from mm.evaluation.charts import line_chart, running_mean, ticks
from mm.evaluation.gallery import Drawing, Gallery, Guess
from mm.evaluation.report import duration, write_report
from mm.evaluation.run import evaluate
from mm.settings import read as read_config

VOID = {"meta", "img", "br", "link", "input", "line", "path"}


class Page(HTMLParser):
    """Text of a page; fails where tags do not close in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def result(seed: int, share: float) -> dict[str, Any]:
    value = {"value": share, "error": 0.03, "n": 215}
    names = {"labels": 215, "top1": value, "top5": value}
    return {
        "seed": seed,
        "step": 120,
        "held_out": 215,
        "candidates": 3954,
        "commit": "0123456789ab",
        "versions": {"torch": "2.9.1"},
        "zero_shot": {"held_out_names": names, "all_names": names},
        "generation": {"train": value, "held_out": value},
        "retrieval": {"pairs": 215, "image_to_text@1": share},
        "samples": [],
    }


def write_run(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": n, "loss/contrastive": 3 / n, "loss/diffusion": 1 / n, "mfu": 0.4} for n in range(1, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 39}]))
    (folder / "config.json").write_text('{"version": 1, "note": "<b>"}')


def pictures() -> Gallery:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    return Gallery(
        [Drawing("<script>alert(1)</script>", red, blue, True), Drawing("key", red, None, False)],
        [Guess(red, "ATM & sign", ["key", "ATM & sign"]), Guess(blue, "watch", ["key", "door"])],
    )


def test_a_report_is_one_file_that_says_what_was_measured(tmp_path: Path) -> None:
    write_run(tmp_path)
    results, machine = [result(0, 0.6612)], {"CPU cores": "2", "bf16 matrix rate": "1,100 GFLOP/s"}
    path = tmp_path / "report.html"
    write_report(tmp_path, results, {"training": 475.0}, path, gallery=pictures(), machine=machine)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    for words in ("66.1 %", "± 3.0 standard error, n = 215", "7 min 55 s", "1,100 GFLOP/s", "CC BY-SA 4.0", "OpenMoji"):
        assert words in page.text, words
    for words in ("commit 0123456789ab", "3,954 emoji", "<script>alert(1)</script>", '"note": "<b>"'):
        assert words in page.text, words
    assert "$" not in page.text and "nan" not in page.text
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")], "needs something else"
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(', source)
    assert len(links) == 5 and all(link.startswith("data:image/png;base64,") for link in links)
    assert page.text.count("✓") == 1 and page.text.count("✗") == 1
    assert str(tmp_path) not in source, "a path of this machine"


def test_several_seeds_are_reported_with_mean_and_spread(tmp_path: Path) -> None:
    for seed in (3, 4, 5):
        write_run(tmp_path / f"seed-{seed}")
    results = [result(3, 0.5), result(4, 0.6), result(5, 0.7)]
    write_report(tmp_path, results, {}, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "60.0 %" in page.text and "± 10.0 over 3 seeds (50.0 to 70.0), n = 215" in page.text
    assert "seeds 3, 4, 5" in page.text
    assert sum(tag == "path" and "line" in str(attrs["class"]) for tag, attrs in page.tags) == 9, "a line a seed"


def test_a_report_of_half_a_result_leaves_the_rest_out(tmp_path: Path) -> None:
    half = {name: value for name, value in result(0, 0.5).items() if name not in ("generation", "retrieval", "commit")}
    write_report(tmp_path, [half], {}, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Drawn from" not in page.text and "Training" not in page.text and "None" not in page.text
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path, [], {}, tmp_path / "report.html")


def test_a_chart_holds_its_line_within_its_frame() -> None:
    points = [(n, 1e6 if n == 0 else 5 + 1 / n) for n in range(1000)]
    chart = line_chart([points], title='a "loss"')
    ElementTree.fromstring(chart)
    numbers = [tuple(map(float, pair.split())) for pair in re.findall(r"[ML](-?[\d.]+ -?[\d.]+)", chart)]
    assert len(numbers) > 500 and all(0 <= x <= 420 and 0 <= y <= 210 for x, y in numbers)
    assert line_chart([[(1, 2.0)]], title="one point") == "" == line_chart([], title="none")
    assert ElementTree.fromstring(line_chart([[(0, 1.0), (1, 1.0), (2, float("nan"))]], title="flat")) is not None
    assert running_mean([(0, 4.0), (1, 4.0), (2, 4.0)], 0.9) == [(0, 4.0), (1, pytest.approx(4)), (2, pytest.approx(4))]
    assert ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1] and ticks(3, 1003, 5) == [200, 400, 600, 800, 1000]
    assert duration(59.94) == "59.9 s" and duration(125) == "2 min 05 s"


@pytest.fixture
def small_demo(root: Path, openmoji_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose shards are already there; the debug config, one thread and few drawings in place of the demo's."""
    text = (root / "configs" / "debug.py").read_text(encoding="utf-8")
    (tmp_path / "small.py").write_text(text.replace("compile=False", "compile=False, threads=1"), encoding="utf-8")
    monkeypatch.setattr(demo, "config_file", lambda: tmp_path / "small.py")
    monkeypatch.setattr("mm.evaluation.run.evaluate", partial(evaluate, limit=4, steps=2, progress=False))
    for name in ("mm.training.prepare.matrix_rate", "mm.training.metrics.matrix_rate"):
        monkeypatch.setattr(name, lambda *_: 1e11)
    shutil.copytree(openmoji_shards, tmp_path / "demo" / "shards")
    return tmp_path / "demo"


def test_the_demo_ends_with_a_report_and_does_not_train_twice(
    small_demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(minutes=0.04, out=str(small_demo)) == 0
    printed = capsys.readouterr().out
    for words in ("already there", "zero-shot top-1, all names", "report.html", "peak memory", "training"):
        assert words in printed, words
    page = Page((small_demo / "report.html").read_text(encoding="utf-8"))
    assert "Contrastive loss" in page.text and "bf16 matrix rate" in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) > 2 * 16
    assert Image.open(small_demo / "grid.png").width > 8 * 96
    first = json.loads((small_demo / "results.json").read_text())
    weights = (small_demo / "export" / "model.safetensors").read_bytes()
    assert demo.main(minutes=0.04, out=str(small_demo)) == 0
    again = json.loads((small_demo / "results.json").read_text())
    assert again["mean"] == first["mean"] and again["seconds"]["training"] == first["seconds"]["training"]
    assert (small_demo / "export" / "model.safetensors").read_bytes() == weights


def test_the_demo_goes_on_from_a_model(small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(minutes=0.02, out=str(small_demo)) == 0
    source = str(small_demo / "export")
    shutil.copytree(small_demo / "shards", tmp_path / "more" / "shards")
    assert demo.main(minutes=0.02, out=str(tmp_path / "more"), seed=7, source=source) == 0
    assert f"from {source}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no such run folder"):
        demo.main(out=str(tmp_path / "none"), source=str(tmp_path / "gone"))
    assert not (tmp_path / "none").exists()  # refused before any work
    before, after = (read_config(folder / "config.json") for folder in (small_demo, tmp_path / "more"))
    assert after.start.model == source and after.optim.lr == before.optim.lr / 3
    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (small_demo, tmp_path / "more"))
    name = "model.adapters.text.embedding.weight"  # of another seed, and yet the same but for a few small steps
    assert torch.nn.functional.cosine_similarity(ours[name].float(), theirs[name].float(), dim=0).min() > 0.9


@pytest.mark.slow
def test_two_seeds_share_the_shards(small_demo: Path) -> None:
    assert demo.main(minutes=0.02, out=str(small_demo), seed=5, seeds=2) == 0
    found = json.loads((small_demo / "results.json").read_text())
    assert [part["seed"] for part in found["results"]] == [5, 6]
    assert (small_demo / "seed-5" / "export").is_dir() and (small_demo / "seed-6" / "export").is_dir()
    assert not (small_demo / "seed-5" / "shards").exists()


def test_half_a_data_set_is_not_complete(small_demo: Path) -> None:
    assert demo.complete(small_demo / "shards")
    next((small_demo / "shards").glob("dev-*.tar")).unlink()
    assert not demo.complete(small_demo / "shards")


def test_the_demo_refuses_what_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train for more than 0 minutes"):
        demo.main(minutes=0, out=str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_every_prompt_of_the_grid_is_a_training_caption() -> None:
    emoji = pytest.importorskip("emoji")
    from mm.data.openmoji import split_of
    from mm.evaluation.gallery import PROMPTS

    splits = {data["en"].strip(":").replace("_", " "): split_of(text) for text, data in emoji.EMOJI_DATA.items()}
    assert len(PROMPTS) == 16 and {splits[prompt] for prompt in PROMPTS} == {"train"}
