"""How soon a stop signal is answered: steps that begin after it, and seconds until the last step ends and until exit.

One process gets the signal, at a random moment: the only one, or the second of two, where the first must learn of it.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from _common import arguments, circumstances
from _training import records, start

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WARM = 5  # steps before the signal


def stop(number: signal.Signals, processes: int, chance: random.Random) -> dict[str, Any]:
    """What one run did when the signal came."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        flags = ["--run.dir", folder, "--run.steps", "100000", "--checkpoint.every", "0", "--data.batch-size", "256"]
        started = start("configs/debug.py", *flags, processes=processes)
        try:
            while len(records(run)) < WARM:
                assert all(process.poll() is None for process in started), started[0].communicate()[1]
                time.sleep(0.05)
            step = median(line["seconds"] for line in records(run)[1:])
            time.sleep(2 * step * chance.random())
            ended = len(records(run))
            sent = time.time()
            started[-1].send_signal(number)
            codes = [process.wait(120) for process in started]
            exited = time.time()
        finally:
            end(started)
        assert codes == [128 + number] * processes, codes
        last = records(run)[-1]["step"]
        return {
            "signal": number.name,
            "processes": processes,
            "begun": max(0, last - ended - 1),  # one was under way when `ended` were done
            "step": step,
            "last_step": max(0.0, (run / "metrics.jsonl").stat().st_mtime - sent),
            "exit": exited - sent,
        }


def end(started: list[subprocess.Popen]) -> None:
    for process in started:
        process.kill()
        process.communicate()


def main() -> None:
    args = arguments("how soon a stop signal is answered", rounds=3)
    chance, found = random.Random(0), []
    for processes in (1, 2):
        for number in SIGNALS:
            for _ in range(args.rounds):
                one = stop(number, processes, chance)
                found.append(one)
                print(
                    f"{one['signal']}, {processes} processes: {one['begun']} steps begun after it, the last one ended "
                    f"after {one['last_step']:.3f} s (a step: {one['step']:.3f} s), exit after {one['exit']:.2f} s",
                    flush=True,
                )
    begun = max(one["begun"] for one in found)
    print(f"at most {begun} steps begin after a signal")
    if args.json:
        result = {
            "name": "steps that begin after a stop signal",
            "ours": begun,
            "peer": 1,
            "ratio": None,
            "unit": "steps, the most of all rounds",
            "mark": 1,
            "better": "lower",
            "rounds": args.rounds,
            "last_step_seconds": max(one["last_step"] for one in found),
            "exit_seconds": max(one["exit"] for one in found),
            "cases": found,
            **circumstances(("mm", "torch")),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
