"""`mm classify`: images labelled with words of one's own."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from mm.usage import RUN, Parser, UsageError, number

if TYPE_CHECKING:
    from mm.evaluation.labelling import Source
    from mm.evaluation.predictions import Prediction

STDIN = "-"
MANY_TEXTS = 500  # above which encoding them takes longer than finding them in the cache


def parser() -> Parser:
    """What the command takes; `tools/classify.py` takes it too."""
    made = Parser("classify", "The likeliest labels of each image, with their probabilities.")
    add = made.add_argument
    add("run", metavar="RUN", help=RUN)
    add("images", metavar="IMAGE", nargs="*", help="image file, or a folder of them; -: a path a line on stdin")
    add("--shards", help="classify the pictures of these shards instead: a folder, a pattern, several joined by ::")
    add("--labels", help="comma-separated: cat,dog")
    add("--labels-file", metavar="FILE", help="one label a line, which may hold commas; -: on stdin")
    add("--labels-from", metavar="NAME", help="a published list: imagenet")
    add("--template", action="append", help='such as "an emoji of {}"; repeat it to average several')
    add("--templates", metavar="NAME|FILE", help="openai (80), simple (7), or a file with one a line")
    add("--top", type=number(int, 1), default=5, metavar="K", help="labels an image (default: 5)")
    add("--mode", choices=("contrastive", "diffusion", "hybrid"), default="contrastive", help="who judges the images")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of --mode diffusion or hybrid; repeatable")
    add("--temperature", type=number(float, 0, above=True), metavar="T", help="divides the logits (default: 1)")
    add(
        "--cache",
        action=argparse.BooleanOptionalAction,
        help=f"keep the labels' weights on disk (default: of over {MANY_TEXTS} texts)",
    )
    add("--workers", type=number(int, 0), default=0, metavar="N", help="that open pictures beside (default: 0)")
    add("--limit", type=number(int, 1), metavar="N", help="with --shards: so many samples, from the first")
    add("--captions", default="", metavar="PLACE", help="with --shards: txt or json.FIELD, to be printed along")
    add("--errors", choices=("stop", "skip"), default="stop", help="what a picture that cannot be read does")
    add("--json", action="store_true", help="print one JSON array; with --shards or -, an object a line")
    add("--out", metavar="FILE", help="write to .jsonl, .csv or .parquet instead of printing")
    add("--summary", metavar="FILE", help="also write counts a label as JSON")
    return made


def classify(argv: Sequence[str]) -> int:
    args = parser().read(argv)
    _check(args)
    labels, templates = _labels(args), _templates(args)
    from mm.evaluation.vocabulary import read_labels, read_templates

    words = len(read_labels(labels)) * len(read_templates(templates or ["{}"]))
    paths = None if args.shards is not None else _paths(args)

    import mm
    from mm.evaluation.labelling import Tally, each

    start, tally = time.perf_counter(), Tally()
    model = mm.load(args.run)
    source = _source(model, args, labels, templates, words > MANY_TEXTS if args.cache is None else args.cache, paths)
    fields = ["image"] if args.shards is None else ["key", "shard", *(["captions"] if args.captions else [])]
    places = min(args.top, len(read_labels(labels)))
    with _sink(args, fields, places) as add:
        for prediction in each(source, errors=args.errors, say=_say, tally=tally):
            add(prediction)
    if args.summary:
        about = {"mm": mm.__version__, "run": args.run, "mode": args.mode, "temperature": args.temperature}
        about["templates"] = templates or ["{}"]
        _summarise(args.summary, {**about, **tally.summary(), "seconds": round(time.perf_counter() - start, 3)})
    if args.out:
        print(f"{args.out}: {tally.labels.total():,} images")
    if tally.lost:
        _say(f"{len(tally.lost):,} of {tally.labels.total() + len(tally.lost):,} images could not be used")
    return 1 if tally.lost else 0


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that do not go together."""
    if bool(args.images) == (args.shards is not None):
        raise UsageError("mm classify: give what to classify once, as IMAGE... or as --shards SHARDS")
    if STDIN in args.images and len(args.images) > 1:
        raise UsageError("mm classify: - stands for a list of images on stdin; give it alone")
    if STDIN in args.images and args.labels_file == STDIN:
        raise UsageError("mm classify: stdin holds either the images or the labels; put the labels into a file")
    if args.shards is None and (args.limit is not None or args.captions):
        flag = "--captions" if args.captions else "--limit"
        raise UsageError(f"{flag}: is for --shards; leave it out, or give shards")
    if args.option and args.mode == "contrastive":
        raise UsageError(f"--option {args.option[0]}: is for --mode diffusion or hybrid; leave it out, or name a mode")
    for option in args.option:
        _option(option)
    if args.template and args.templates is not None:
        raise UsageError("mm classify: give the templates once, as --template or as --templates NAME|FILE")
    if args.out:
        from mm.evaluation.prediction_files import check_out

        check_out(args.out)
        if args.json:
            raise UsageError("--json: prints, and --out writes; give one of them (a .jsonl file holds the same)")
    if args.summary and os.path.isdir(args.summary):
        raise UsageError(f"--summary {args.summary}: is a folder; name a file in it")


