"""The commands of `mm`: each reads its arguments, imports what it needs, does it, and returns the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.usage import Parser, UsageError, number

if TYPE_CHECKING:
    from PIL import Image


RUN = "run folder, released folder or open_clip:NAME/TAG"
SMALLEST_CELL = 96  # pixels: smaller pictures are shown enlarged in a grid


def demo(argv: Sequence[str]) -> int:
    parser = Parser("demo", "Shards, training, evaluation, image grid and report.html, on OpenMoji.")
    parser.add_argument("--minutes", type=number(float, 0, above=True), default=8.0, help="of training (default: 8)")
    parser.add_argument("--out", default="runs/demo", help="the run folder (default: runs/demo)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of everything random (default: 0)")
    parser.add_argument("--seeds", type=number(int, 1), default=1, metavar="N", help="run N seeds, in OUT/seed-S each")
    args = parser.read(argv)
    from mm.demo import main as run

    return run(args.minutes, args.out, args.seed, args.seeds)


def shards(argv: Sequence[str]) -> int:
    from mm.commands_shards import shards as run

    return run(argv)


def train(argv: Sequence[str]) -> int:
    from mm.train import train as run

    return run(argv)


def checkpoints(argv: Sequence[str]) -> int:
    from mm.commands_checkpoints import checkpoints as run

    return run(argv)


def plan(argv: Sequence[str]) -> int:
    from mm.commands_plan import plan as run

    return run(argv)


def chaos(argv: Sequence[str]) -> int:
    from mm.commands_chaos import chaos as run

    return run(argv)


def release(argv: Sequence[str]) -> int:
    from mm.commands_release import release as run

    return run(argv)


def classify(argv: Sequence[str]) -> int:
    parser = Parser("classify", "The likeliest labels of each image, with their probabilities.")
    parser.add_argument("run", metavar="RUN", help=RUN)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file")
    parser.add_argument("--labels", help="comma-separated: cat,dog")
    parser.add_argument("--labels-file", metavar="FILE", help="one label a line")
    parser.add_argument("--template", action="append", help='such as "an emoji of {}"; repeat it to average several')
    parser.add_argument("--top", type=number(int, 1), default=5, metavar="K", help="labels an image (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON array instead")
    args = parser.read(argv)
    labels = _labels(args.labels, args.labels_file)
    for template in args.template or []:
        if "{}" not in template:
            raise UsageError(f'--template "{template}": has no {{}} where the label goes; try "{template} {{}}"')
    for _ in map(open_image, args.images):  # all of them, before a model is loaded
        pass

    import mm

    options = {"templates": args.template} if args.template else {}
    classifier = mm.load(args.run).classifier(labels, **options)
    results = [classifier.top(open_image(path), min(args.top, len(labels))) for path in args.images]
    if args.json:
        named = [[{"label": label, "probability": float(share)} for label, share in top] for top in results]
        print(json.dumps([{"image": path, "top": top} for path, top in zip(args.images, named, strict=True)]))
        return 0
    for path, top in zip(args.images, results, strict=True):
        print(f"{path}: " + ", ".join(f"{label} {100 * float(share):.1f} %" for label, share in top))
    return 0


def _labels(text: str | None, file: str | None) -> list[str]:
    if (text is None) == (file is None):
        raise UsageError("mm classify: give the labels once, as --labels cat,dog or as --labels-file FILE")
    try:
        lines = text.split(",") if text is not None else Path(file or "").read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"--labels-file {file}: not UTF-8 text (byte {error.start}); one label a line") from error
    labels = [line.strip() for line in lines if line.strip()]
    if not labels:
        where = f"--labels-file {file}" if text is None else f'--labels "{text}"'
        raise UsageError(f"{where}: no label in it; give at least one")
    return labels


def open_image(path: str) -> Image.Image:
    """The decoded image of a file. Raises UsageError naming the file where it is not an image, or damaged."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise UsageError(f"{path}: not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno:  # missing, a folder, no permission: says so itself
            raise
        raise UsageError(f"{path}: a damaged image ({error})") from error


def generate(argv: Sequence[str]) -> int:
    parser = Parser("generate", "A PNG with one row of images a prompt; column k has seed SEED + k.")
    parser.add_argument("run", metavar="RUN", help=RUN)
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="what to draw")
    parser.add_argument("--n", type=number(int, 1), default=4, help="images a prompt (default: 4)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the first column (default: 0)")
    parser.add_argument("--steps", type=number(int, 1), default=25, help="of the sampler (default: 25)")
    parser.add_argument("--guidance", type=number(float, 0), default=2.0, help="1: none (default: 2.0)")
    parser.add_argument("--out", default="grid.png", help="the file to write (default: grid.png)")
    args = parser.read(argv)
    if Path(args.out).suffix.lower() != ".png" or Path(args.out).is_dir():
        raise UsageError(f"--out {args.out}: the grid is a PNG file; end its name in .png")

    import mm
    from mm.evaluation.images import grid, png_bytes, write_whole

    prompts = [prompt for prompt in args.prompts for _ in range(args.n)]
    seeds = [args.seed + column for _ in args.prompts for column in range(args.n)]
    images = mm.load(args.run).generate(prompts, seeds=seeds, steps=args.steps, guidance=args.guidance)
    rows = [images[start : start + args.n] for start in range(0, len(images), args.n)]
    scale = max(1, SMALLEST_CELL // images[0].width)
    write_whole(args.out, png_bytes(grid(rows, scale=scale)))
    print(f"{args.out}: {len(args.prompts)} x {args.n} images, seeds {args.seed} to {args.seed + args.n - 1}")
    return 0


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


COMMANDS = {
    "demo": demo,
    "shards": shards,
    "train": train,
    "plan": plan,
    "checkpoints": checkpoints,
    "chaos": chaos,
    "classify": classify,
    "generate": generate,
    "evaluate": evaluate,
    "release": release,
}
