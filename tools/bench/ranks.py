"""Images a second of two processes on two cores against one process on one core: the same run, the demo's.

Compiled and in bfloat16, as the demo is; one thread a process; the same global batch. Each round starts both anew.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from _common import arguments, report
from _training import finish, records, start

WARM = 4  # steps that are not counted: they compile, and fill caches
TOLERANCE = 0.01  # relative, of the losses: matrix products are in bfloat16, and sums in another order


def train(processes: int, cores: list[int], steps: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one run."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--run.dir", folder, "--run.steps", str(steps), "--run.diagnose_every", "0", "--checkpoint.every", "0"]
        finish(start("configs/demo.py", *flags, processes=processes, cores=cores))
        return records(Path(folder))


def main() -> None:
    args = arguments("images a second of two processes on two cores", rounds=3, steps=16)
    cores = sorted(os.sched_getaffinity(0))[:2]
    assert len(cores) == 2, "needs two cores"
    one, two = train(1, cores, WARM), train(2, cores, WARM)  # also fills the compiler's cache
    apart = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one, two, strict=True))
    assert apart < TOLERANCE, f"the losses differ by {apart}"
    assert [line["order"] for line in one] == [line["order"] for line in two]
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.rounds):
        for processes in rates:
            lines = train(processes, cores, args.steps)[WARM:]
            rates[processes].append(median(line["samples_per_second"] for line in lines))
            print(f"{processes} processes: {rates[processes][-1]:.1f} images/s", flush=True)
    report(
        "two processes on two cores against one process on one core",
        rates[2],
        rates[1],
        unit="images/s",
        mark=1.6,
        better="higher",
        packages=("mm", "torch"),
        args=args,
        largest_difference_of_losses=apart,
        steps=args.steps,
    )


if __name__ == "__main__":
    main()
