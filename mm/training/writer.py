"""What the first process writes while a run trains: metrics.jsonl and ledger.jsonl; the others write nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mm.data.index import Entry
from mm.training.metrics import LedgerFile, MetricsLog
from mm.training.progress import say
from mm.training.trainer import Trainer, finite


class Writer:
    """Lines after the trainer's step are removed first; `before_last`: from it on."""

    def __init__(self, trainer: Trainer, before_last: bool = False) -> None:
        self.trainer = trainer
        self._log = self._open(trainer.step - before_last) if trainer.world.main else None
        self._ledger = LedgerFile(trainer.run_dir) if trainer.world.main else None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            self._log.close()

    def _open(self, step: int) -> MetricsLog:
        config = self.trainer.config
        return MetricsLog(self.trainer.run_dir, step, config.run.tensorboard, config=config)

    def back(self) -> None:
        """The trainer went back: drop the lines after its step."""
        if self._log is not None:
            self._log.close()
            self._log = self._open(self.trainer.step)

    def write(self, record: dict[str, Any]) -> None:
        """A step's line, where it is due or says something beyond the step itself."""
        found = record.keys() - self.trainer.record.keys()
        if self._log is not None and (found or self.trainer.due(self.trainer.config.run.log_every)):
            self._log.write(finite(record))

    def note(self, entries: list[Entry]) -> None:
        """What cannot be used, from a list that grows; a line on the screen for shards, and for the first sample."""
        if self._ledger is None:
            return
        added = self._ledger.write(entries)
        for entry in [entry for entry in added if not entry.key][:5]:
            say(f"{entry.shard}: {entry.reason}")
        if added and len(entries) == len(added):
            say(f"ledger.jsonl: {len(entries)} more that cannot be used: replaced, and counted as unusable")


def unfinished(run: Path, step: int) -> bool:
    """Whether metrics.jsonl lacks the line of the last step, because a kill came before its evaluation was done."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return True
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return not lines or json.loads(lines[-1])["step"] != step
    except (ValueError, KeyError):
        return True