def _option(text: str) -> tuple[str, int | float | str]:
    """`draws=8` as a keyword and its value. Raises UsageError where it is none."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--option {text}: must be NAME=VALUE, such as draws=8")
    for kind in (int, float):
        with suppress(ValueError):
            return name, kind(value)
    return name, value


def _labels(args: argparse.Namespace) -> str | list[str]:
    given = [one for one in (args.labels, args.labels_file, args.labels_from) if one is not None]
    if len(given) != 1:
        raise UsageError(
            "mm classify: give the labels once, as --labels cat,dog, as --labels-file FILE or as --labels-from imagenet"
        )
    if args.labels_from is not None:
        from mm.evaluation.vocabulary import LABEL_SETS
        from mm.fields import suggestion

        if args.labels_from not in LABEL_SETS:
            known, near = ", ".join(LABEL_SETS), suggestion(args.labels_from, LABEL_SETS)
            raise UsageError(
                f"--labels-from {args.labels_from}: must be one of {known}{near}; --labels-file reads a file"
            )
        return str(args.labels_from)
    if args.labels_file is not None:
        from mm.evaluation.files import read_lines

        return read_lines(args.labels_file, "one label")
    labels = [word.strip() for word in args.labels.split(",") if word.strip()]
    if not labels:
        raise UsageError(f'--labels "{args.labels}": no label in it; give at least one')
    return labels


def _templates(args: argparse.Namespace) -> str | list[str] | None:
    from mm.evaluation.vocabulary import TEMPLATE_SETS

    if args.templates in TEMPLATE_SETS:
        return str(args.templates)
    if args.templates is not None and not os.path.exists(args.templates):
        raise UsageError(f"--templates {args.templates}: must be one of {', '.join(TEMPLATE_SETS)}, or a file")
    flag, templates = "--template", args.template or []
    if args.templates is not None:
        from mm.evaluation.files import read_lines

        flag, templates = f"--templates {args.templates}:", read_lines(args.templates, "one template")
    for template in templates:
        if "{}" not in template:
            raise UsageError(f'{flag} "{template}": has no {{}} where the label goes; try "{template} {{}}"')
    return templates or None


def _paths(args: argparse.Namespace) -> Sequence[str] | Iterator[str]:
    """Those that are named, each looked at before a model is loaded where a bad one stops the job; or stdin's."""
    from mm.evaluation.files import open_image
    from mm.evaluation.picture_files import found, listed

    if args.images == [STDIN]:
        return listed(sys.stdin.buffer)
    paths = found(args.images)
    for path in paths if args.errors == "stop" else ():
        open_image(path)
    return paths


def _source(
    model: Any,
    args: argparse.Namespace,
    labels: str | list[str],
    templates: str | list[str] | None,
    cache: bool,
    paths: Sequence[str] | Iterator[str] | None,
) -> Source:
    from mm.evaluation.picture_files import FilePredictions

    options: dict[str, Any] = {"templates": templates} if templates else {}
    options |= {"cache": True} if cache else {}
    options |= {"mode": args.mode} if args.mode != "contrastive" else {}
    options |= {"temperature": args.temperature} if args.temperature is not None else {}
    options |= dict(map(_option, args.option))
    show = {"progress": sys.stderr.isatty()}
    classifier = model.classifier(labels, **options, **show)
    if paths is None:
        shared = {"k": args.top, "captions": args.captions, "workers": args.workers, "limit": args.limit}
        stream: Source = classifier.stream(args.shards, **shared, **show)
        return stream
    processor = model.inference.processor("image")
    return FilePredictions(classifier, classifier.labels, processor, paths, k=args.top, workers=args.workers, **show)


@contextmanager
def _sink(args: argparse.Namespace, fields: Sequence[str], places: int) -> Iterator[Callable[[Prediction], object]]:
    """Where predictions go: a file, lines on stdout as they come, or one JSON array once all are there."""
    from mm.evaluation.prediction_files import record, writing

    if args.out:
        with writing(args.out, fields, places) as add:
            yield add
    elif args.json and (args.shards is not None or args.images == [STDIN]):
        yield lambda prediction: print(json.dumps(record(prediction, fields)), flush=True)
    elif args.json:
        records: list[dict[str, Any]] = []
        yield lambda prediction: records.append(record(prediction, fields))
        print(json.dumps(records))
    else:
        yield lambda prediction: print(_line(prediction), flush=True)


def _line(prediction: Prediction) -> str:
    top = ", ".join(f"{label} {100 * share:.1f} %" for label, share in prediction.top)
    line = f"{prediction.key}: {top}"
    return line.encode("utf-8", "backslashreplace").decode()  # a path need not be text


def _say(line: str) -> None:
    print("mm: " + line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)


def _summarise(path: str, summary: dict[str, Any]) -> None:
    from mm.evaluation.images import write_whole

    write_whole(path, (json.dumps(summary, indent=2) + "\n").encode())
