"""What all scenarios share: the config under test, its uninterrupted run, and the steps at which things happen."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm.chaos import judge
from mm.chaos.launch import Job, Outcome, Wrong, command, start
from mm.config import ConfigError, TrainConfig

EVERY = 4  # steps between checkpoints, where the user does not say
FIRST_LIMIT = 3600.0  # seconds for the first run, compilation included
LEAST_LIMIT, SLOWER = 180.0, 6  # then a start may take so many seconds, or times as long as the first one
OWN = "mm-chaos.txt"  # marks a folder as one that the suite may empty
RIGHT = "bitwise the uninterrupted run"


@dataclass(frozen=True)
class Finding:
    """What a scenario saw; one that went wrong raises Wrong instead."""

    seen: str  # the line that told a person
    verdict: str = RIGHT
    resumed: int | None = None  # the step that the run went on from; None where it did not have to
    lost: int | None = None  # steps that were done before and had to be done again


@dataclass(frozen=True)
class Scenario:
    """One fault: its name, what is done and where, in how many processes, and how it is tried."""

    name: str
    where: str
    run: Callable[[Stage], Finding]
    processes: int


@dataclass
class Suite:
    """A user's config and flags, and a folder for everything that the suite does."""

    path: str
    config: TrainConfig
    flags: list[str]
    out: Path
    processes: int
    say: Callable[[str], None]
    limit: float = FIRST_LIMIT  # seconds for one start
    _made: dict[str, Path] = field(default_factory=dict)

    @property
    def every(self) -> int:
        """Steps between checkpoints."""
        return self.config.checkpoint.every

    @property
    def steps(self) -> int:
        """Of a whole run."""
        return self.config.run.steps

    @property
    def middle(self) -> int:
        """A step between the first checkpoint and the second, at which things happen."""
        return self.every + self.every // 2

    def reference(self, processes: int) -> Path:
        """The run folder of the uninterrupted run, made at the first call."""

        def make(stage: Stage) -> None:
            seconds = stage.done(stage.train()).seconds
            self.limit = max(LEAST_LIMIT, SLOWER * seconds) if self.limit == FIRST_LIMIT else self.limit

        return self._once(f"uninterrupted-{processes}", make, processes)

    def stopped(self, processes: int = 1) -> Path:
        """The folder of a run that was killed after its second checkpoint, made at the first call; to be copied."""

        def make(stage: Stage) -> None:
            outcome = stage.train(f"kill:step@step={2 * self.every + 2},rank=0", "--checkpoint.background", "False")
            found = judge.whole(stage.run)
            if found[:2] != [2 * self.every, self.every]:
                raise Wrong(f"two checkpoints were wanted, and {found} are there: {outcome.line('.')}")

        return self._once(f"killed-{processes}", make, processes)

    def keep(self, name: str, stage: Stage) -> None:
        """Let a run that ended well serve for comparison."""
        self._made.setdefault(name, stage.run)

    def kept(self, name: str, processes: int, make: Callable[[Stage], object]) -> Path:
        """The folder of such a run, made now where there is none yet."""
        return self._once(name, make, processes)

    def needed(self, run: Path) -> bool:
        """Whether a run folder may still be compared with."""
        return run in self._made.values()

    def _once(self, name: str, make: Callable[[Stage], object], processes: int) -> Path:
        if name not in self._made:
            stage = Stage(self, f"for-comparison-{name}", processes)
            self.say(f"{name}: making it, for comparison")
            make(stage)
            self._made[name] = stage.run
        return self._made[name]


