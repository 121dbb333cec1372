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

  mm demo --minutes 8 --out runs/demo              everything below, on an embedded real data set
  mm shards folder photos shards/photos            write, index, verify and count shards
  mm train configs/debug.py --data.train SHARDS    train a config; the same command resumes
  mm checkpoints RUN                               those of a run, and whether they are whole
  mm chaos configs/debug.py --processes 2          kill and starve a run, and see it go on
  mm plan configs/x.py --gpus 64 --gpu h100        memory, time and cost on a cluster
  mm classify RUN cat.png --labels cat,dog         label images with words of your own
  mm generate RUN "red heart" --n 4                draw images from text, as a grid
  mm index RUN SHARDS --out emoji.index            embeddings of pictures, to search in
  mm search emoji.index "red heart"                the pictures nearest to words or a picture
  mm evaluate RUN --data SHARDS --out a.json       measure a trained model on shards
  mm compare a.json b.json                         what changed, and whether it is chance
  mm report RUN                                    curves, numbers and pictures in one page
  mm serve RUN --port 8000                         an HTTP API as OpenAI and Hugging Face have
  mm release RUN OUT --format open_clip            a folder that other libraries load

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
