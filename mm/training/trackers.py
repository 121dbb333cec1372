"""wandb and trackio, where a run reports beside its own files. Whatever goes wrong in them, the training goes on."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mm.config import ConfigError, TrainConfig
from mm.training.progress import say


class Tracker:
    """One run there, the same after every start: its name is in `<run>/tracker_id`.

    Steps up to `sent` were reported before, and are not again. The first error is said; nothing is reported after it.
    """

    def __init__(self, run: Path, config: TrainConfig, sent: float) -> None:
        self.kind, self.sent, self.on = config.run.tracker, sent, True
        try:
            self.module: Any = importlib.import_module(self.kind)
        except ImportError as error:
            raise ConfigError(f"run.tracker = {self.kind}: {self.kind} is not installed; pip install it") from error
        name, project = _name(run), config.run.project
        if self.kind == "wandb":
            where: dict[str, Any] = {"id": name, "dir": str(run)}
        else:
            where = {"embed": False}  # no page is opened
        self._try(lambda: self.module.init(project=project, name=name, config=asdict(config), resume="allow", **where))

    def log(self, record: dict[str, Any]) -> None:
        """The numbers of one line of the metrics, at its step."""
        step = record["step"]
        if step > self.sent:
            self.sent = step
            numbers = {
                name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"
            }
            self._try(lambda: self.module.log(numbers, step=step))

    def close(self) -> None:
        """Hand in what is left."""
        self._try(lambda: self.module.finish())

    def _try(self, work: Callable[[], object]) -> None:
        if not self.on:
            return
        try:
            work()
        except Exception as error:  # of any kind: it is another program's, and no reason to lose a run
            self.on = False
            reason = str(error).strip().splitlines() or [type(error).__name__]
            say(f"run.tracker = {self.kind} is off from here on: {reason[0]}; metrics.jsonl goes on")


def _name(run: Path) -> str:
    """The run's name there: its folder's and a few letters that tell it from others of that name."""
    path = run / "tracker_id"
    if not path.exists():
        path.write_text(f"{run.resolve().name}-{secrets.token_hex(4)}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
