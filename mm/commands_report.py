"""`mm report`: curves, confusion, retrieval, pictures and every number of a run in one HTML file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm.usage import Parser, UsageError, number

if TYPE_CHECKING:
    from mm.config import TrainConfig


def report(argv: Sequence[str]) -> int:
    parser = Parser("report", "One HTML file about a run: curves, pictures, retrieval, confusion, all numbers.")
    parser.add_argument("run", metavar="RUN", help="run folder; results that mm evaluate --out wrote into it are shown")
    parser.add_argument("--data", metavar="SHARDS", help="whose pictures are found and drawn (default: data.val)")
    parser.add_argument("--out", metavar="FILE", help="the page to write (default: RUN/report.html)")
    parser.add_argument("--draw", type=number(int, 0), default=16, metavar="N", help="captions drawn (default: 16)")
    parser.add_argument("--limit", type=number(int, 2), default=1000, metavar="N", help="pictures read (default: 1000)")
    args = parser.read(argv)
    run = Path(args.run)
    out = Path(args.out) if args.out else run / "report.html"
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UsageError(f"--out {out}: the report is an HTML file; end its name in .html")

    from mm.evaluation.report_run import run_facts, write_run_report

    config, _, _ = run_facts(run)
    files, notes = _files(config, args.data)
    inference = None
    if files and (run / "export").is_dir():
        import mm

        inference = mm.load(str(run)).inference
        inference.bf16 = True  # as in an evaluation
    elif files:
        notes.append("pictures: the run has no export/ yet; it is written when training ends")
        if args.data:
            print(f"mm report: {notes[-1]}", file=sys.stderr)
    left_out = write_run_report(
        run,
        out,
        inference=inference,
        files=files if inference is not None else (),
        draw=args.draw,
        limit=args.limit,
        notes=notes,
        progress=True,
    )
    for line in left_out:
        print(f"left out: {line}")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, one file that needs no other")
    return 0


def _files(config: TrainConfig | None, data: str | None) -> tuple[list[str], list[str]]:
    """Shards whose pictures are shown, and why there are none. Raises ValueError where `data` names none."""
    from mm.data.shards import expand

    if data is not None:
        return expand(data), []
    spec = config.data.val if config is not None else ""
    if not spec:
        return [], ["pictures: the run has no data.val; --data SHARDS names some"]
    try:
        return expand(spec), []
    except ValueError:
        return [], [f"pictures: data.val = {spec} is not there any more; --data SHARDS says where it is"]
