"""`mm evaluate` and `mm compare`: a model measured, and two results compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.usage import RUN, Parser, UsageError, number


def evaluate(argv: Sequence[str]) -> int:
    parser = Parser("evaluate", "Measures a trained model on shards.")
    parser.add_argument("run", metavar="RUN", help=RUN)
    parser.add_argument(
        "--data",
        metavar="SHARDS",
        required=True,
        help="a folder, a pattern, several joined by ::, or a folder as CLIP_benchmark has it (test/nshards.txt)",
    )
    parser.add_argument("--split", help="which split of a folder (default: test, of CLIP_benchmark's folders)")
    parser.add_argument("--labels-from", metavar="SHARDS", help="shards of the whole label set (default: all splits)")
    parser.add_argument(
        "--tasks",
        help="comma-separated names or TOML files: zero_shot, classification, retrieval, generation, probe, "
        "robustness, fidelity, denoising (default: what the data are for, or zero_shot,generation as the model can)",
    )
    parser.add_argument("--out", metavar="PATH", help="write the results there too: a JSON file, or a folder/")
    parser.add_argument("--records", metavar="FILE", help="write what is known of each sample: .jsonl or .parquet")
    parser.add_argument("--resume", action="store_true", help="leave what is at --out if its hashes are the same")
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="samples that a task looks at, or draws")
    parser.add_argument("--steps", type=number(int, 1), help="of drawing")
    parser.add_argument("--guidance", type=number(float, 0), help="of drawing; 1 is none")
    parser.add_argument("--seed", type=number(int, 0), help="of what a task draws (default: 0)")
    parser.add_argument("--classes", metavar="NAMES", help="imagenet, or a file with a class name a line")
    parser.add_argument("--templates", help='openai, simple, a file with one a line, or "a photo of a {}"')
    parser.add_argument("--temperature", type=number(float, 0, above=True), help="divides logits, for calibration")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="of matrix products (default: bf16)")
    parser.add_argument("--workers", type=number(int, 0), metavar="N", help="decoding processes (default: none)")
    args = parser.read(argv)
    tasks = None if args.tasks is None else [task.strip() for task in args.tasks.split(",") if task.strip()]
    if args.resume and args.out is None:
        raise UsageError("--resume: there is nothing to go on with; give --out too")
    if tasks == []:
        raise UsageError(f'--tasks "{args.tasks}": names no task; try zero_shot,generation')
    from mm.evaluation.run import evaluate as run
    from mm.evaluation.run import summary

    foreign = ":" in args.run and not Path(args.run).exists()
    named = any(task.endswith(".toml") for task in tasks or ())  # such a task may compare pictures by another's encoder
    options: dict[str, Any] = {"load": elsewhere} if foreign or named else {}
    for name in ("split", "records", "precision", "workers"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    names = ("limit", "steps", "guidance", "seed", "classes", "templates", "temperature")
    if args.resume:
        options["resume"] = True
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if settings:
        options["settings"] = settings
    show = sys.stderr.isatty()
    found = run(
        args.run, data=args.data, tasks=tasks, candidates=args.labels_from, out=args.out, progress=show, **options
    )
    print(summary(found))
    return 0


def compare(argv: Sequence[str]) -> int:
    parser = Parser("compare", "Two results of mm evaluate, metric by metric: what changed, and whether by chance.")
    for name in ("A", "B"):
        parser.add_argument(name.lower(), metavar=name, help="results of mm evaluate --out: a JSON file, or the folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.read(argv)
    from mm.evaluation.compare import compare as run
    from mm.evaluation.compare import read_result
    from mm.evaluation.compare_table import table, what_differs

    a, b = read_result(args.a), read_result(args.b)
    if args.json:
        found = {"a": args.a, "b": args.b, "metrics": [one.row() for one in run(a, b)]}
        print(json.dumps({**found, "differs": what_differs(a, b)}))
    else:
        print(table(a, b, (args.a, args.b)))
    return 0


def elsewhere(source: str) -> Any:
    """Another library's model as `mm.evaluation.run` takes it."""
    from mm.interop.sources import read

    origin = read(source)
    return origin.build().float(), origin.extras(), origin.config(), origin.note
