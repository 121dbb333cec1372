"""The commands of `mm shards`: write shards, index them, check them, and say what is in them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from mm.fields import suggestion
from mm.usage import Parser, UsageError, number

USAGE = """usage: mm shards openmoji OUT                      3,954 emoji with their names, as shards
       mm shards folder DIR OUT [--captions FILE]  a folder of images with captions, as shards
       mm shards latents P OUT --vae VAE --size N  shards anew, with an autoencoder's latents in each sample
       mm shards index P                           a sidecar for each shard: starts and resumes are instant then
       mm shards verify P                          every byte against the index; exit 1 with the list of what is wrong
       mm shards stats P [--out stats.png]         counts, sizes, caption lengths, aspect ratios, duplicates

P is a folder, a file, a pattern such as 'X/train-{000000..000099}.tar', a URL (s3://, gs://, https://, hf://), or
several joined by ::. Each has its own --help."""


def shards(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in KINDS:
        raise UsageError(f"mm shards: unknown kind {argv[0]}{suggestion(argv[0], KINDS) or '; ' + ', '.join(KINDS)}")
    return KINDS[argv[0]](argv[1:])


def openmoji(argv: Sequence[str]) -> int:
    parser = Parser("shards openmoji", "3,954 emoji with their English names, drawn from the OpenMoji colour font.")
    parser.add_argument("out", metavar="OUT", help="folder for train-*.tar, dev-*.tar, val-*.tar")
    args = parser.read(argv)
    from mm.data import build

    manifest = build.openmoji(args.out)
    print(f"{args.out}: {sum(manifest['samples'].values()):,} samples in {len(manifest['shards'])} shards, indexed")
    return 0


def folder(argv: Sequence[str]) -> int:
    parser = Parser("shards folder", "A folder of images with captions: x.jpg beside x.txt, or a table of captions.")
    parser.add_argument("dir", metavar="DIR", help="folder of images")
    parser.add_argument("out", metavar="OUT", help="folder for the shards")
    parser.add_argument("--captions", metavar="FILE", help="a .csv, .jsonl or .parquet table, instead of x.txt files")
    parser.add_argument("--image-column", default=None, help="column of the table with the image's path")
    parser.add_argument("--caption-column", default=None, help="column of the table with the caption")
    args = parser.read(argv)
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    given = {name: column for name, column in columns.items() if column is not None}
    if given and not args.captions:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')}: needs the table it is a column of, --captions FILE")
    from mm.data import build

    manifest = build.folder(args.dir, args.out, **({"captions": args.captions} if args.captions else {}), **given)
    print(f"{args.out}: {sum(manifest['samples'].values()):,} samples in {len(manifest['shards'])} shards, indexed")
    return 0


def latents(argv: Sequence[str]) -> int:
    parser = Parser(
        "shards latents",
        "Shards anew, byte for byte, with latents.npy in each sample: what an autoencoder of diffusers makes of its "
        "picture. Training with model.latents.cached then need not encode. The same command again goes on.",
    )
    parser.add_argument("shards", metavar="P", help="a folder, a file, a pattern, a URL, or several joined by ::")
    parser.add_argument("out", metavar="OUT", help="folder for the shards, which keep their names")
    parser.add_argument("--vae", metavar="SOURCE", required=True, help="a folder in diffusers' format, or a hub name")
    parser.add_argument("--size", type=number(int, 1), required=True, help="pixels a side: model.image.size")
    parser.add_argument("--batch", type=number(int, 1), default=16, help="pictures encoded at once (default: 16)")
    args = parser.read(argv)
    from mm.data import indexing
    from mm.data.latents import add_latents
    from mm.data.shards import expand
    from mm.interop.latents import encoder

    expand(args.shards, mixed=True)  # refused before the autoencoder is read
    encode, about = encoder(args.vae, args.size)
    reports, seconds = indexing.timed(
        lambda: add_latents(args.shards, args.out, encode, about, size=args.size, batch=args.batch)
    )
    _tell(reports)
    print(indexing.summary(reports, "encoded", seconds))
    return int(any(report.problem for report in reports))


def index(argv: Sequence[str]) -> int:
    parser = Parser("shards index", "Reads every shard once and writes a sidecar with keys, places, sizes and hash.")
    parser.add_argument("shards", metavar="P", help="a folder, a file, a pattern, a URL, or several joined by ::")
    parser.add_argument("--workers", type=number(int, 1), default=0, help="processes (default: one a core)")
    args = parser.read(argv)
    from mm.data import indexing

    reports, seconds = indexing.timed(lambda: indexing.index(args.shards, args.workers))
    _tell(reports)
    print(indexing.summary(reports, "indexed", seconds))
    return int(any(report.failed for report in reports))


def verify(argv: Sequence[str]) -> int:
    parser = Parser("shards verify", "Reads every shard and compares it with its index; exit 1 where one differs.")
    parser.add_argument("shards", metavar="P", help="a folder, a file, a pattern, a URL, or several joined by ::")
    parser.add_argument("--workers", type=number(int, 1), default=0, help="processes (default: one a core)")
    args = parser.read(argv)
    from mm.data import indexing

    reports, seconds = indexing.timed(lambda: indexing.verify(args.shards, args.workers))
    _tell(reports)
    print(indexing.summary(reports, "verified", seconds))
    return int(any(report.problem for report in reports))


def _tell(reports: Sequence[Any]) -> None:
    """A line for each shard with a problem; notes, which many shards may share, once with their number."""
    for report in reports:
        if report.problem:
            print(f"{report.shard}: {report.problem}")
    for note in dict.fromkeys(report.note for report in reports if report.note):
        print(f"{sum(report.note == note for report in reports)} shards: {note}", file=sys.stderr)


def stats(argv: Sequence[str]) -> int:
    parser = Parser("shards stats", "What is in some shards: a table, and with --out a picture.")
    parser.add_argument("shards", metavar="P", help="a folder, a file, a pattern, a URL, or several joined by ::")
    parser.add_argument("--caption", default="txt", help="where captions are: txt, caption, json.FIELD (default: txt)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--out", metavar="FILE", help="draw four histograms into this PNG file")
    args = parser.read(argv)
    if args.out and not args.out.lower().endswith(".png"):
        raise UsageError(f"--out {args.out}: the picture is a PNG file; end its name in .png")
    from mm.data.stats import stats as count
    from mm.data.stats_table import table

    found = count(args.shards, caption=args.caption)
    print(json.dumps(found) if args.json else table(found))
    if args.out:
        from mm.evaluation.shard_chart import draw

        draw(found, args.out)
        print(args.out, file=sys.stderr)
    return 0


KINDS = {"openmoji": openmoji, "folder": folder, "latents": latents, "index": index, "verify": verify, "stats": stats}
