"""A thread that notices when a run makes no progress, says which process holds it up, and ends every process.

A collective that waits for ever cannot be interrupted: the process ends hard, so that its launcher starts the job again
or ends it. While the training thread runs Python or waits outside of it, stacks are written; what holds the interpreter
itself silences its own watchdog, and the other processes then name that one.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from mm.distributed.world import World
from mm.training.blame import Sign, advice, culprits, frames_of, here, verdict
from mm.training.logs import dump_flight_recorder, folder

STALLED = 75  # the exit code: a failure that may pass, EX_TEMPFAIL of sysexits.h
PATIENT = {"start": 5.0, "compile": 5.0, "evaluate": 5.0, "save": 5.0}  # phases that may take so many times longer
BEAT = 5.0  # seconds between two signs of life, at most
GONE = 60.0  # seconds without progress after which a store that is gone ends the run
SILENT = 6  # signs of life that are due before a process that sends none is no longer waited for with patience
EVENTS = 200  # changes of phase that are remembered

T = TypeVar("T")


class Watchdog:
    """Watches the thread that enters it. `stall_seconds` 0: never.

    `tell` says one line to a person (`logs.redirect` returns one). The store is torch.distributed's own, unless another
    is given. To be made by all processes at once.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        stall_seconds: float,
        *,
        store: Any = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.run, self.world, self.stall_seconds = run, world, stall_seconds
        self.saved: int | None = None  # the step that a new start would go on from, where the loop says so
        self.tell = tell or (lambda line: _write(2, f"{line}\n"))
        self.beat = min(BEAT, stall_seconds / 4)
        self.store: Any = None
        if stall_seconds > 0 and world.size > 1:
            self.store = _own_store(world) if store is None else store
        self._events: collections.deque[tuple[float, str, int]] = collections.deque(maxlen=EVENTS)
        self._now, self._here = ("start", 0, time.monotonic(), 0), here()  # phase, step, since, changes
        self._alarm, self._over = threading.Event(), threading.Event()
        self._lost = False  # the store is gone
        self._threads: list[threading.Thread] = []

    def at(self, phase: str, step: int) -> None:
        """The training thread enters a phase, `step` steps done. Cheap: nothing is written."""
        self._now = (phase, step, time.monotonic(), self._now[3] + 1)
        self._events.append((time.time(), phase, step))

    def __enter__(self) -> Watchdog:
        self._main = threading.get_ident()
        self.at("start", self._now[1])
        if self.stall_seconds > 0:
            for work in (self._watch, *([self._publish] if self.store is not None else [])):
                self._threads.append(threading.Thread(target=work, daemon=True, name=f"watchdog {work.__name__}"))
                self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.at("end", self._now[1])
        self._over.set()
        for thread in self._threads:
            thread.join(2)

    def sign(self, frames: bool = True) -> Sign:
        """Where this process is now."""
        (phase, step, since, changes), (host, pids, pid) = self._now, self._here
        stack = frames_of(self._main) if frames else ()
        return Sign(self.world.rank, host, pids, pid, phase, step, changes, time.monotonic() - since, stack)

    def _publish(self) -> None:
        """Signs of life, and news of a stall. In a thread of its own, for a store that is stopped never answers."""
        try:
            while True:
                last = self._over.is_set()
                long = time.monotonic() - self._now[2] > self.stall_seconds / 2
                self.store.set(f"sign/{self.world.rank}", self.sign(frames=long).to_json())
                if self.store.check(["stall"]):
                    self._alarm.set()
                if last:
                    return
                self._over.wait(self.beat)
        except RuntimeError:  # torch's errors of a store
            self._lost = True

    def _watch(self) -> None:
        tick = min(1.0, self.stall_seconds / 10)
        quiet, seen, allowed, last = 0.0, -1, 0.0, time.monotonic()
        awake, heard = 0.0, {}  # type: float, dict[int, tuple[Sign, float]]
        while not self._alarm.wait(tick):
            if self._over.is_set():
                return
            now = time.monotonic()
            phase, _, _, changes = self._now
            if changes != seen:
                quiet, seen, allowed = 0.0, changes, self._allowed(phase)
            spent = min(now - last, 3 * tick)  # not the time in which this process itself was suspended
            quiet, awake, last = quiet + spent, awake + spent, now
            if self._lost and quiet > min(allowed, GONE):
                break
            if quiet > allowed:
                allowed = min(self._allowed_to_others(heard, awake), quiet + self.beat)  # and then asks again
                if quiet > allowed:
                    break
        self._end()

    def _allowed_to_others(self, heard: dict[int, tuple[Sign, float]], now: float) -> float:
        """The longest that a living process' phase may take; `heard` keeps each one's newest sign and when it came.

        A process that is stopped sends none: its last, from a phase that may take long, must not hold back the rest.
        """
        signs = _within(self.beat, self._signs) if self.store is not None else None
        for rank, sign in (signs or {}).items():  # a store that is slow for once changes nothing
            if rank not in heard or heard[rank][0] != sign:
                heard[rank] = sign, now
        alive = (sign for sign, came in heard.values() if now - came < SILENT * self.beat)
        return max((self._allowed(sign.phase) for sign in alive), default=0.0)

    def _allowed(self, phase: str) -> float:
        return self.stall_seconds * PATIENT.get(phase, 1.0)

    def _end(self) -> None:
        """Write what is known, agree on who is to blame, say it once, and end this process."""
        sign, rank, grace = self.sign(), self.world.rank, 2 * self.beat + 2.0
        path = self.run / "logs" / f"stall-rank-{rank}.txt"
        heard = self.store is not None and not self._lost and _within(grace, lambda: self._answer(sign))
        wrote = _within(10.0, lambda: self._write_stacks(path))
        _within(10.0, lambda: dump_flight_recorder(self.run, rank))
        end = f"{f'stacks in {path.parent}' if wrote else 'no stacks could be written'}; {advice(self.saved)}"
        found = None
        if self.store is None:
            found = verdict({rank: sign}, [rank], 1), rank
        elif heard:
            found = _within(2 * grace + 5.0, lambda: self._confer(grace))
        text, speaker = found or (
            f"no progress for {sign.seconds:.0f} s at step {sign.step}, in {sign.phase}: the store of the process "
            "group does not answer, so that rank 0 or its launcher is stopped or gone",
            rank,
        )
        if speaker == rank:
            _within(5.0, lambda: self.tell(f"{text}; {end}"))
        _within(5.0, lambda: _append(path, f"\n{text}\n"))
        _within(1.0, lambda: (sys.stdout.flush(), sys.stderr.flush()))
        time.sleep(1.0)  # a launcher kills the others once the first is gone: by then they have said what they know
        os._exit(STALLED)

    def _answer(self, sign: Sign) -> bool:
        self.store.set(f"answer/{sign.rank}", sign.to_json())
        self.store.set("stall", str(sign.rank))
        return bool(self.store.check(["stall"]))

    def _confer(self, grace: float) -> tuple[str, int]:
        """The text of all processes, and the rank that says it: the lowest that answered judges for all."""
        rank, size, store = self.world.rank, self.world.size, self.store
        store.add("written", 1)
        _until(lambda: store.add("written", 0) >= size, grace)
        if next(other for other in range(size) if store.check([f"answer/{other}"])) == rank:
            answers = self._signs("answer")
            signs = {**self._signs(), **answers}
            blamed = culprits(signs, list(answers), size)
            speaker = min([other for other in answers if other not in blamed] or answers)
            store.set("verdict", json.dumps([verdict(signs, list(answers), size), speaker]))
        _until(lambda: store.check(["verdict"]), grace + 5.0)
        text, speaker = json.loads(store.get("verdict"))
        return text, speaker

    def _signs(self, kind: str = "sign") -> dict[int, Sign]:
        """What the processes that have one have put in the store."""
        names = {rank: f"{kind}/{rank}" for rank in range(self.world.size)}
        if not self.store.check(list(names.values())):
            names = {rank: name for rank, name in names.items() if self.store.check([name])}
        found = [Sign.from_json(text) for text in self.store.multi_get(list(names.values()))]
        return {sign.rank: sign for sign in found}

    def _write_stacks(self, path: Path) -> bool:
        folder(self.run)
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"== {time.strftime('%F %T %z')} {self._here[0]} pid {self._here[2]}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\nLast phases, with the steps done:\n")
            for moment, phase, step in list(self._events):
                file.write(f"{time.strftime('%T', time.localtime(moment))}.{moment % 1 * 1000:03.0f} {step} {phase}\n")
        return True


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """The result of work that may hang (a disk, a pipe, a store) or fail, which then is None.

    Nothing may keep a stalled run alive.
    """
    box: list[T] = []

    def attempt() -> None:
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            box.append(work())

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return box[0] if box else None


def _own_store(world: World) -> Any:
    """A connection of its own: on a shared one, an operation of the training thread that hangs would block this one's.

    Under a name that no earlier start of the job has used, for a launcher's store outlives the processes.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store().clone()
    store.set_timeout(timedelta(seconds=BEAT))
    return dist.PrefixStore(f"watchdog/{world.share(secrets.token_hex(8))}", store)


def _until(reached: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not reached() and time.monotonic() < end:
        time.sleep(0.2)


def _write(file: int, text: str) -> None:
    os.write(file, text.encode())


def _append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
