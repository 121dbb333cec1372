"""What streaming libraries do with the same small data set, found by running them, each in an environment of its own.

mm, the pipeline of open_clip's trainer, webdataset, mosaicml-streaming and litData, used as their documentation says by
`peers/probe_*.py`, with two workers and two processes. Prints a Markdown table; `--out` writes it with the evidence of
every cell; `--only NAME` asks one library. A minute or two a library.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import circumstances
from _peers import LIBRARIES, Library
from _questions import Answer, Interview

QUESTIONS: dict[str, Callable[[Interview], Answer]] = {
    "reads plain WebDataset tars as they are": Interview.tars,
    "an epoch has every sample once: 2 workers": Interview.once,
    "… 2 processes, shards of unequal size, equal batches": Interview.once_uneven,
    "same order again with the same seed": Interview.again,
    "same global batches with 0, 1 and 2 workers": Interview.any_workers,
    "same global batches with 1 and 2 processes": Interview.any_world,
    "resume in the epoch: exactly the rest": Interview.resume,
    "… with another number of workers": Interview.resume_workers,
    "… with another number of processes": Interview.resume_world,
    "weighted mixture: resume": Interview.mixture,
    "a truncated shard": Interview.cut,
    "a pickled field that nobody asked for": Interview.pickled,
}
COLUMNS = ("mm", "open_clip", "webdataset", "mosaicml-streaming", "litData")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write table and evidence to this JSON file")
    parser.add_argument("--only", choices=[library.name for library in LIBRARIES], help="ask one library")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args()
    results = {library.name: ask(library) for library in LIBRARIES if args.only in (None, library.name)}
    table = markdown(results)
    about = {"name": "streaming libraries, by running them", **circumstances(("torch",))}
    if args.out is not None:
        whole = {**about, "libraries": results, "table": table}
        args.out.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table)
    if args.json:
        held = {name: sum(a["good"] for a in result["answers"].values()) for name, result in results.items()}
        ours, peer = held.get("mm", 0), max((n for name, n in held.items() if name != "mm"), default=0)
        marks = {"unit": f"of {len(QUESTIONS)} properties held", "mark": 1.0, "better": "higher", "rounds": 1}
        print(json.dumps({**about, "ours": ours, "peer": peer, "ratio": ours / max(peer, 1), **marks, "held": held}))


def ask(library: Library) -> dict[str, Any]:
    """Version and answers of one library; where it cannot be installed or convert its data, why, and no answers."""
    with tempfile.TemporaryDirectory(prefix="streaming-peers-") as folder:
        try:
            interview = Interview(library, Path(folder))
        except RuntimeError as error:
            return {"version": "(not run)", "problem": str(error), "answers": {}}
        answers = {}
        for question, answer in QUESTIONS.items():
            found = answer(interview)
            answers[question] = {"cell": found.cell, "good": found.good, "evidence": found.evidence}
            print(f"{library.name}: {question}: {found.cell}", file=sys.stderr, flush=True)
        return {"version": interview.version, "answers": answers}


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One row a question; webdataset's column names what version 0.2.86 does otherwise."""
    columns = [name for name in COLUMNS if name in results] or list(results)
    head = [f"{name} {results[name]['version']}" for name in columns]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(columns) + 1) + "|"]
    for question in QUESTIONS:
        cells = []
        for name in columns:
            cell = results[name]["answers"].get(question, {}).get("cell", "not run")
            old = results.get("webdataset 0.2", {"answers": {}})["answers"].get(question, {}).get("cell", cell)
            differs = name == "webdataset" and re.sub(r"\d+", "", old) != re.sub(
                r"\d+", "", cell
            )  # not by chance alone
            cells.append(f"{cell} (0.2.86: {old})" if differs else cell)
        lines.append(f"| {question} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
