"""`mm generate`: images from text, from other images, or inside a mask; and again from what a PNG says of itself."""

from __future__ import annotations

import contextlib
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.usage import RUN, Parser, UsageError, number

if TYPE_CHECKING:
    from PIL import Image

SOLVERS = ("euler", "heun", "dpmpp_2m")
SECONDS = 1.0  # between two previews


def _interval(text: str) -> tuple[float, float]:
    low, comma, high = text.partition(",")
    try:
        pair = float(low), float(high)
    except ValueError:
        pair = (1.0, 0.0)
    if not comma or not 0 <= pair[0] < pair[1] <= 1:
        raise ArgumentTypeError(f"{text}: must be two noise levels from 0 to 1 (pure noise), such as 0.2,0.9")
    return pair


def _share(text: str) -> float:
    value = number(float, 0, above=True)(text)
    if value > 1:
        raise ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return value


def _parser() -> Parser:
    parser = Parser("generate", "A PNG with one row of images a prompt; column k has seed SEED + k.")
    parser.add_argument("words", metavar="RUN PROMPT", nargs="*", help=f"{RUN}; then what to draw")
    parser.add_argument("--n", type=number(int, 1), default=4, help="images a prompt (default: 4)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the first column (default: 0)")
    parser.add_argument("--steps", type=number(int, 1), default=25, help="of the sampler (default: 25)")
    parser.add_argument("--guidance", type=number(float, 0), default=2.0, help="1: none (default: 2.0)")
    parser.add_argument("--out", help="a PNG, or a folder (DIR/) with one PNG an image (default: grid.png)")
    parser.add_argument("--prompts-file", metavar="FILE", help="one prompt a line; - is standard input")
    parser.add_argument("--no-prompt", action="store_true", help="draw without a prompt")
    parser.add_argument("--negative", metavar="PROMPT", help="what guidance is to lead away from")
    parser.add_argument("--interval", type=_interval, metavar="LOW,HIGH", help="noise levels to guide at: 0.2,0.9")
    parser.add_argument(
        "--solver", choices=SOLVERS, default="euler", help="heun: two evaluations a step (default: euler)"
    )
    parser.add_argument("--autoguide", metavar="RUN", help="an earlier or smaller model that guidance leads away from")
    parser.add_argument("--from", dest="start", metavar="IMAGE", help="begin at this image, noised to --strength")
    parser.add_argument("--strength", type=_share, default=0.7, help="1 forgets the image (default: 0.7)")
    parser.add_argument("--mask", metavar="IMAGE", help="with --from: draw only what is white in it")
    parser.add_argument("--like", metavar="IMAGE", help="variations: what the vision encoder sees in it")
    parser.add_argument("--best-of", type=number(int, 1), default=1, metavar="N", help="keep the nearest to its prompt")
    parser.add_argument("--captions", action="store_true", help="write the prompt under each image of the grid")
    parser.add_argument("--preview", action="store_true", help="show the images in OUT.preview.png as they form")
    parser.add_argument("--force", action="store_true", help="replace other images in the folder")
    parser.add_argument("--again", metavar="PNG", help="draw what this PNG says it is, bit for bit")
    return parser


