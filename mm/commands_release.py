"""`mm release`: a model as a folder for other people, and for other libraries."""

from __future__ import annotations

from collections.abc import Sequence

from mm.usage import Parser

FORMATS = ("mm", "open_clip", "diffusers", "transformers")


def release(argv: Sequence[str]) -> int:
    parser = Parser("release", "Writes a model as a folder that mm, open_clip, diffusers or transformers loads.")
    parser.add_argument("source", metavar="SOURCE", help="run folder, released folder, open_clip:NAME/TAG or timm:NAME")
    parser.add_argument("out", metavar="OUT", help="the folder to write; an earlier release there is replaced")
    parser.add_argument("--format", choices=FORMATS, default="mm", help="who loads it (default: mm)")
    parser.add_argument("--adapter", metavar="DIR", default="", help="LoRA matrices to merge: a run's export/adapter")
    parser.add_argument("--push", metavar="ORG/NAME", help="upload it to the Hugging Face hub, too")
    parser.add_argument("--private", action="store_true", help="where --push makes a repository, a private one")
    parser.add_argument(
        "--licence", "--license", default="", help="as the hub names it: mit, cc-by-4.0 (default: what the shards ask)"
    )
    parser.add_argument(
        "--results", metavar="FILE", nargs="+", action="extend", default=[], help="JSON of mm evaluate, for the card"
    )
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16, half the size (format mm)")
    parser.add_argument("--about", metavar="FILE", default="", help="Markdown for the card: intended use, limits, ...")
    args = parser.read(argv)
    from mm.interop.push import check_name, push

    if args.push:
        check_name(args.push)

    import mm
    from mm.interop.release import release as run

    def say(line: str) -> None:
        print(line, flush=True)

    name = args.push or ""
    options = {
        "format": args.format,
        "licence": args.licence,
        "files": args.results,
        "name": name,
        "adapter": args.adapter,
        "about": args.about,
        "bf16": args.bf16,
    }
    folder = run(args.source, args.out, **options, load=mm.load, say=say)
    if args.push:
        say(f"pushed: {push(folder, args.push, args.private)}")
    return 0
