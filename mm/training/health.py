"""What to do when a step went wrong: a loss that is no number, or one far above those before it.

Every process judges the same numbers, those of the global batch, and so comes to the same verdict. Either the step is
left out (`skip`: no weight changes, the schedule moves on), or the run goes back to its newest checkpoint and leaves
that batch out when it comes to it again (`rewind`), or it ends (`stop`). All of it follows from the data and the state
in a checkpoint, so that a run that is killed in between repeats it.
"""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mm.training.progress import say

if TYPE_CHECKING:
    from mm.config import HealthConfig


class Diverged(ValueError):
    """The loss or its gradient is not a number, or spiked, and the config says to stop: names step and samples."""


class Health:
    """Judges steps; its state belongs into checkpoints."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.left_out: set[int] = set()  # batches that a rewind met
        self.events = 0  # skips and rewinds so far

    def judge(self, metrics: dict[str, float]) -> tuple[str, str]:
        """What is wrong with a step, "" for nothing, and what to do: skip, rewind or stop."""
        loss, norm = metrics["loss"], metrics["grad_norm"]
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"loss = {loss}, grad_norm = {norm} is not finite", self.config.nonfinite
        full = len(self.losses) == self.losses.maxlen
        if self.config.spike != "off" and full and loss > self.config.spike_factor * median(self.losses):
            usual = median(self.losses)
            return (
                f"loss = {loss:.4g} is {loss / usual:.1f} x the median of {len(self.losses)} steps",
                self.config.spike,
            )
        self.losses.append(loss)
        return "", ""

    def act(self, run: Path, step: int, problem: str, action: str, samples: list[dict[str, Any]], main: bool) -> None:
        """Enter the event in `health.jsonl`, say it, and count it. Raises Diverged where the run is to stop.

        `samples`: key, shard and process of what the step was made from, those first that gave no number.
        """
        self.events += 1
        after = f"the {self.config.most} that health.most allows are used up" if self.events > self.config.most else ""
        ends = action == "stop" or bool(after)
        if main:
            event = {"step": step, "problem": problem, "action": "stop" if ends else action, "samples": samples}
            with open(run / "health.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        names = ", ".join(f"{sample['key']} ({Path(sample['shard']).name})" for sample in samples[:6])
        where = f"samples {names}{' ...' if len(samples) > 6 else ''}"
        if ends:
            fix = (
                "lower optim.lr, look at the samples (health.jsonl lists all), or set health.nonfinite or health.spike"
            )
            raise Diverged(f"step {step}: {problem}; {where}; {after + '; ' if after else ''}{fix}")
        if main:
            done = "left out" if action == "skip" else "back to the newest checkpoint, and this batch is left out"
            say(f"step {step}: {problem}: {done} ({self.events} of {self.config.most}); {where}")

    def state(self) -> dict[str, Any]:
        """JSON for a checkpoint."""
        return {"losses": list(self.losses), "left_out": sorted(self.left_out), "events": self.events}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; batches that are left out and events since then stay known."""
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.left_out |= set(state["left_out"])
        self.events = max(self.events, state["events"])