def generate(argv: Sequence[str]) -> int:
    args = _parser().read(argv)
    folder = args.out is not None and (args.out.endswith("/") or Path(args.out).is_dir())
    if args.out is not None and not folder and Path(args.out).suffix.lower() != ".png":
        raise UsageError(f"--out {args.out}: the grid is a PNG file; end its name in .png, or in / for a folder")
    if args.again:
        if folder:
            raise UsageError(f"--out {args.out}: --again writes one PNG; end its name in .png")
        return _again(args, argv)
    prompts = _prompts(args)
    if args.mask and not args.start:
        raise UsageError(f"--mask {args.mask}: there is nothing for it to lie on; give --from IMAGE too")
    if args.negative and args.autoguide:
        raise UsageError("--negative, --autoguide: guidance leads away from one of them; give one")
    if args.best_of > 1 and args.no_prompt:
        raise UsageError("--best-of: there is no prompt to compare with")
    given = _pictures(args)  # before a model is loaded

    import mm
    from mm.evaluation.drawn_files import write_folder, write_grid
    from mm.evaluation.record import MOST, Record, Sheet
    from mm.evaluation.redraw import fingerprint
    from mm.models.fingerprint import model_hash

    each = [(prompt, args.seed + column) for prompt in prompts for column in range(args.n)]
    if len(each) > MOST:
        raise UsageError(
            f"{len(prompts)} prompts x --n {args.n}: over the limit of {MOST:,} images; take fewer at a time"
        )
    model = mm.load(args.words[0])
    weaker = mm.load(args.autoguide) if args.autoguide else None
    options = _options(args, given, weaker)
    key = model_hash(model)
    if not folder:
        out = args.out or "grid.png"
        images = _draw(model, each, args, options, args.preview and out)
        write_grid(out, images, Sheet(args.words[0], key, args.n, _records(images), args.captions))
        print(f"{out}: {len(prompts)} x {args.n} images, seeds {args.seed} to {args.seed + args.n - 1}")
        return 0
    hashes = {name: fingerprint(picture) for name, picture in given.items()}
    common = Record(
        prompt=None,
        seed=0,
        steps=args.steps,
        guidance=float(args.guidance),
        solver=args.solver,
        interval=args.interval or (0.0, 1.0),
        strength=float(args.strength),
        negative=args.negative,
        best_of=args.best_of,
        autoguide=None if weaker is None else model_hash(weaker),
        like=hashes.get("like"),
        start=hashes.get("start"),
        mask=hashes.get("mask"),
    )
    wanted = [replace(common, prompt=prompt, seed=seed) for prompt, seed in each]
    out = str(Path(args.out))
    done = write_folder(
        Path(out),
        wanted,
        lambda places: _draw(
            model, [each[place] for place in places], args, options, args.preview and f"{out}/now.png"
        ),
        run=args.words[0],
        model=key,
        columns=args.n,
        force=args.force,
    )
    kept = f", {len(each) - done} of them there before" if done < len(each) else ""
    print(f"{out}: {len(prompts)} x {args.n} images, seeds {args.seed} to {args.seed + args.n - 1}{kept}")
    return 0


def _prompts(args: Namespace) -> list[str | None]:
    """Those of the command line and of the file. Raises UsageError where there is none, or no RUN."""
    from_file, words = args.prompts_file is not None, args.words[1:]
    if not args.words:
        raise UsageError("mm generate: RUN and PROMPT are missing; see mm generate --help")
    if args.no_prompt:
        if words or from_file:
            raise UsageError("--no-prompt: prompts are given, too; leave one of them out")
        return [None]
    if from_file:
        from mm.evaluation.files import read_lines

        words = [*words, *read_lines(args.prompts_file, "a prompt")]
    if not words:
        raise UsageError("mm generate: PROMPT is missing; or give --prompts-file FILE or --no-prompt")
    return list(words)


def _pictures(args: Namespace) -> dict[str, Image.Image]:
    """What --like, --from and --mask name, by what `Record` calls them."""
    from mm.evaluation.files import open_image

    named = {"like": args.like, "start": args.start, "mask": args.mask}
    found = {name: open_image(path) for name, path in named.items() if path}
    mask = found.get("mask")
    if mask is not None:
        if mask.mode not in ("1", "L"):
            found["mask"] = mask = mask.convert("L")  # a mask that a paint program saved
        if mask.size != found["start"].size:
            sizes = f"{mask.width}x{mask.height} pixels, --from has {found['start'].width}x{found['start'].height}"
            raise UsageError(f"--mask {args.mask}: {sizes}; make them equal")
    return found


def _options(args: Namespace, given: dict[str, Image.Image], weaker: Any) -> dict[str, Any]:
    """Arguments of `generate` that are the same for all images; pictures are one for each, and come as a function."""
    options: dict[str, Any] = {"solver": args.solver, "best_of": args.best_of, "strength": args.strength}
    options |= {"negative": args.negative} if args.negative else {}
    options |= {"interval": args.interval} if args.interval else {}
    options |= {"autoguide": weaker} if weaker is not None else {}
    names = {"like": "images", "start": "start", "mask": "masks"}
    return options | {names[name]: picture for name, picture in given.items()}


