"""Evaluate many models on many data sets: tools/evaluate.py LIST OUT.

LIST has the arguments of one `mm evaluate` a line; # begins a comment, - is standard input:

    runs/a    --data data/wds_food --tasks classification
    runs/a    --data data/wds_food --split train --templates openai
    open_clip:ViT-B-32/openai --data data/wds_flickr8k

Each goes to a folder of its own in OUT, as `mm evaluate --out FOLDER/ --resume` writes it: started again, the script
leaves alone what is there with the same hashes of model, data and task. OUT/table.csv then has a line a metric, with
its standard error. A line that fails is told and passed over; the exit code is 2 then, 130 after Ctrl-C.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mm.cli import guarded, main
from mm.usage import Parser, UsageError

COLUMNS = ("folder", "model", "pretrained", "dataset", "name", "task", "metric", "value", "error", "n")


def evaluate_all(argv: Sequence[str]) -> int:
    parser = Parser("", "Evaluates what the lines of a file say; see the text at the top of this script.")
    parser.prog = "tools/evaluate.py"
    parser.add_argument("list", metavar="LIST", help="a file with the arguments of an `mm evaluate` a line")
    parser.add_argument("out", metavar="OUT", help="the folder for the results")
    args = parser.read(argv)
    from mm.evaluation.files import read_lines
    from mm.evaluation.images import write_whole

    jobs = [words for line in read_lines(args.list, "arguments of mm evaluate") if (words := _split(args.list, line))]
    folders = [Path(args.out) / _name(words) for words in jobs]
    done: list[Path] = []
    for number, (words, folder) in enumerate(zip(jobs, folders, strict=True), 1):
        print(f"[{number}/{len(jobs)}] {shlex.join(words)}", flush=True)
        code = main(["evaluate", *words, "--out", f"{folder}/", "--resume"])
        if code == 130:
            return code
        done += [folder] if code == 0 else []
    write_whole(Path(args.out) / "table.csv", table(done).encode())
    print(f"{len(done)} of {len(jobs)} evaluated: {Path(args.out) / 'table.csv'}")
    return 0 if len(done) == len(jobs) else 2


def _split(file: str, line: str) -> list[str]:
    """The words of a line; none of a comment. Raises UsageError."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise UsageError(f"{file}: {line[:60]!r}: {error}") from error
    taken = next((word for word in words if word.split("=")[0] in ("--out", "--resume")), None)
    if taken:
        raise UsageError(f"{file}: {line[:60]!r}: leave {taken} out; each line has a folder of its own")
    return words


def _name(words: Sequence[str]) -> str:
    """A folder for a line: what it begins with, and a hash of all of it."""
    shown = re.sub(r"[^\w.-]+", "_", "_".join(word for word in words if not word.startswith("--"))).strip("_.")
    return f"{shown[-80:]}-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]}"


def table(folders: Sequence[Path]) -> str:
    """CSV of the results in some folders."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for folder in folders:
        for row in json.loads((folder / "results.json").read_text(encoding="utf-8"))["tasks"]:
            about = [folder.name, *(row[name] for name in COLUMNS[1:6])]
            for metric, value in row["metrics"].items():
                writer.writerow([*about, metric, value, row["errors"][metric], row["n"][metric]])
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(guarded(evaluate_all, sys.argv[1:]))
