"""What a run writes about itself: metrics.jsonl, TensorBoard, FLOPs counted by torch, the machine's own matrix rate."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mm.config import ConfigError, TrainConfig


class MetricsLog:
    """Appends one JSON object a line. Lines after the step that a run resumes from are removed first."""

    def __init__(self, run: Path, step: int, tensorboard: bool, config: TrainConfig | None = None):
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
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

    def write(self, record: dict[str, Any]) -> None:
        """One line; every number also goes to TensorBoard where that is on."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


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


def gpu_memory(device: torch.device) -> dict[str, float]:
    """Gigabytes that tensors have taken at most since the last call, and that are reserved; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    found = {
        "gpu_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "gpu_reserved_gb": torch.cuda.memory_reserved(device) / 1e9,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return found


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 2048, rounds: int = 7) -> float:
    """FLOP/s of a square matrix product on this device, now: the median of several rounds after a warm-up."""
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
    return 2 * size**3 / median(seconds)
