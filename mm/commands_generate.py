"""`mm generate`: images from text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm.usage import RUN, Parser, UsageError, number

SMALLEST_CELL = 96  # pixels: smaller pictures are shown enlarged in a grid


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
