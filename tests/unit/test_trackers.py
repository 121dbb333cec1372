"""What a tracker is told, and that it can neither stop nor falsify a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mm.config import ConfigError, TrainConfig
from mm.training.metrics import MetricsLog, gpu_memory


class Fake:
    """A module with the three functions that wandb and trackio share; `bad` is the one that fails."""

    def __init__(self, bad: str = "") -> None:
        self.bad, self.calls = bad, []

    def _called(self, name: str, /, *args: Any, **options: Any) -> None:
        self.calls.append((name, args, options))
        if name == self.bad:
            raise ConnectionError("no route to the tracker\nand a long story")

    def init(self, *args: Any, **options: Any) -> None:
        self._called("init", *args, **options)

    def log(self, *args: Any, **options: Any) -> None:
        self._called("log", *args, **options)

    def finish(self) -> None:
        self._called("finish")

    def named(self, name: str) -> list[tuple[Any, dict[str, Any]]]:
        return [(args, options) for called, args, options in self.calls if called == name]

    def steps(self) -> list[int]:
        return [options["step"] for _, options in self.named("log")]


def settings(kind: str) -> TrainConfig:
    config = TrainConfig()
    config.run.tracker, config.run.project = kind, "birds"  # type: ignore[assignment]
    return config


def train(run: Path, kind: str, start: int, end: int) -> None:
    """The lines of steps start + 1 ... end."""
    log = MetricsLog(run, start, False, config=settings(kind))
    for step in range(start + 1, end + 1):
        log.write({"step": step, "loss": 1 / step, "order": "abc"})
    log.close()


@pytest.fixture(params=["wandb", "trackio"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_tracker_gets_the_config_and_every_number_at_its_step(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, kind, fake)  # type: ignore[arg-type]
    train(tmp_path, kind, 0, 2)
    (_, options), *more = fake.named("init")
    assert not more and options["project"] == "birds" and options["config"]["run"]["project"] == "birds"
    assert [args for args, _ in fake.named("log")] == [({"loss": 1.0},), ({"loss": 0.5},)]
    assert fake.steps() == [1, 2] and fake.calls[-1][0] == "finish"


def test_a_resumed_run_goes_on_in_the_tracker_and_repeats_no_step(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, kind, fake)  # type: ignore[arg-type]
    train(tmp_path, kind, 0, 7)
    train(tmp_path, kind, 5, 9)
    before, after = (options for _, options in fake.named("init"))
    assert before == after and after["resume"] == "allow" and after["name"].startswith(tmp_path.name + "-")
    assert fake.steps() == list(range(1, 10))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))


def test_another_run_has_another_name(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, kind, fake)  # type: ignore[arg-type]
    for place in ("a", "b"):
        (tmp_path / place / "same").mkdir(parents=True)
        train(tmp_path / place / "same", kind, 0, 1)
    first, second = (options["name"] for _, options in fake.named("init"))
    assert first != second


@pytest.mark.parametrize("bad", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_training_goes_on(
    tmp_path: Path, kind: str, bad: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(bad)
    monkeypatch.setitem(sys.modules, kind, fake)  # type: ignore[arg-type]
    train(tmp_path, kind, 0, 3)
    assert len(fake.named(bad)) == 1, "it is left alone from then on"
    said = capsys.readouterr().err
    assert said == f"run.tracker = {kind} is off from here on: no route to the tracker; metrics.jsonl goes on\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_is_not_installed_is_a_clear_error(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ConfigError, match=f"run.tracker = {kind}: {kind} is not installed; pip install it"):
        train(tmp_path, kind, 0, 1)


def test_without_a_tracker_none_is_imported(tmp_path: Path) -> None:
    train(tmp_path, "none", 0, 1)
    assert not (tmp_path / "tracker_id").exists()


@pytest.mark.timeout(120)
def test_the_real_wandb_resumes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path, "wandb", 0, 3)
    train(tmp_path, "wandb", 2, 4)
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1


@pytest.mark.timeout(120)
def test_the_real_trackio_resumes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    train(tmp_path, "trackio", 0, 3)
    train(tmp_path, "trackio", 2, 4)
    (run,) = trackio.Api().runs("birds")
    assert run.name.startswith(tmp_path.name)


def test_a_cpu_has_no_gpu_memory() -> None:
    assert gpu_memory(torch.device("cpu")) == {}


@pytest.mark.gpu
def test_gpu_memory_is_the_peak_since_the_last_call() -> None:
    device = torch.device("cuda")
    gpu_memory(device)
    tensor = torch.empty(250_000_000, device=device)
    del tensor
    assert gpu_memory(device)["gpu_gb"] >= 1.0 > gpu_memory(device)["gpu_gb"]
