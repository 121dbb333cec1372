"""`mm plan`: what a run would take on a cluster, before one is booked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from mm.config import ConfigError
from mm.usage import Parser, number


def plan(argv: Sequence[str]) -> int:
    """Prints the plan of a config: 0 where it fits, 1 where it does not."""
    parser = Parser(
        "plan",
        "Memory, FLOPs, traffic and time of a run on a cluster, without one. --section.field value replaces a field. "
        "The exit code is 1 where the run does not fit.",
        usage="mm plan CONFIG [--gpus N] [--gpu NAME] [--samples N] [--efficiency E] [--caption-tokens N] [--json] "
        "[--section.field value ...]",
    )
    parser.add_argument("config", metavar="CONFIG", help="a Python file with `def config() -> TrainConfig`")
    parser.add_argument("--gpus", type=number(int, 1), default=8, help="in all (default: 8)")
    parser.add_argument("--gpu", default="h100", help="a100-40, a100-80, h100, h200, b200 or mi300x (default: h100)")
    parser.add_argument("--samples", type=number(float, 1), help="to be seen (default: run.steps batches)")
    parser.add_argument("--efficiency", type=number(float, 0, above=True), default=0.4,
                        help="of the peak rate while computing: assumed (default: 0.4)")  # fmt: skip
    parser.add_argument("--caption-tokens", type=number(int, 1), metavar="N",
                        help="of a mean caption (default: the whole context, an upper bound)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    own, overrides = split(argv)
    args = parser.read(own)
    if args.efficiency > 1:
        raise ConfigError(f"--efficiency {args.efficiency}: a share of the peak rate; must be at most 1")
    from mm import config as settings

    config = settings.override(settings.load(args.config), overrides)
    if any((config.start.model, config.start.image, config.start.text, config.start.denoiser)):
        from mm.interop.start import resolve

        resolve(config, weights=False)
    settings.validate(config)
    from mm.plan.report import as_dict, as_text
    from mm.plan.report import plan as run

    found = run(config, args.gpus, args.gpu, args.samples, args.efficiency, args.caption_tokens, _tell)
    print(json.dumps(as_dict(found)) if args.json else as_text(found))
    return 0 if found.fits else 1


def _tell(line: str) -> None:
    print(f"mm: {line}", file=sys.stderr, flush=True)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own words, and the overrides of a config: flags with a dot in their name, and what follows them."""
    own: list[str] = []
    overrides: list[str] = []
    current = own
    for word in argv:
        if word.startswith("--"):
            current = overrides if "." in word.partition("=")[0] else own
        current.append(word)
    return own, overrides
