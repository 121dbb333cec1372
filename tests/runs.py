"""Training runs as users start them, and what they leave in their folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from mm.config import CheckpointConfig
from mm.distributed.world import World
from mm.training.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    """Of a training process: this repository's code, one thread a core."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "2", **more}


def command(*flags: str, processes: int = 0) -> list[str]:
    """`python -m mm.train configs/debug.py`, or through torchrun with some processes, on a port of its own choosing."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*start, "-m", "mm.train", str(ROOT / "configs/debug.py"), *flags]


def train(*flags: str, processes: int = 0, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
    """A whole run of configs/debug.py, or its end by a fault."""
    return subprocess.run(
        command(*flags, processes=processes),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def state(run: Path) -> dict[str, Tensor]:
    """Everything in a run's newest checkpoint: weights, averages, moments."""
    checkpoints = Checkpoints(run, CheckpointConfig(), World())
    found = checkpoints.newest()
    assert found is not None, f"{run} has no checkpoint"
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in found.names.items()}
    checkpoints.read(found, tensors)
    return tensors


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended at the same step with the same state and the same export, bit for bit."""
    a, b = state(one), state(other)
    if a.keys() != b.keys() or latest(one) != latest(other):
        return False
    bits = all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a if a[name].ndim)
    counts = all(torch.equal(a[name], b[name]) for name in a if not a[name].ndim)
    return bits and counts and weights(one) == weights(other)


def weights(run: Path) -> bytes:
    """The exported averages, as a file."""
    return (run / "export/model.safetensors").read_bytes()


def latest(run: Path) -> int:
    """The step of the newest checkpoint."""
    return int((run / "latest").read_text().split("-")[1])


def records(run: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
