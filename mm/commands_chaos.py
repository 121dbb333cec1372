"""`mm chaos`: every fault that a cluster has in store, on purpose, against one's own config."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mm.commands_plan import split
from mm.config import ConfigError
from mm.usage import Parser, number


def chaos(argv: Sequence[str]) -> int:
    """Runs the fault suite: 0 where every fault was survived or stopped by one clear error, 1 where not."""
    parser = Parser(
        "chaos",
        "Trains without interruption, then again under one fault after another, and compares the ends bit for bit. "
        "Without data.train it draws its own pictures. --section.field value replaces a field of the config.",
        usage="mm chaos [CONFIG] [--processes N] [--faults A,B] [--kills N] [--out DIR] [--json] "
        "[--section.field value ...]",
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", default="configs/debug.py",
                        help="a Python file with `def config()` (default: configs/debug.py)")  # fmt: skip
    parser.add_argument("--processes", type=number(int, 1), default=2, help="of a run, by torchrun (default: 2)")
    parser.add_argument("--faults", default="", metavar="A,B",
                        help="only those whose names begin so, or match a pattern; `list` names them all")  # fmt: skip
    parser.add_argument("--kills", type=number(int, 0), default=20, help="at random moments (default: 20)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of those moments (default: 0)")
    parser.add_argument("--out", default="runs/chaos", help="folder for the runs; emptied first (default: runs/chaos)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout at the end")
    own, overrides = split(argv)
    args = parser.read(own)
    from mm.chaos import run as suite_run
    from mm.chaos import suite as suites
    from mm.chaos import table

    known = suite_run.scenarios(args.processes, args.kills, args.seed)
    names = [name.strip() for name in args.faults.split(",") if name.strip()]
    if names == ["list"]:
        print("\n".join(f"{one.name:<28} {one.where}" for one in known))
        return 0
    wanted = suite_run.chosen(known, names)
    if not Path("/proc/self/environ").exists():
        raise ConfigError("mm chaos: finds the processes that it starts in /proc, which only Linux has")
    suite = suites.prepare(args.config, overrides, Path(args.out), args.processes, _say)
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no process is left behind

    def told(row: table.Row, number: int) -> None:
        _say(f"[{number}/{len(wanted)}] {row.scenario.name}: {row.problem or 'ok'} ({row.seconds:.0f} s)")

    rows = suite_run.run(suite, wanted, told)
    found = table.result(rows, time.monotonic() - begun)
    (suite.out / "chaos.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (suite.out / "chaos.md").write_text(table.markdown(found), encoding="utf-8")
    print(json.dumps(found) if args.json else table.text(rows))
    return int(found["failed"] > 0)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
