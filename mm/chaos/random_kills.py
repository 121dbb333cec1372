"""A run that is killed at random moments, over and over, and started again by the same command."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mm.chaos import judge
from mm.chaos.launch import Job, Wrong
from mm.chaos.suite import RIGHT, Finding, Scenario, Stage
from mm.training import manifest

LOOK = 0.01  # seconds between two looks at the clock
LONGER = 10  # times the suite's steps, or nearly every moment would be one of the start-up


def scenarios(processes: int, kills: int, seed: int) -> Iterator[Scenario]:
    """All processes at once, the launcher too, as where a machine fails."""
    if kills:
        where = f"kill -9 of all processes at {kills} random moments, start-up and saves included"
        yield Scenario("random-kills", where, partial(_random_kills, kills, seed), processes)


def _random_kills(kills: int, seed: int, stage: Stage) -> Finding:
    """Each moment is drawn uniformly from the time that an uninterrupted run takes, counted from the start.

    A run that ends before its moment is compared with the uninterrupted one, and the next kills meet a new run.
    """
    suite, chance = stage.suite, random.Random(seed)
    longer = ["--run.steps", str(LONGER * suite.steps)]
    took: list[float] = []

    def uninterrupted(other: Stage) -> None:
        other.flags += longer
        took.append(other.done(other.train()).seconds)

    reference = suite.kept("many-steps", stage.processes, uninterrupted)
    stage.flags += longer
    met: Counter[str] = Counter()
    newest = again = finished = 0
    while met.total() < kills:
        with stage.start() as job:
            phase = _kill(job, chance.uniform(0, took[0]), stage.run)
            outcome = job.wait()
        if newest and "resuming" in outcome.text and outcome.resumed != newest:
            raise Wrong(f"went on from step {outcome.resumed}, and step {newest} was whole")
        if not phase:
            stage.done(outcome)
            stage.ends_like(reference)
            shutil.rmtree(stage.run)
            newest, finished = 0, finished + 1
            continue
        met[phase] += 1
        suite.say(f"kill {met.total()} of {kills}: {phase}, step {judge.reached(stage.run)}")
        before, newest = newest, (judge.whole(stage.run) or [0])[0]
        if newest < before:
            raise Wrong(f"the newest whole checkpoint was of step {before}, and after a kill it is of step {newest}")
        again += judge.reached(stage.run) - newest
    stage.done(stage.train())
    stage.ends_like(reference)
    where = ", ".join(f"{count} {phase}" for phase, count in met.most_common())
    seen = f"{where}; {again} steps done again; {finished + 1} run{'s' if finished else ''} to the end"
    return Finding(seen, f"every one {RIGHT}" if finished else RIGHT)


def _kill(job: Job, moment: float, run: Path) -> str:
    """End every process at a moment; what the run was at. "" where it had ended before."""
    since = time.time()
    while time.monotonic() - job.begun < moment and job.process.poll() is None:
        time.sleep(LOOK)
    if job.process.poll() is not None:
        return ""
    saving = any(_written(folder, since) for folder in manifest.leftovers(run))
    training = _written(run / "metrics.jsonl", since)
    job.kill()
    return "in a save" if saving else "between saves" if training else "in start-up"


def _written(path: Path, since: float) -> bool:
    """Whether something was made or changed since a moment; a kill before it may have left it there."""
    try:
        return path.stat().st_mtime >= since
    except FileNotFoundError:
        return False
