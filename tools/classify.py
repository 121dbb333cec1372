"""Label the pictures of a folder, of shards or of a list on stdin, and write a folder; for batch jobs and pipes.

    tools/classify.py RUN LABELS OUT photos/ --templates simple --workers 4
    tools/classify.py RUN LABELS OUT --shards 'shards/val-*.tar' --captions txt
    find photos -newer last -name '*.jpg' | tools/classify.py RUN LABELS OUT

LABELS is a file with one label a line. OUT gets predictions.jsonl, one object a picture, and summary.json: how many
pictures each label was the likeliest of, and which could not be read and why. Both are there once the job has ended.
Everything else is a flag of `mm classify`, which does the work. A picture that cannot be read is told on stderr and
left out, and the exit code is then 1; with --errors stop it ends the job.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mm.cli import guarded, main
from mm.commands_classify import STDIN, parser
from mm.usage import UsageError


def run(argv: list[str]) -> int:
    """The exit code, as that of `mm classify`. Raises UsageError."""
    if len(argv) < 3 or any(word.startswith("--") for word in argv[:3]):
        raise UsageError("tools/classify.py: begin with RUN LABELS OUT; see tools/classify.py --help")
    model, labels, out, *rest = argv
    flags = ["--labels-file", labels, "--out", str(Path(out, "predictions.jsonl")), "--errors", "skip"]
    flags += ["--summary", str(Path(out, "summary.json"))]
    words = [model, *flags, *rest]
    args = parser().read([word for word in words if word != "--traceback"])
    return main(["classify", *words, *([] if args.images or args.shards is not None else [STDIN])])


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0)
    sys.exit(guarded(run, sys.argv[1:]))
