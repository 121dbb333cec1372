"""Processes that die, hang or are told to stop: in a save, inside a collective, in a step, a wait, an evaluation."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mm.chaos.launch import Wrong
from mm.chaos.suite import Finding, Scenario, Stage

# The points of a save in their order, as mm.training.checkpoint lists them; those from `renamed` on: rank 0 alone.
POINTS = ("begin", "staged", "written", "hashed", "manifest", "renamed", "latest", "pruned")
SHARED = POINTS[: POINTS.index("manifest")]
COMMITTED = POINTS[POINTS.index("renamed") :]  # the new checkpoint counts

STALL_SECONDS = 8.0  # health.stall_seconds where a process hangs
SIGNALS = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1, "INT": signal.SIGINT}
NAMES = {"TERM": "TERM to the launcher", "USR1": "USR1 to the last process", "INT": "Ctrl-C (INT to all)"}
ALONE = {"TERM": "TERM", "USR1": "USR1", "INT": "Ctrl-C"}
PLACES = {"step": "in a step", "evaluate": "in an evaluation", "data": "waiting for data", "save.written": "in a save"}


def scenarios(processes: int) -> Iterator[Scenario]:
    """Kills in a save and in a collective, hangs, and signals."""
    for rank in range(min(processes, 2)):
        for point in POINTS if rank == 0 else SHARED:
            where = f"kill -9 of rank {rank} at save.{point} of the second checkpoint"
            yield Scenario(f"kill-save.{point}-rank{rank}", where, partial(_kill_in_save, point, rank), processes)
    for kind in ("kill", "stop"):
        for rank in range(2 if processes > 1 else 0):
            done = "kill -9" if kind == "kill" else "SIGSTOP"
            where = f"{done} of rank {rank} inside a collective of a step"
            yield Scenario(f"{kind}-collective-rank{rank}", where, partial(_in_collective, kind, rank), processes)
    for name in SIGNALS:
        for point, place in PLACES.items():
            where = f"{(NAMES if processes > 1 else ALONE)[name]}, {place}"
            yield Scenario(f"{name.lower()}-{point}", where, partial(_signal, name, point), processes)


def _kill_in_save(point: str, rank: int, stage: Stage) -> Finding:
    every = stage.suite.every
    outcome = stage.train(f"kill:save.{point}@step={2 * every},rank={rank}")
    if stage.processes == 1:
        seen = f"exit code {outcome.code}"
        if outcome.code != -signal.SIGKILL:
            raise Wrong(f"was not killed: {seen}")
    else:
        seen = outcome.line(rf"local_rank: {rank}\b|exitcode *: -9|Signal 9")
    return stage.goes_on(seen, expected=2 * every if point in COMMITTED else every)


def _in_collective(kind: str, rank: int, stage: Stage) -> Finding:
    """The victim enters a collective and waits there for the other process, which comes late."""
    step, other = stage.suite.middle, 1 - rank
    deed = f"{'kill' if kind == 'kill' else 'hang'}:step@step={step},rank={rank},after=3"
    faults = f"{deed};stall:step@step={step},rank={other},for=5"
    if kind == "kill":
        outcome = stage.train(faults)
        # the machine's first process speaks for all that are left; if it is the one that died, torchrun does
        return stage.goes_on(outcome.line("error: another process ended" if rank else r"exitcode *: -9"))
    stage.flags += ["--health.stall_seconds", str(STALL_SECONDS)]
    stage.variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "5"  # seconds that torchrun waits for a process that is stopped
    outcome = stage.train(faults)
    seen = outcome.line("no progress for")
    if f"waiting for rank {rank} (" not in seen or "stopped (SIGSTOP)" not in seen:
        raise Wrong(f"names another process, or none: {seen}")
    if float(re.search(r"no progress for (\d+) s", seen)[1]) > 2 * STALL_SECONDS:  # type: ignore[index]
        raise Wrong(f"took longer than health.stall_seconds = {STALL_SECONDS:.0f} allows: {seen}")
    return stage.goes_on(seen)


def _signal(name: str, point: str, stage: Stage) -> Finding:
    """The signal comes while the run is at the point; what was reached is saved, and not a step of it is lost."""
    suite = stage.suite
    # training goes on beside the first save, but does not begin the second before it is over
    step = suite.every if point in ("evaluate", "save.written") else suite.middle
    if point == "evaluate":
        stage.flags += ["--data.val", _validation(suite.out), "--run.eval_every", str(suite.every)]
    lasting = 600 if point in ("evaluate", "data") else 3  # those are left at once, the others when they are over
    if name == "USR1":  # to one process alone: the others must hear of it
        rank = stage.processes - 1
        late = "" if point == "save.written" else ",after=1"
        faults = f"usr1:{point}@step={step},rank={rank}{late};stall:{point}@step={step},rank={rank},for={lasting}"
        outcome = stage.train(faults)
    else:
        with stage.start(f"stall:{point}@step={step},for={lasting}") as job:
            job.until(lambda: stage.happened(f"stall:{point}"), f"come to {point}")
            job.signal(SIGNALS[name], group=name == "INT")
            outcome = job.wait()
    number = int(SIGNALS[name])
    if outcome.code != (128 + number if stage.processes == 1 else 1):
        raise Wrong(f"ended with {outcome.code}; {outcome.line('.')}")
    seen = outcome.line(f"stopped by signal {number} after step")
    if not outcome.status.startswith("stopped ") or not outcome.status.endswith(f" {number}"):
        raise Wrong(f"says {outcome.status!r}, not that it was stopped by signal {number}")
    if stage.processes > 1 and name == "USR1":
        outcome.line(rf"exitcode *: {128 + number}")
    return stage.goes_on(seen, most_lost=0)


def _validation(out: Path) -> str:
    """Pictures to evaluate on, drawn at the first call."""
    from mm.chaos.pictures import shards

    folder = out / "validation"
    return str((folder if folder.exists() else shards(folder, 2)) / "val-*.tar")
