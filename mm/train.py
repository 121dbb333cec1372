"""`mm train`, and `python -m mm.train` under torchrun: a config file, overrides, and the training loop."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mm import config as settings

if TYPE_CHECKING:
    from mm.config import TrainConfig
    from mm.training.preemption import Stop
    from mm.training.prepare import Start

SPOKEN = 3.0  # seconds that a machine's first process has to say what all of its processes find wrong
USAGE = """\
usage: mm train CONFIG [--section.field value ...]

  mm train configs/debug.py --data.train shards/train-{000000..000003}.tar --run.steps 100

  torchrun --standalone --nproc-per-node 8 -m mm.train configs/x.py ...      on 8 GPUs; docs/cluster.md has the rest

CONFIG is a Python file with `def config() -> TrainConfig`; any field of it can be replaced.
`mm train CONFIG --help` lists them. The same command again resumes the run in run.dir.
"""


def train(argv: Sequence[str]) -> int:
    """Trains what `argv` describes: 0 at the end, 128 + signal where one stopped it after a save.

    Raises ConfigError before anything is built.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise settings.ConfigError(f"{argv[0]}: the config file comes first; mm train configs/x.py {argv[0]} ...")
    with _said_once():
        config = settings.override(settings.load(argv[0]), argv[1:])
        start = started(config)
        settings.validate(config)
        if not config.data.train:
            raise settings.ConfigError("data.train = '': names no shards; add --data.train FOLDER or a pattern")

    from mm.training.preemption import Stop

    with Stop().listening() as stop:  # before the slow imports: a scheduler may change its mind at once
        return _together(config, stop, start)


def started(config: TrainConfig) -> Start | None:
    """What `config.start` names, with `config.model` given its shapes; None where it names nothing."""
    if not any((config.start.model, config.start.image, config.start.text, config.start.denoiser)):
        return None
    from mm.interop.start import resolve

    return resolve(config)


def _together(config: TrainConfig, stop: Stop, start: Start | None = None) -> int:
    """Train with all processes that torchrun started, or alone; the exit code, once this process has said why."""
    from mm.distributed.device import pick_device
    from mm.distributed.world import expected, joined
    from mm.evaluation.callbacks import callbacks
    from mm.training import logs
    from mm.training.checkpoint import SaveFailed
    from mm.training.loop import Stopped, run

    several, folder, code, met = expected() > 1, Path(config.run.dir), 1, False
    rank = int(os.environ["RANK"]) if several else 0
    tell: Callable[[str], None] = _tell
    if several:
        with _said_once(stop):
            logs.prepare_flight_recorder(folder)
            tell = logs.redirect(folder, rank)
    try:
        with joined(pick_device(config.parallel), config.parallel.timeout) as world:
            met = True
            try:
                outcome, code = (
                    f"finished {run(config, callbacks, world=world, tell=tell, stop=stop, start=start)['step']}",
                    0,
                )
            except Stopped as stopped:
                outcome, code = f"stopped {stopped.step} {stopped.signal}", stopped.exit_code
                if world.main:
                    tell(str(stopped))
            if world.main:
                _report(outcome)  # while signals are still held: the launcher's may come now
    except Exception as error:
        lost = several and _left_alone(error)
        if rank == 0:
            _report(f"{'lost' if lost else 'failed'} {error}")
        if isinstance(error, SaveFailed):
            if rank == 0:
                tell(f"error: {error}")
        elif lost:
            with open(logs.folder(folder) / f"rank-{rank}.txt", "a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one voice a machine
                tell(
                    f"error: another process ended or does not answer ({_first_line(error)}); what it said is above or "
                    f"in {folder / 'logs'}; start the same command again to go on from the newest checkpoint"
                )
        else:
            if rank and not (met and isinstance(error, ValueError)):  # which all raise, and the first one says
                tell(f"{type(error).__name__}: {_first_line(error)}")
            raise
    return code


@contextmanager
def _said_once(stop: Stop | None = None) -> Iterator[None]:
    """What a user got wrong, and every process finds: the first one of a machine says it.

    The others give it time to; its end, through the launcher, is theirs.
    """
    try:
        yield
    except (ValueError, OSError):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SPOKEN)
            if stop is not None and stop.signal:
                raise SystemExit(2) from None
        raise


def _left_alone(error: Exception) -> bool:
    """Whether torch's error is that of a collective whose other end is gone or does not answer."""
    words = ("closed by peer", "connection reset", "broken pipe", "connection refused", "timed out", "remote process")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _tell(line: str) -> None:
    print(f"mm: {line}", file=sys.stderr)


def _report(outcome: str) -> None:
    """One line for the script that launched this: finished STEP, stopped STEP SIGNAL, lost or failed MESSAGE."""
    if path := os.environ.get("MM_STATUS"):
        with open(path, "w", encoding="utf-8") as file:
            file.write(" ".join(outcome.split()) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `python -m mm.train CONFIG [overrides]`: as `mm train`, errors in one line."""
    from mm.cli import guarded

    return guarded(train, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
