"""The command line: what it answers, what it refuses and how, and what it hands on. The work itself is faked."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mm
from mm.cli import HELP, guarded, main
from mm.commands import COMMANDS
from mm.evaluation.record import Record

Run = Callable[..., subprocess.CompletedProcess[str]]


class Fake:
    """Records the calls of a function that another room provides."""

    def __init__(self, result: Any = None) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.result = result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.result


class FakeClassifier:
    """Says of every image that label n has the probability 1 / n."""

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels

    def __call__(self, images: list[Image.Image]) -> Any:
        import torch

        return (1 / torch.arange(1, len(self.labels) + 1)).repeat(len(images), 1)


class FakeModel:
    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    @property
    def inference(self) -> types.SimpleNamespace:
        from mm.adapters.image import ImageProcessor

        return types.SimpleNamespace(processor=lambda name: ImageProcessor(8))

    def classifier(self, labels: list[str], templates: list[str] | None = None, progress: bool = False) -> Any:
        self.asked = {"labels": labels, "templates": templates}
        return FakeClassifier(labels)

    def generate(
        self, prompts: list[str], seeds: list[int], steps: int, guidance: float, **options: Any
    ) -> list[Image.Image]:
        self.asked = {"prompts": prompts, "seeds": seeds, "steps": steps, "guidance": guidance, **options}
        images = [Image.new("RGB", (8, 8), (seed, len(prompt), 0)) for prompt, seed in zip(prompts, seeds, strict=True)]
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            image.info["mm"] = Record(prompt, seed, steps, guidance, "euler", (0.0, 1.0), 0.7)
        return images


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(mm, "load", lambda source: fake)
    monkeypatch.setattr("mm.models.fingerprint.model_hash", lambda loaded: 64 * "a")
    return fake


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input must be refused before the seconds that a model takes to load."""

    def load(source: str) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mm, "load", load)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    return str(tmp_path / "cat.png")


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    parent, _, last = name.rpartition(".")
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules.get(parent) or __import__(parent, fromlist=[last]), last, module, raising=False)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which `mm argv` is refused."""
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("mm: error: ")
    return shown.err


# -- fast and light


def test_help_answers_at_once(run_python: Run) -> None:
    seconds = []
    for _ in range(3):  # processor time: other work on the machine does not count
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_python("-m", "mm.cli", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and done.stdout == HELP and done.stderr == ""
    assert min(seconds) < 0.5


@pytest.mark.parametrize("module", ["mm", "mm.cli", "mm.train", "mm.config", "mm.settings"])
def test_nothing_heavy_is_imported(run_python: Run, module: str) -> None:
    code = f"import sys, {module}; print([n for n in ('torch', 'numpy', 'PIL', 'tyro') if n in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"


def test_help_fits_a_screen_and_has_an_example_a_command() -> None:
    lines = HELP.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    for name in COMMANDS:
        (line,) = (line for line in lines if line.startswith(f"  mm {name} "))
        example, _, says = line.strip().partition("   ")
        assert len(example.split()) > 2 and says.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"usage: mm {name}" in capsys.readouterr().out


# -- errors


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("clasify", "did you mean classify?"),
        ("xyz", "mm --help"),
        ("--classify", "unknown command"),
        ("classify r x.png --label a", "unknown flag --label; did you mean --labels?"),
        ("generate r x --guidence=3", "did you mean --guidance?"),
        ("evaluate r --dta x", "did you mean --data?"),
        ("demo --minute 3", "did you mean --minutes?"),
        ("demo extra", "extra"),
        ("shards openmoij OUT", "did you mean openmoji?"),
        ("shards openmoji", "OUT"),
        ("shards folder d o --image-column x", "--captions"),
        ("demo --minutes 0", "--minutes: 0: must be a number above 0"),
        ("demo --minutes nan", "--minutes"),
        ("generate r x --n 0", "--n: 0: must be an int at least 1"),
        ("generate r x --steps many", "--steps: many"),
        ("generate r x --out grid.jpg", "grid.jpg"),
        ("generate r", "PROMPT"),
        ("classify r x.png", "--labels cat,dog"),
        ("classify r x.png --labels a --labels-file f", "once"),
        ("evaluate r", "--data"),
        ("evaluate r --data d --tasks ,", "--tasks"),
        ("evaluate r --data d --resume", "--out"),
        ("evaluate r --data d --temperature 0", "must be a number above 0"),
        ("compare a.json", "B"),
        ("compare nowhere.json b.json", "nowhere.json: cannot be read"),
        ("train --run.steps 5 configs/debug.py", "config file comes first"),
        ("train nowhere.py", "nowhere.py"),
    ],
)
def test_one_line_and_exit_2(unloadable: None, capsys: pytest.CaptureFixture[str], argv: str, expected: str) -> None:
    assert expected in refused(capsys, *argv.split())


def test_label_lists_and_templates(
    unloadable: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, picture: str
) -> None:
    (tmp_path / "labels.txt").write_text("\n \n")
    assert "no label" in refused(capsys, "classify", "r", picture, "--labels", "")
    assert "no label" in refused(capsys, "classify", "r", picture, "--labels", " , ")
    assert "labels.txt: no label" in refused(
        capsys, "classify", "r", picture, "--labels-file", str(tmp_path / "labels.txt")
    )
    assert "missing.txt" in refused(capsys, "classify", "r", picture, "--labels-file", str(tmp_path / "missing.txt"))
    assert "{}" in refused(capsys, "classify", "r", picture, "--labels", "a", "--template", "an emoji")


def test_files_that_are_no_images(
    unloadable: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, picture: str
) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    cut = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    for name in ("text.png", "cut.png", "missing.png", ""):
        bad = str(tmp_path / name)
        assert f"error: {bad}" in refused(capsys, "classify", "r", picture, bad, "--labels", "a,b")


def test_traceback_shows_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--traceback", "train", "nowhere.py"], ["train", "nowhere.py", "--traceback"]):
        assert main(argv) == 2
        shown = capsys.readouterr().err
        assert "Traceback" in shown and shown.splitlines()[-1].startswith("mm: error: nowhere.py")


def test_how_a_command_ends(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(error: BaseException) -> int:
        def raiser(argv: Any) -> int:
            raise error

        return guarded(raiser, [])

    assert stop(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "mm: interrupted\n"
    assert stop(ValueError("two\n lines")) == 2
    assert capsys.readouterr().err == "mm: error: two lines\n"
    assert stop(PermissionError(13, "Permission denied", "grid.png")) == 2
    assert capsys.readouterr().err == "mm: error: grid.png: Permission denied\n"
    with pytest.raises(RuntimeError):  # ours to mend: never hidden
        stop(RuntimeError("bug"))


def test_a_reader_that_leaves_is_no_error(root: Path) -> None:
    code = "import sys; from mm.cli import guarded; sys.exit(guarded(lambda argv: print('x' * 10**6) or 0, []))"
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}" | head -c 1'], cwd=root, capture_output=True, text=True
    )
    assert done.stdout == "x" and done.stderr == ""


# -- what is handed on


def test_train_overrides_and_runs(
    monkeypatch: pytest.MonkeyPatch, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mm.evaluation.callbacks import callbacks
    from mm.training.loop import Stopped

    run = Fake({"step": 3})
    monkeypatch.setattr("mm.training.loop.run", run)
    config = str(root / "configs" / "debug.py")
    assert main(["train", config, "--data.train", "shards", "--run.steps=3"]) == 0
    ((given, made), more) = run.calls.pop()
    assert made is callbacks and more["world"].size == 1
    assert given.run.steps == 3 and given.data.train == "shards"
    assert "data.train" in refused(capsys, "train", config)
    assert "try 8 or 12" in refused(capsys, "train", config, "--data.batch_size", "10", "--optim.accumulate", "4")
    assert "did you mean --run.steps?" in refused(capsys, "train", config, "--run.step", "4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start with torchrun" in refused(capsys, "train", config, "--data.train", "shards")
    monkeypatch.delenv("WORLD_SIZE")
    assert run.calls == []

    def stopped(*_: object, **__: object) -> None:
        raise Stopped(7, 15)

    monkeypatch.setattr("mm.training.loop.run", stopped)
    assert main(["train", config, "--data.train", "shards"]) == 128 + 15
    assert "after step 7" in capsys.readouterr().err


def test_torchrun_entry_is_the_same_command(run_python: Run, root: Path) -> None:
    done = run_python("-m", "mm.train", str(root / "configs" / "debug.py"), "--run.step", "4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mm: error: --run.step: no such field; did you mean --run.steps?\n"


def test_train_help_lists_fields(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(root / "configs" / "debug.py"), "--help"]) == 0
    assert "--data.batch-size" in capsys.readouterr().out


def test_demo_hands_on_minutes_folder_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    fake_module(monkeypatch, "mm.demo", main=lambda *args: calls.append(args) or 0)
    assert main(["demo"]) == 0
    assert main(["demo", "--minutes", "0.5", "--out", "o", "--seed", "3", "--seeds", "2", "--from", "openmoji"]) == 0
    assert calls == [(8.0, "runs/demo", 0, 1, ""), (0.5, "o", 3, 2, "openmoji")]


def test_shards_hand_on_what_was_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = {"samples": {"train": 1200, "val": 34}, "shards": ["train-000000.tar", "val-000000.tar"]}
    openmoji, folder = Fake(manifest), Fake(manifest)
    fake_module(monkeypatch, "mm.data.build", openmoji=openmoji, folder=folder)
    assert main(["shards", "openmoji", "out"]) == 0
    assert capsys.readouterr().out == "out: 1,234 samples in 2 shards, indexed\n"
    assert openmoji.calls == [(("out",), {})]
    assert main(["shards", "folder", "in", "out"]) == 0
    assert main(["shards", "folder", "in", "out", "--captions", "c.csv", "--caption-column", "text"]) == 0
    assert folder.calls == [(("in", "out"), {}), (("in", "out"), {"captions": "c.csv", "caption_column": "text"})]


def test_classify_prints_text_and_json(
    model: FakeModel, capsys: pytest.CaptureFixture[str], picture: str, tmp_path: Path
) -> None:
    assert main(["classify", "r", picture, "--labels", "cat, dog", picture]) == 0
    assert model.asked == {"labels": ["cat", "dog"], "templates": None}
    assert capsys.readouterr().out == f"{picture}: cat 100.0 %, dog 50.0 %\n" * 2
    (tmp_path / "labels.txt").write_text("cat\nred, heart\n", encoding="utf-8")
    argv = ["--labels-file", str(tmp_path / "labels.txt"), "--template", "a {}", "--template", "{}", "--top", "1"]
    assert main(["classify", "r", picture, *argv, "--json"]) == 0
    assert model.asked == {"labels": ["cat", "red, heart"], "templates": ["a {}", "{}"]}
    assert json.loads(capsys.readouterr().out) == [{"image": picture, "top": [{"label": "cat", "probability": 1.0}]}]


def test_generate_writes_one_row_a_prompt(model: FakeModel, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.png"
    assert main(["generate", "r", "a", "bb", "--n", "3", "--seed", "5", "--steps", "7", "--out", str(out)]) == 0
    assert model.asked["prompts"] == ["a", "a", "a", "bb", "bb", "bb"]
    assert model.asked["seeds"] == [5, 6, 7, 5, 6, 7]
    assert (model.asked["steps"], model.asked["guidance"]) == (7, 2.0)
    with Image.open(out) as sheet:
        assert sheet.size == (3 * 100 + 4, 2 * 100 + 4) and sheet.format == "PNG"  # 8 px, shown as 96, 4 between
        assert [sheet.getpixel((column * 100 + 4, row * 100 + 4)) for row in range(2) for column in range(3)] == [
            (5, 1, 0), (6, 1, 0), (7, 1, 0), (5, 2, 0), (6, 2, 0), (7, 2, 0),
        ]  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["grid.png"]


def test_a_failed_generation_leaves_nothing(
    model: FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    refused(capsys, "generate", "r", "a", "--out", str(tmp_path / "grid.png"))
    assert list(tmp_path.iterdir()) == []


def test_evaluate_hands_on_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Fake()
    fake_module(monkeypatch, "mm.evaluation.run", evaluate=run, summary=lambda result: "all is well")
    assert main(["evaluate", "r", "--data", "d", "--tasks", "zero_shot, generation", "--out", "o.json"]) == 0
    assert main(["evaluate", "r", "--data", "d", "--labels-from", "l"]) == 0
    tasks = ["zero_shot", "generation"]
    show = sys.stderr.isatty()
    assert run.calls == [
        (("r",), {"data": "d", "tasks": tasks, "candidates": None, "out": "o.json", "progress": show}),
        (("r",), {"data": "d", "tasks": None, "candidates": "l", "out": None, "progress": show}),
    ]
    flags = "--split test --steps 3 --templates openai --precision fp32 --workers 2 --records x.jsonl --resume --out o"
    assert main(["evaluate", "r", "--data", "d", *flags.split()]) == 0
    assert run.calls[2][1] == {
        "data": "d",
        "tasks": None,
        "candidates": None,
        "out": "o",
        "progress": show,
        "split": "test",
        "precision": "fp32",
        "workers": 2,
        "records": "x.jsonl",
        "resume": True,
        "settings": {"steps": 3, "templates": "openai"},
    }
