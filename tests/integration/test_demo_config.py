"""The demo's own config, compiled and in bf16: bitwise repeatable, also after a kill. Minutes, and so slow."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mm.data.build import openmoji
from runs import same

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("shards")
    openmoji(out, size=64, progress=False, limit=900)
    return str(out / "train-*.tar")


def start(shards: str, run: Path) -> subprocess.Popen:
    flags = ["--data.train", shards, "--run.dir", str(run), "--run.steps", str(STEPS), "--checkpoint.every", "2"]
    return subprocess.Popen([sys.executable, "-m", "mm.train", str(ROOT / "configs/demo.py"), *flags], cwd=ROOT)


def test_the_demo_repeats_itself_and_survives_a_kill(shards: str, tmp_path: Path) -> None:
    assert shutil.which("g++"), "this test is about compiled code"
    for name in ("one", "two"):
        assert start(shards, tmp_path / name).wait(timeout=600) == 0
    assert same(tmp_path / "one", tmp_path / "two")
    process = start(shards, tmp_path / "killed")
    deadline = time.monotonic() + 500
    while not (tmp_path / "killed/checkpoints/step-00000002").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert start(shards, tmp_path / "killed").wait(timeout=600) == 0
    assert same(tmp_path / "killed", tmp_path / "one")
