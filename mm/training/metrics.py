"""What a run writes about itself: metrics.jsonl, TensorBoard, FLOPs counted by torch, the machine's own matrix rate."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mm.config import ConfigError, TrainConfig
from mm.training.trackers import Tracker


class MetricsLog:
    """Appends one JSON object a line. Lines after the step that a run resumes from are removed first.

    With `config`, also reports to its `run.tracker`. Raises ConfigError for a package that is not installed.
    """

    def __init__(self, run: Path, step: int, tensorboard: bool, *, config: TrainConfig | None = None):
        self.path = run / "metrics.jsonl"
        last = 0.0  # the last step that any start of this run has reported
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            last = max([number for number in map(_step, lines) if math.isfinite(number)], default=0.0)
            kept = [line for line in lines if _step(line) <= step]
            fresh = run / ".metrics.tmp"
            fresh.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            fresh.replace(self.path)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError("run.tensorboard = True: tensorboard is not installed; pip install it") from error

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.tracker = None
        if config is not None and config.run.tracker != "none":
            self.tracker = Tracker(run, config, last)

    def write(self, record: dict[str, Any]) -> None:
        """One line; every number also goes to TensorBoard and a tracker, where they are on."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, record["step"])
        if self.tracker is not None:
            self.tracker.log(record)

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.tracker is not None:
            self.tracker.close()


class LedgerFile:
    """`ledger.jsonl`: what could not be used, one JSON object a line, each once; no file where nothing was."""

    def __init__(self, run: Path) -> None:
        self.path, self._seen = run / "ledger.jsonl", 0
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        self._lines = set(text.splitlines())
        self._cut = bool(text) and not text.endswith("\n")  # a kill in the middle of a line

    def write(self, entries: Sequence[Any]) -> list[Any]:
        """Add what a growing list of entries holds beyond those of the last call, which is returned."""
        added = list(entries[self._seen :])
        lines = dict.fromkeys(json.dumps(entry._asdict()) for entry in entries[self._seen :])
        self._seen = len(entries)
        new = [line for line in lines if line not in self._lines]
        if new:
            self._lines.update(new)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" * self._cut + "".join(line + "\n" for line in new))
            self._cut = False
        return added


def _step(line: str) -> float:
    """The step of a line; a line that a kill cut short counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 2048, rounds: int = 20) -> float:
    """FLOP/s of a square matrix product on this device: the best of several rounds, the one least disturbed."""
    if device.type == "cuda":
        size *= 4
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for number in range(rounds + 2):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def gpu_memory(device: torch.device) -> dict[str, float]:
    """`gpu_gb`, the most that tensors took since the last call, and `gpu_reserved_gb`, that torch held for them.

    In 1e9 bytes; empty where the device is no CUDA GPU.
    """
    if device.type != "cuda":
        return {}
    most = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"gpu_gb": most[0] / 1e9, "gpu_reserved_gb": most[1] / 1e9}
