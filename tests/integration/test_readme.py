"""What README and docs show can be typed: Python examples run, commands have the flags that they are shown with."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_clips import tiny_clip

import mm
from mm.cli import main
from mm.commands import COMMANDS
from mm.config import TrainConfig
from mm.fields import tree
from mm.settings import load as load_config
from mm.training.loop import run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> Iterator[str]:
    """The text of each fenced block of a page in one language, "" for those without."""
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        if match[1] == language:
            yield match[2]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each `mm ...` line in a page's blocks, without comments; lines that end in a backslash go on."""
    for block in [*blocks(page, ""), *blocks(page, "sh"), *blocks(page, "bash")]:
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(line.split("|")[0], comments=True) if line.startswith("mm ") else []
            if words[1:] and words[1] in COMMANDS:
                yield words[1:]


@pytest.fixture(scope="module")
def demo(openmoji_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs/demo` as `make demo` leaves it, of the tiniest model."""
    folder = tmp_path_factory.mktemp("readme")
    config = load_config(ROOT / "configs" / "debug.py")
    config.run.dir, config.run.steps = str(folder / "runs/demo"), 3
    config.data.train = str(openmoji_shards / "train-*.tar")
    config.data.val = str(openmoji_shards / "dev-*.tar")
    run(config)
    (folder / "runs/demo/shards").symlink_to(openmoji_shards)
    return folder


def test_the_python_examples_of_the_readme_run_one_after_the_other(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader would, in one session; weights of others cannot be downloaded, and are random ones here."""
    stand_in, load = tiny_clip(tmp_path / "clip")[1], mm.load

    def loaded(source: str, **options: Any) -> Any:
        return load(stand_in if source.startswith("open_clip:") else source, **options)

    monkeypatch.setattr(mm, "load", loaded)
    monkeypatch.chdir(demo)
    examples = list(blocks(ROOT / "README.md", "python"))
    assert len(examples) >= 3
    namespace: dict[str, Any] = {}
    for number, example in enumerate(examples):
        exec(compile(example, f"README.md, example {number + 1}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_flags_that_they_are_shown_with(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {name.replace("_", "-") for name in tree(TrainConfig)}
    for words in commands(page):
        flags = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
        known = set()
        if words[0] in ("train", "chaos"):  # what follows the config file are its fields
            known = {f"--{field}" for field in fields}
        if words[0] != "train":
            assert main([words[0], *words[1:2][: words[0] == "shards"], "--help"]) == 0
            known |= set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
        unknown = [flag for flag in flags if flag.replace("_", "-") not in known]
        assert not unknown, f"{page.name}: mm {' '.join(words)}"
