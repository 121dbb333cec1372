"""`mm evaluate`, `mm compare` and `mm report`: a model measured, two results compared, a page about a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.usage import RUN, Parser, UsageError


def evaluate(argv: Sequence[str]) -> int:
    parser = Parser("evaluate", "Measures a trained model on shards.")
    parser.add_argument("run", metavar="RUN", help=RUN)
    parser.add_argument("--data", metavar="SHARDS", required=True, help="a folder, a pattern, or several joined by ::")
    parser.add_argument("--labels-from", metavar="SHARDS", help="shards of the whole label set (default: all splits)")
    parser.add_argument("--tasks", help="comma-separated (default: zero_shot,generation, or what the model can)")
    parser.add_argument("--out", metavar="FILE", help="write the results there too, as JSON")
    args = parser.read(argv)
    tasks = None if args.tasks is None else [task.strip() for task in args.tasks.split(",") if task.strip()]
    if tasks == []:
        raise UsageError(f'--tasks "{args.tasks}": names no task; try zero_shot,generation')
    from mm.evaluation.run import evaluate as run
    from mm.evaluation.run import summary

    elsewhere: dict[str, Any] = {"load": _elsewhere} if ":" in args.run and not Path(args.run).exists() else {}
    show = sys.stderr.isatty()
    found = run(
        args.run, data=args.data, tasks=tasks, candidates=args.labels_from, out=args.out, progress=show, **elsewhere
    )
    print(summary(found))
    return 0


def _elsewhere(source: str) -> Any:
    """Another library's model as `mm.evaluation.run` takes it."""
    from mm.interop.sources import read

    origin = read(source)
    return origin.build().float(), origin.extras(), origin.config(), origin.note
