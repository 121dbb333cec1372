"""`mm train`, and `python -m mm.train` under torchrun: a config file, overrides, and the training loop."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mm import config as settings

USAGE = """\
usage: mm train CONFIG [--section.field value ...]

  mm train configs/debug.py --data.train shards/train-{000000..000003}.tar --run.steps 100

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
    config = settings.override(settings.load(argv[0]), argv[1:])
    settings.validate(config)
    if not config.data.train:
        raise settings.ConfigError("data.train = '': names no shards; add --data.train FOLDER or a pattern")

    from mm.distributed.device import pick_device
    from mm.distributed.world import joined
    from mm.evaluation.callbacks import callbacks
    from mm.training.loop import Stopped, run

    device = pick_device(config.parallel)
    with joined(device, config.parallel.timeout) as world:
        try:
            done = run(config, callbacks, world=world)
        except Stopped as stopped:
            if world.main:
                print(f"mm: {stopped}", file=sys.stderr)
                _tell(f"stopped {stopped.step} {stopped.signal}")
            return stopped.exit_code
        except Exception as error:
            if world.main:
                _tell(f"failed {error}")
            raise
        if world.main:
            _tell(f"finished {done['step']}")
    return 0


def _tell(outcome: str) -> None:
    """One line for the script that launched this: finished STEP, stopped STEP SIGNAL or failed MESSAGE."""
    if path := os.environ.get("MM_STATUS"):
        with open(path, "w", encoding="utf-8") as file:
            file.write(" ".join(outcome.split()) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `python -m mm.train CONFIG [overrides]`: as `mm train`, errors in one line."""
    from mm.cli import guarded

    return guarded(train, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
