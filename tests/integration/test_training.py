"""Training through the command that users type: it repeats itself, survives being killed, and refuses what is wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import runs
from mm.config import CheckpointConfig
from mm.data.build import openmoji
from mm.distributed.world import World
from mm.training.checkpoint import Checkpoints
from runs import records, same, weights

STEPS = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("shards")
    openmoji(out, size=32, per_shard=64, progress=False, limit=150)
    return str(out / "train-*.tar")


def command(shards: str, run: Path, *more: str) -> list[str]:
    flags = ["--data.train", shards, "--run.dir", str(run), "--run.steps", str(STEPS), "--checkpoint.every", "2"]
    return runs.command(*flags, *more)


def train(shards: str, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return runs.train(*command(shards, run, *more)[4:])


@pytest.fixture(scope="module")
def finished(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    result = train(shards, run, "--optim.name", "muon")
    assert result.returncode == 0, result.stderr
    return run


def test_a_run_folder_holds_what_the_design_says(finished: Path) -> None:
    assert json.loads((finished / "config.json").read_text())["version"] == 1
    assert (finished / "latest").read_text().strip() == f"step-{STEPS:08d}"
    lines = records(finished)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    wanted = {"step", "samples", "epoch", "loss", "loss/contrastive", "loss/diffusion", "grad_norm", "lr"}
    assert wanted | {"samples_per_second", "mfu", "data_wait", "order"} <= set(lines[-1])
    assert len({line["order"] for line in lines}) == STEPS
    assert {path.name for path in (finished / "export").iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
    }
    assert len(list((finished / "checkpoints").iterdir())) == 3  # keep


def test_the_loss_falls(finished: Path) -> None:
    lines = records(finished)
    assert lines[-1]["loss/diffusion"] < lines[0]["loss/diffusion"]


def test_the_same_seed_gives_the_same_weights(shards: str, finished: Path, tmp_path: Path) -> None:
    assert train(shards, tmp_path / "again", "--optim.name", "muon").returncode == 0
    assert weights(tmp_path / "again") == weights(finished)


@pytest.mark.slow
def test_another_seed_gives_other_weights(shards: str, finished: Path, tmp_path: Path) -> None:
    assert train(shards, tmp_path / "other", "--optim.name", "muon", "--run.seed", "1").returncode == 0
    assert not same(tmp_path / "other", finished)


@pytest.mark.slow
def test_workers_do_not_change_the_run(shards: str, finished: Path, tmp_path: Path) -> None:
    assert train(shards, tmp_path / "run", "--optim.name", "muon", "--data.workers", "2").returncode == 0
    assert same(tmp_path / "run", finished)


def killed(process: subprocess.Popen, run: Path, after: int, number: int) -> int:
    """Wait until the checkpoint of step `after` is committed, then send a signal at once; the exit code."""
    deadline = time.monotonic() + 200
    while not (run / f"checkpoints/step-{after:08d}").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(timeout=60)


@pytest.fixture
def started(shards: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(shards, run, "--optim.name", "muon"), env=runs.environment(), stderr=subprocess.PIPE, text=True
    )
    yield process, run
    process.kill()
    process.wait()


def test_a_killed_run_ends_with_the_same_weights(
    shards: str, finished: Path, started: tuple[subprocess.Popen, Path]
) -> None:
    process, run = started
    killed(process, run, after=4, number=signal.SIGKILL)
    (run / "checkpoints/step-00000099.tmp").mkdir()  # as a kill in the middle of a save leaves it
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "cut')
    result = train(shards, run, "--optim.name", "muon")
    assert result.returncode == 0, result.stderr
    assert "resuming after step" in result.stderr
    assert same(run, finished)
    assert weights(run) == weights(finished)
    assert [line["step"] for line in records(run)] == list(range(1, STEPS + 1))
    assert records(run)[-1]["order"] == records(finished)[-1]["order"]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_stop_signal_saves_and_says_how_to_go_on(
    shards: str, finished: Path, started: tuple[subprocess.Popen, Path], number: int
) -> None:
    process, run = started
    code = killed(process, run, after=2, number=number)
    assert code == 128 + number
    assert process.stderr is not None and "start again to go on" in process.stderr.read()
    reached = int((run / "latest").read_text().split("-")[1])
    assert 2 <= reached < STEPS
    assert train(shards, run, "--optim.name", "muon").returncode == 0
    assert same(run, finished)


def test_a_finished_run_started_again_does_nothing(shards: str, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    result = train(shards, finished, "--optim.name", "muon")
    assert result.returncode == 0 and "finished" in result.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_same_folder_is_refused(shards: str, finished: Path) -> None:
    result = train(shards, finished, "--optim.lr", "0.5")
    assert result.returncode == 2
    assert "optim.lr: 0.001 -> 0.5" in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(finished: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = run / f"checkpoints/step-{STEPS:08d}"
    state = next(newest.glob("*.distcp"))
    if damage == "flip":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "truncate":
        state.write_bytes(state.read_bytes()[:-4096])
    elif damage == "missing":
        state.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    found = Checkpoints(run, CheckpointConfig(), World()).newest()
    assert found is not None and found.step == STEPS - 2


def test_divergence_stops_and_names_samples(shards: str, tmp_path: Path) -> None:
    result = train(shards, tmp_path / "run", "--optim.lr", "1e30", "--optim.warmup", "1")
    assert result.returncode == 2
    assert "is not finite" in result.stderr and "samples" in result.stderr
    assert len([line for line in result.stderr.splitlines() if "error" in line]) == 1


@pytest.mark.slow
def test_accumulation_follows_the_full_batch(shards: str, tmp_path: Path) -> None:
    assert train(shards, tmp_path / "one", "--run.steps", "3").returncode == 0
    assert train(shards, tmp_path / "four", "--run.steps", "3", "--optim.accumulate", "4").returncode == 0
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "four"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
        assert a["order"] == b["order"]
