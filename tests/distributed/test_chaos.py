"""`mm chaos`: its quick form, the whole suite, and that it leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm.chaos import launch, storage
from mm.chaos import run as suite_run
from mm.chaos.launch import Wrong

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/debug.py")
WORD = "MM_CHAOS_TEST"  # in the environment of all that a test starts


def chaos(out: Path, *flags: str, **variables: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "mm.cli", "chaos", CONFIG, "--out", str(out), *flags]
    return subprocess.Popen(
        words,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # as in a terminal
    )


def finished(out: Path, *flags: str, limit: float) -> dict[str, Any]:
    """The suite's JSON."""
    process = chaos(out, *flags, "--json")
    try:
        said, errors = process.communicate(timeout=limit)
    finally:
        process.terminate()
        process.communicate()
    assert process.returncode in (0, 1), errors
    return json.loads(said)


# -- the suite


@pytest.mark.slow  # half a minute; a killed run that goes on is also in tests/integration/test_training.py
@pytest.mark.timeout(150)
def test_a_killed_save_in_the_quick_form(tmp_path: Path) -> None:
    flags = ("--faults", "kill-save.hashed-rank0", "--processes", "1", "--parallel.threads", "1")
    found = finished(tmp_path / "out", *flags, limit=140)
    (killed,) = found["faults"]
    assert found["failed"] == 0, found
    assert killed["resumed_from"] == 4 and "-9" in killed["seen"]
    assert str(tmp_path) not in json.dumps(found)
    assert not (tmp_path / "out/kill-save.hashed-rank0/run").exists()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_fault_is_survived_or_stopped_by_one_error(tmp_path: Path) -> None:
    found = finished(tmp_path / "out", "--processes", "2", "--kills", "20", limit=7000)
    assert [(row["name"], row["verdict"]) for row in found["faults"] if not row["ok"]] == []
    assert len(found["faults"]) == len(suite_run.scenarios(2, 20, 0))


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("number", "processes"), [(signal.SIGINT, 2), pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow)]
)
def test_stopping_the_suite_leaves_no_process_behind(tmp_path: Path, number: int, processes: int) -> None:
    process = chaos(tmp_path / "out", "--faults", "nothing", "--processes", str(processes), **{WORD: str(tmp_path)})
    deadline = time.monotonic() + 60
    while len(alive(tmp_path)) < {1: 2, 2: 4}[processes]:  # the suite, torchrun, and the run's processes
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert alive(tmp_path) == []


def alive(folder: Path) -> list[int]:
    """The processes that a test has started, their children among them."""
    word, found = f"{WORD}={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if word in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


# -- processes


def started(tmp_path: Path, script: str, limit: float = 30) -> launch.Job:
    return launch.start(["sh", "-c", script], tmp_path / "screen.txt", limit, {})


@pytest.mark.timeout(30)
def test_a_process_in_a_session_of_its_own_is_ended_too(tmp_path: Path) -> None:
    with started(tmp_path, "setsid sleep 60 & sleep 60") as job:
        until(lambda: len(launch.marked(job.mark)) >= 3)
    assert launch.marked(job.mark) == []


@pytest.mark.timeout(30)
def test_what_a_launcher_left_behind_is_ended_with_it(tmp_path: Path) -> None:
    with started(tmp_path, "setsid sleep 60 & echo done") as job:
        assert job.wait().text == "done\n"
    assert launch.marked(job.mark) == []


@pytest.mark.timeout(30)
def test_a_run_over_its_limit_is_wrong_and_ended(tmp_path: Path) -> None:
    with pytest.raises(Wrong, match="has not ended within 1 s"), started(tmp_path, "sleep 60", limit=1) as job:
        job.wait()
    assert launch.marked(job.mark) == []


@pytest.mark.timeout(30)
def test_a_small_disk_fills_up_and_goes_away(tmp_path: Path) -> None:
    with storage.small_disk(tmp_path / "disk", 1 << 20) as disk:
        if disk is None:
            pytest.skip("no file system can be mounted here")
        with pytest.raises(OSError, match="No space left"):
            (disk / "file").write_bytes(bytes(2 << 20))
    assert not disk.exists() and list((tmp_path / "disk").iterdir()) == []


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
