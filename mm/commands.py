"""The commands of `mm`: which module has each. A command reads its arguments, does it, and returns the exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from mm.usage import Parser, number

Command = Callable[[Sequence[str]], int]


def demo(argv: Sequence[str]) -> int:
    parser = Parser("demo", "Shards, training, evaluation, image grid and report.html, on OpenMoji.")
    parser.add_argument("--minutes", type=number(float, 0, above=True), default=8.0, help="of training (default: 8)")
    parser.add_argument("--out", default="runs/demo", help="the run folder (default: runs/demo)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of everything random (default: 0)")
    parser.add_argument("--seeds", type=number(int, 1), default=1, metavar="N", help="run N seeds, in OUT/seed-S each")
    parser.add_argument("--from", metavar="MODEL", default="", dest="source", help="go on with it: a run, a release")
    args = parser.read(argv)
    from mm.demo import main as run

    return run(args.minutes, args.out, args.seed, args.seeds, args.source)


def _from(module: str, name: str) -> Command:
    """A function of a module that is imported once it is called: `mm --help` waits for none of them."""

    def command(argv: Sequence[str]) -> int:
        return getattr(import_module(module), name)(argv)

    return command


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "shards": _from("mm.commands_shards", "shards"),
    "train": _from("mm.train", "train"),
    "plan": _from("mm.commands_plan", "plan"),
    "checkpoints": _from("mm.commands_checkpoints", "checkpoints"),
    "chaos": _from("mm.commands_chaos", "chaos"),
    "classify": _from("mm.commands_classify", "classify"),
    "generate": _from("mm.commands_generate", "generate"),
    "index": _from("mm.commands_search", "index"),
    "search": _from("mm.commands_search", "search"),
    "evaluate": _from("mm.commands_evaluate", "evaluate"),
    "compare": _from("mm.commands_evaluate", "compare"),
    "report": _from("mm.commands_report", "report"),
    "serve": _from("mm.commands_serve", "serve"),
    "release": _from("mm.commands_release", "release"),
}
