"""What benchmarks of whole training runs share: the demo's shards, and one command or several processes of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from _common import ROOT, cache_folder

from mm.data.build import openmoji


def demo_shards() -> str:
    """A pattern of the demo's training shards, which are made once."""
    folder = cache_folder("bench", "openmoji-32")
    if not (folder / "done").exists():
        openmoji(folder, size=32, progress=False)
        (folder / "done").touch()
    return str(folder / "train-*.tar")


def start(config: str, *flags: str, processes: int = 1, cores: list[int] | None = None) -> list[subprocess.Popen]:
    """The processes of one run, by rank, each with one thread; pinned to one of `cores` each, where they are given."""
    here = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/kernels", "OMP_NUM_THREADS": "1"}
    here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    here |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "mm.train", os.path.join(ROOT, config), "--data.train", demo_shards(), *flags]
    started = []
    for rank in range(processes):
        pinned = ["taskset", "--cpu-list", str(cores[rank])] if cores else []
        one = {**here, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(subprocess.Popen([*pinned, *command], env=one, stderr=subprocess.PIPE, text=True))
    return started


def finish(started: list[subprocess.Popen]) -> None:
    """Wait for the end of a run. Raises RuntimeError with what it said where it failed."""
    said = [process.communicate()[1] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"training failed: {said[0][-2000:]}")


def records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl; none where there is no file yet."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
