"""`mm classify`: images labelled with words of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mm.usage import RUN, Parser, UsageError, number


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
    from mm.evaluation.files import open_image

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
