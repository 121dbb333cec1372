"""The command `mm`: its help, which function a command is, and how an error leaves the program."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from mm.commands import COMMANDS
from mm.fields import suggestion
from mm.usage import UsageError

HELP = """\
mm: shared vision and text encoders, trained by a contrastive and a diffusion objective

  mm demo       data, training, evaluation, pictures and a report, on an embedded real data set
                  mm demo --minutes 8 --out runs/demo
  mm shards     write, index, verify and count image-caption shards
                  mm shards folder photos shards/photos --captions photos.csv
  mm train      train what a config file describes; the same command resumes
                  mm train configs/debug.py --data.train shards/openmoji --run.steps 100
  mm checkpoints  which checkpoints a run has, and whether they are whole
                  mm checkpoints runs/demo
  mm chaos      kill, stop and starve a run of yours, break its files, and see it go on
                  mm chaos configs/debug.py --processes 2
  mm plan       memory, FLOPs, traffic, time and cost of a run on a cluster, without one
                  mm plan configs/vit_b32_cc12m.py --gpus 64 --gpu h100
  mm classify   label images with words of your own
                  mm classify runs/demo cat.png --labels cat,dog --template "an emoji of {}"
  mm generate   draw images from text, as a grid
                  mm generate runs/demo "red heart" "blue heart" --n 4 --seed 0 --out grid.png
  mm evaluate   measure a trained model on shards
                  mm evaluate runs/demo --data "shards/openmoji/val-*.tar" --out results.json
  mm release    a model as a folder that mm, open_clip, diffusers or transformers loads
                  mm release runs/demo released/demo --format open_clip

RUN: a run or released folder, or open_clip:NAME/TAG. mm COMMAND --help says more, --traceback all.
"""


def guarded(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """A command's exit code. What a user got wrong is one line on stderr and 2; `--traceback` shows the rest."""
    show = "--traceback" in argv
    try:
        return command([word for word in argv if word != "--traceback"])
    except SystemExit as stop:  # argparse's and tyro's --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("mm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `mm ... | head`: nobody reads any more, the interpreter's last flush neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if show:
            traceback.print_exc()
        print(f"mm: error: {_line(error)}", file=sys.stderr)
        return 2


def _line(error: Exception) -> str:
    """An error's message on one line; an OSError as `file: what is wrong`."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        import mm

        print(mm.__version__)
        return 0
    if argv[0] not in COMMANDS:
        raise UsageError(f"unknown command {argv[0]}{suggestion(argv[0], COMMANDS) or '; mm --help lists them'}")
    return COMMANDS[argv[0]](argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `mm ...`."""
    return guarded(_dispatch, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
