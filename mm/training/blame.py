"""Who holds up a run: worked out from what each process last said about itself, with no process group and no clock."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

ALONE = ("start", "compile", "data")  # phases in which no process waits for another
# where one waits for the others
WAITING = ("torch/distributed/", "torch/nn/parallel/", "torch/autograd/graph.py", " awaited")
NAMED = 3  # processes that a message names
_STATES = {
    "T": "stopped (SIGSTOP)",
    "t": "stopped by a debugger",
    "Z": "dead",
    "X": "dead",
    "D": "alive, in a disk or network wait that cannot be interrupted",
}


@dataclass(frozen=True)
class Sign:
    """One process of the run, where it is, and for how long."""

    rank: int
    host: str
    pids: str  # which numbering of processes `pid` belongs to: a container has its own
    pid: int
    phase: str
    step: int  # optimizer steps done
    changes: int  # of phase, since the start
    seconds: float  # in this phase
    frames: tuple[str, ...] = ()  # of the training thread, innermost first; empty while nothing looks wrong

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Sign:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "frames": tuple(fields["frames"])})


def here() -> tuple[str, str, int]:
    """Host, numbering of processes and process id, for a Sign."""
    host = socket.gethostname()
    pids = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return host, f"{host} {pids}", os.getpid()


def frames_of(thread: int, most: int = 5) -> tuple[str, ...]:
    """The innermost frames of a thread: `mm/data/tar.py:88 read`."""
    frame = sys._current_frames().get(thread)
    found: list[str] = []
    while frame is not None and len(found) < most:
        found.append(f"{_short(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(found)


def culprits(signs: Mapping[int, Sign], answered: Sequence[int], size: int) -> list[int]:
    """The ranks that the others wait for; empty where all of them are in the same place.

    Those that did not answer, if any. Else those that are behind: with the fewest steps; among them those in a phase
    in which nobody waits; among them those whose stack is in no collective; among them those with the fewest phases.
    """
    silent = [rank for rank in range(size) if rank not in answered]
    if silent or size == 1:
        return silent
    left = list(answered)
    fewest = min(signs[rank].step for rank in left)
    left = [rank for rank in left if signs[rank].step == fewest]
    for behind in (lambda sign: sign.phase in ALONE, lambda sign: not _waits(sign)):
        left = [rank for rank in left if behind(signs[rank])] or left
    fewest = min(signs[rank].changes for rank in left)
    left = [rank for rank in left if signs[rank].changes == fewest]
    return left if len(left) < size else []


def verdict(signs: Mapping[int, Sign], answered: Sequence[int], size: int) -> str:
    """One line for a person: since when nothing happens, who is waited for, and where that process is."""
    blamed = culprits(signs, answered, size)
    first = signs[min(answered)]
    seconds = max(signs[rank].seconds for rank in answered)
    text = f"no progress for {seconds:.0f} s at step {min(signs[rank].step for rank in answered)}"
    if size == 1:
        text += f", in {first.phase} at: {' < '.join(first.frames)}"
    elif not blamed:
        text += (
            f": all {size} processes are in {first.phase} and none is behind, so that a network link or a device "
            f"hangs; rank {first.rank} is at: {' < '.join(first.frames)}"
        )
    else:
        text += ": waiting for " + ", and ".join(_named(rank, signs, rank in answered) for rank in blamed[:NAMED])
        if len(blamed) > NAMED:
            text += f", and {len(blamed) - NAMED} more"
    return text


def advice(saved: int | None) -> str:
    """What happens now, and what to do."""
    source = "its newest checkpoint" if saved is None else f"step {saved}"
    return f"the run ends, start the same command again to go on from {source}"


def _named(rank: int, signs: Mapping[int, Sign], answered: bool) -> str:
    sign = signs.get(rank)
    if sign is None:
        return f"rank {rank}, which was never heard from"
    name = f"rank {rank} ({sign.host}, pid {sign.pid})"
    if answered:
        return f"{name}, in {sign.phase} for {sign.seconds:.0f} s at: {' < '.join(sign.frames)}"
    state = "has left the run" if sign.phase == "end" else _state(sign)
    return f"{name}, {state}, last heard from in {sign.phase} at step {sign.step}"


def _waits(sign: Sign) -> bool:
    return any(place in frame for frame in sign.frames[:3] for place in WAITING)


def _state(sign: Sign) -> str:
    """What the system knows of a process that is silent; only its own machine can be asked."""
    if sign.pids != here()[1]:
        return "silent: stopped, dead, or its machine is gone"
    try:
        with open(f"/proc/{sign.pid}/stat", encoding="utf-8", errors="replace") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return _STATES.get(letter, "alive but silent: something holds its interpreter")


def _short(path: str) -> str:
    """A source file as it is imported: mm/data/tar.py."""
    inside = [base for base in sys.path if base and path.startswith(base.rstrip(os.sep) + os.sep)]
    return os.path.relpath(path, max(inside, key=len)) if inside else path
