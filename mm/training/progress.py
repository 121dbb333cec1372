"""What a person sees while a run trains: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


def say(line: str) -> None:
    """One line for a person, beside any progress bar."""
    tqdm.write(line, file=sys.stderr)


class Progress:
    """Loss, images/s, MFU and the time left."""

    def __init__(self, step: int, steps: int, shown: bool = True):
        self.steps, self.first, self.shown = steps, step, shown
        self.bar = tqdm(
            total=steps, initial=step, unit="step", disable=not (shown and sys.stderr.isatty()), dynamic_ncols=True
        )
        self.started = self.spoken = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, record: dict[str, Any]) -> None:
        """Show one step's record."""
        if not self.shown:
            return
        losses = {name.removeprefix("loss/"): record[name] for name in record if name.startswith("loss")}
        self.bar.set_postfix_str(
            " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            + f" {record['samples_per_second']:.0f} samples/s mfu {record['mfu']:.2f}",
            refresh=False,
        )
        self.bar.update(1)
        now, last = time.perf_counter(), record["step"] == self.steps
        if self.bar.disable and record["step"] > self.first and (now - self.spoken > SECONDS_BETWEEN_LINES or last):
            self.spoken = now
            left = (self.steps - record["step"]) * (now - self.started) / (record["step"] - self.first)
            text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            say(
                f"step {record['step']}/{self.steps} {text} {record['samples_per_second']:.0f} samples/s "
                f"mfu {record['mfu']:.2f}, {left:.0f} s left"
            )