def _draw(
    model: Any,
    each: Sequence[tuple[str | None, int]],
    args: Namespace,
    options: dict[str, Any],
    preview: str | None = None,
) -> list[Image.Image]:
    many = {
        name: [value] * len(each) if name in ("images", "start", "masks") else value for name, value in options.items()
    }
    prompts, seeds = [prompt for prompt, _ in each], [seed for _, seed in each]
    with _previewed(preview, args.n * args.best_of) as callback:
        more = {"callback": callback} if callback else {}
        return model.generate(
            prompts, seeds=seeds, steps=args.steps, guidance=args.guidance, progress=sys.stderr.isatty(), **many, **more
        )


@contextlib.contextmanager
def _previewed(path: str | None, columns: int) -> Any:
    """A callback that shows the images beside `path` once a second; what it wrote is gone in the end."""
    if not path:
        yield None
        return
    from mm.evaluation.drawn_files import layout
    from mm.evaluation.images import png_bytes, write_whole

    file, last = Path(path).with_suffix(".preview.png"), [0.0]

    def callback(step: int, steps: int, preview: Callable[[], list[Image.Image | None]]) -> None:
        if time.monotonic() - last[0] >= SECONDS:
            write_whole(file, png_bytes(layout(preview(), columns, None)))
            last[0] = time.monotonic()

    try:
        yield callback
    finally:
        file.unlink(missing_ok=True)


def _records(images: Sequence[Image.Image]) -> Any:
    from mm.evaluation.record import records_of

    return records_of(images)


def _again(args: Namespace, argv: Sequence[str]) -> int:
    """Draws what a PNG says it is, with the model that it names or the one that is given."""
    allowed = ("--again", "--out", "--from", "--mask", "--like", "--autoguide")
    other = [word.partition("=")[0] for word in argv if word.startswith("--") and word.partition("=")[0] not in allowed]
    if other or len(args.words) > 1:
        raise UsageError(f"--again {args.again}: the file says what to draw; leave {(other or args.words[1:])[0]} out")
    from mm.evaluation.record import read_sheet
    from mm.models.export import SHIPPED

    sheet = read_sheet(args.again)
    run = args.words[0] if args.words else sheet.run
    here = run in SHIPPED or Path(run).is_dir()
    if not args.words and not here:  # a name in a file that may come from anyone fetches nothing
        raise UsageError(
            f"{args.again}: its model {run[:80]!r} is no folder here; give it: mm generate RUN --again PNG"
        )
    given = _pictures(args)

    import mm
    from mm.evaluation.again import redrawn, write_again
    from mm.evaluation.redraw import fingerprint
    from mm.models.fingerprint import model_hash

    flags = {"like": "--like", "start": "--from", "mask": "--mask"}
    for record in sheet.pictures:
        for name, flag in flags.items():
            wanted, picture = getattr(record, name), given.get(name)
            if wanted and (picture is None or fingerprint(picture) != wanted):
                what = "is another picture" if picture else "is missing"
                raise UsageError(f"{args.again}: it was drawn with {flag} of a picture {wanted[:12]}, which {what}")
    model = mm.load(run)
    if (found := model_hash(model)) != sheet.model:
        raise UsageError(f"{args.again}: drawn by the model {sheet.model[:12]}, and {run} is {found[:12]}")
    weaker = mm.load(args.autoguide) if args.autoguide else None
    hashes = {record.autoguide for record in sheet.pictures} - {None}
    if hashes and (weaker is None or {model_hash(weaker)} != hashes):
        raise UsageError(f"{args.again}: guided by the model {min(filter(None, hashes))[:12]}; give it as --autoguide")
    out = args.out or f"{Path(args.again).stem}-again.png"
    images = redrawn(model, sheet, given, weaker, progress=sys.stderr.isatty())
    write_again(out, sheet, images, args.again)
    print(f"{out}: {len(sheet.pictures)} images as in {args.again}")
    return 0