class Stage:
    """One scenario's folder: every start of its run is the same command, and says what it says in a file there."""

    def __init__(self, suite: Suite, name: str, processes: int) -> None:
        self.suite, self.name, self.processes = suite, name, processes
        self.folder = suite.out / re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
        self.folder.mkdir(parents=True)
        self.run = self.folder / "run"
        self.flags: list[str] = []  # beyond the suite's, at every start
        self.variables: dict[str, str] = {}
        self.log = self.folder / "faults.txt"  # those that have happened
        self._starts = 0

    @contextmanager
    def start(self, faults: str = "", *flags: str, processes: int | None = None) -> Iterator[Job]:
        """The run's command, with faults on purpose; leaves no process behind."""
        self._starts += 1
        words = [*self.suite.flags, *self.flags, *flags, "--run.dir", str(self.run)]
        variables = {**self.variables, "MM_FAULT": faults, "MM_FAULT_LOG": str(self.log)}
        words = command(self.suite.path, words, processes or self.processes)
        with start(words, self.folder / f"start-{self._starts}.txt", self.suite.limit, variables) as job:
            yield job

    def train(self, faults: str = "", *flags: str, processes: int | None = None) -> Outcome:
        """One start, until it ends by itself or by the faults."""
        with self.start(faults, *flags, processes=processes) as job:
            return job.wait()

    def happened(self, fault: str) -> bool:
        """Whether a fault of this kind and point has been met."""
        return self.log.exists() and fault in self.log.read_text(encoding="utf-8")

    def copy(self, run: Path) -> None:
        """Let the scenario begin from another run's folder."""
        shutil.copytree(run, self.run)

    def done(self, outcome: Outcome) -> Outcome:
        """An outcome that is the end of the whole run. Raises Wrong where it is not."""
        if outcome.code or not outcome.status.startswith("finished"):
            raise Wrong(f"did not finish but ended with {outcome.code}: {outcome.line('.+')}")
        return outcome

    def refused(self, outcome: Outcome, pattern: str, code: int = 2) -> str:
        """The one error line of a run that had to stop. Raises Wrong where it says more, less or something else."""
        expected = code if self.processes == 1 else 1  # torchrun's, for whatever its processes had
        if outcome.code != expected:
            raise Wrong(f"ended with {outcome.code}, not {expected}")
        if len(outcome.errors) != 1 or outcome.tracebacks > 0:
            raise Wrong(f"{len(outcome.errors)} error lines and {outcome.tracebacks} tracebacks instead of one line")
        if not re.search(pattern, outcome.errors[0]):
            raise Wrong(f"the error says nothing of {pattern!r}: {outcome.errors[0]}")
        return outcome.errors[0]

    def goes_on(self, seen: str, expected: int | None = None, most_lost: int | None = None) -> Finding:
        """Start the same command again and compare the end with the uninterrupted run.

        It must go on from the newest whole checkpoint there is; `expected`: which one that has to be.
        """
        whole, reached = judge.whole(self.run), judge.reached(self.run)
        newest = whole[0] if whole else 0
        if expected is not None and newest != expected:
            raise Wrong(f"the newest whole checkpoint is of step {newest}, not {expected}; seen: {seen}")
        if most_lost is not None and reached - newest > most_lost:
            raise Wrong(f"step {reached} was reached, and step {newest} saved; seen: {seen}")
        again = self.done(self.train())
        if again.resumed != newest:
            raise Wrong(f"went on from step {again.resumed}, and step {newest} was whole; seen: {seen}")
        self.ends_like(self.suite.reference(self.processes))
        return Finding(seen, RIGHT, newest, reached - newest)

    def ends_like(self, other: Path) -> None:
        """Raises Wrong unless this run ended bitwise as another one."""
        if problem := judge.difference(self.run, other):
            raise Wrong(f"did not end as the run in {other.parent.name}: {problem}")


def prepare(path: str, overrides: Sequence[str], out: Path, processes: int, say: Callable[[str], None]) -> Suite:
    """A suite over a user's config, in an empty folder: a short run that saves often and evaluates nothing.

    What `overrides` set wins over that. Without `data.train` pictures are drawn. Raises ConfigError for a config that
    has no room for the faults.
    """
    from mm import settings
    from mm.chaos.pictures import shards
    from mm.rules import divides, validate

    short: Mapping[str, Any] = {
        "run.steps": 3 * EVERY, "run.log_every": 1, "run.eval_every": 0, "run.sample_every": 0, "run.tracker": "none",
        "data.val": "", "checkpoint.every": EVERY, "checkpoint.minutes": 0.0, "checkpoint.keep": 3,
        "parallel.threads": max(1, len(os.sched_getaffinity(0)) // processes),  # one process computes as each of many
    }  # fmt: skip
    flags = [*(f"--{name}={value}" for name, value in short.items()), *overrides]
    config = settings.override(settings.load(path), flags)
    validate(config)
    divides(config, processes)
    every, steps = config.checkpoint.every, config.run.steps
    if every < 2 or steps < 3 * every:
        problem = f"checkpoint.every = {every}, run.steps = {steps}"
        raise ConfigError(f"{problem}: faults need 2 steps between saves and 3 saves; leave them out for 4 and 12")
    _empty(out)
    if not config.data.train:
        flags += ["--data.train", str(shards(out / "shards", 6 * config.data.batch_size) / "train-*.tar")]
    return Suite(path, config, flags, out, processes, say)


def _empty(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / OWN).exists():
        raise ConfigError(f"--out {out}: holds something else; name a new folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / OWN).write_text("made by mm chaos, which empties this folder at its next start\n", encoding="utf-8")
