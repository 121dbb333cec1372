"""Training runs as users start them: alone or under torchrun, into a file, bounded in time, ended without a trace.

torchrun's processes have sessions of their own, so that ending its process group leaves them behind. All that belong
to a start are therefore known by a word in their environment, which Linux shows in /proc.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MARK = "MM_CHAOS"
POLL = 0.05  # seconds between two looks
_ERROR = re.compile(r"(mm|rank \d+): (\w*[Ee]rror|\w+Error): ")
_STAMP = re.compile(r"^[EWI]\d{4} [\d:.]+ \d+ \S+\] ")  # of torchrun's own lines
_OF_TORCHRUN = re.compile(r"[EWI]\d{4} |\*{5}|={5}|-{5}|Setting OMP|\[?rank\d+\]:?\[|terminate called")


class Wrong(Exception):
    """A run did something else than it should have: why, in one line."""


@dataclass(frozen=True)
class Outcome:
    """How one start ended."""

    code: int  # of the process that was started: torchrun has 1 for whatever its processes had
    text: str  # all that was said
    seconds: float
    status: str = ""  # what mm.train says to a launching script: `finished 12`, `stopped 6 15`, `failed ...`

    @property
    def lines(self) -> list[str]:
        """What was said, line by line."""
        return self.text.splitlines()

    @property
    def errors(self) -> list[str]:
        """The lines that say an error; torchrun's own account of its processes is none."""
        return [line for line in self.lines if _ERROR.match(line)]

    @property
    def tracebacks(self) -> int:
        """Of our own code: a user's mistake, or a fault, must not end in one."""
        of_torchrun = sum(f"multiprocessing.{name}" in self.text for name in ("errors.ChildFailedError", "api.Signal"))
        return self.text.count("Traceback (most recent call last)") - of_torchrun

    @property
    def resumed(self) -> int:
        """The step that the run went on from; 0 where it began anew."""
        found = re.search(r"resuming after step (\d+)", self.text)
        return int(found[1]) if found else 0

    def line(self, pattern: str) -> str:
        """The first line in which a pattern occurs. Raises Wrong where there is none."""
        for line in self.lines:
            if re.search(pattern, line):
                return _STAMP.sub("", line.strip())
        own = [line for line in self.lines if line.strip() and not _OF_TORCHRUN.match(line)]
        raise Wrong(f"no line says {pattern!r} (exit code {self.code}); the last is {own[-1] if own else 'none'!r}")


@dataclass
class Job:
    """One start, running; a context that leaves no process behind."""

    process: subprocess.Popen[bytes]
    screen: Path
    mark: str
    limit: float  # seconds
    status: Path
    begun: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self) -> Outcome:
        """Until it has ended. Raises Wrong where that takes longer than the limit."""
        self.until(lambda: self.process.poll() is not None, "ended")
        seconds = time.monotonic() - self.begun
        self.kill()  # whatever a launcher has left behind
        said = self.status.read_text(encoding="utf-8").strip() if self.status.exists() else ""
        return Outcome(self.process.returncode, _text(self.screen), seconds, said)

    def until(self, reached: Callable[[], bool], what: str) -> None:
        """Wait for a condition. Raises Wrong where it does not come within the limit, or the run has ended before."""
        while not reached():
            if time.monotonic() - self.begun > self.limit:
                raise Wrong(f"has not {what} within {self.limit:.0f} s; see {self.screen}")
            if self.process.poll() is not None and not reached():
                raise Wrong(f"ended with {self.process.returncode} before it {what}; see {self.screen}")
            time.sleep(POLL)

    def signal(self, number: int, group: bool = False) -> None:
        """To the process that was started, or to its whole group, as a terminal sends Ctrl-C."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, number)

    def kill(self) -> None:
        """End every process of this start, at once."""
        while pids := marked(self.mark):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(POLL)
        if self.process.poll() is None:  # where there is no /proc
            self.process.kill()
        self.process.wait(10)


def command(config: str, flags: Sequence[str], processes: int) -> list[str]:
    """What a user would type: `python -m mm.train CONFIG ...`, or that through torchrun."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*start, "-m", "mm.train", config, *flags]


def start(words: Sequence[str], screen: Path, limit: float, variables: Mapping[str, str]) -> Job:
    """Start a command in a session of its own; all that it says goes into the file `screen`."""
    mark, status = secrets.token_hex(8), screen.with_suffix(".status")
    environment = {name: value for name, value in os.environ.items() if name not in ("MM_FAULT", "MM_FAULT_LOG")}
    environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; one process must compute what several do
    environment |= {**variables, MARK: mark, "MM_STATUS": str(status), "PYTHONUNBUFFERED": "1"}
    with open(screen, "wb") as file:
        process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Job(process, screen, mark, limit, status)


def marked(mark: str) -> list[int]:
    """The living processes that have a mark in their environment."""
    word, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if word in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _text(screen: Path) -> str:
    return screen.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
