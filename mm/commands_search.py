"""`mm index` and `mm search`: embeddings of pictures in shards, and the pictures nearest to words or to a picture."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.usage import RUN, Parser, UsageError, number

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mm.api import LoadedModel
    from mm.evaluation.hits import Hit
    from mm.evaluation.vectors import VectorIndex

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def index(argv: Sequence[str]) -> int:
    parser = Parser("index", "Embeds the pictures of shards, to search in; run again, it brings the index up to date.")
    parser.add_argument("run", metavar="RUN", help=RUN)
    parser.add_argument("shards", metavar="SHARDS", help="a folder, a pattern, or several joined by ::")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="the index to write")
    parser.add_argument("--captions", default="txt", help="txt, caption, json.FIELD or none (default: txt)")
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="only the first N samples")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of what is kept (default: fp32)")
    parser.add_argument("--approximate", action="store_true", help="lists too, for faster and less exact searches")
    parser.add_argument("--workers", type=number(int, 0), default=0, help="processes that decode (default: 0)")
    args = parser.read(argv)
    captions = "" if args.captions == "none" else args.captions
    from mm.data.captions import Captions
    from mm.data.shards import expand

    if captions:
        Captions(captions)
    files = expand(args.shards, mixed=True)
    _need_faiss()
    from mm.evaluation.vector_build import build_index
    from mm.evaluation.vector_part import claim

    claim(Path(os.path.abspath(args.out)))

    import mm
    from mm.models.export import SHIPPED
    from mm.models.fingerprint import model_hash

    model = mm.load(args.run)
    model.inference.processor("image")
    had = _count(args.out)
    try:
        built = build_index(
            model.inference,
            files,
            args.out,
            source=os.path.abspath(args.run) if args.run not in SHIPPED and os.path.exists(args.run) else args.run,
            model_hash=model_hash(model),
            captions=captions,
            limit=args.limit,
            precision=args.precision,
            approximate=args.approximate,
            workers=args.workers,
            progress=True,
        )
    except KeyboardInterrupt:
        print(f"mm index: stopped; the same command goes on in {args.out}.part", file=sys.stderr)
        raise
    about = built.about
    words = f"{args.out}: {about.count:,} pictures of {len(about.shards)} shard(s), {about.dim} numbers each"
    if not built.encoded:
        print(f"{words}; {'lists made' if built.listed else 'nothing changed'}")
        return 0
    kept = f", {built.kept:,} were there" if built.kept else ""
    ledger = Path(args.out, "ledger.jsonl")
    problems = len(ledger.read_text(encoding="utf-8").splitlines()) if ledger.is_file() else 0
    lost = f"; {problems:,} problems, in {ledger}" if problems else ""
    gone = f"; {had - built.kept:,} of before are no longer in it" if had > built.kept else ""
    print(f"{words}; {built.encoded:,} encoded{kept}{gone}{lost}")
    return 0


def _count(folder: str) -> int:
    """The pictures of an index that may be there."""
    from mm.evaluation.vector_store import read_about

    try:
        return read_about(folder).count
    except ValueError:  # none, or one that is made anew
        return 0


def search(argv: Sequence[str]) -> int:
    parser = Parser("search", "The pictures of an index nearest to words or to an image file.")
    parser.add_argument("index", metavar="INDEX", help="a folder that mm index made")
    parser.add_argument("queries", metavar="QUERY", nargs="*", help="words, or an image file")
    parser.add_argument("--queries", dest="file", metavar="FILE", help="queries, one a line; - is standard input")
    parser.add_argument("--k", type=number(int, 1), default=10, help="pictures a query (default: 10)")
    parser.add_argument("--together", action="store_true", help="all queries are one: their mean")
    parser.add_argument("--not", dest="without", action="append", metavar="WORDS", help="take these words out of each")
    parser.add_argument("--min-score", type=float, default=-2.0, metavar="COSINE", help="leave lower ones out")
    parser.add_argument("--json", action="store_true", help="print one JSON array instead")
    parser.add_argument("--out", metavar="FILE.png", help="write the pictures found there, with captions and scores")
    parser.add_argument("--model", metavar="RUN", help="where the model is now (default: where it was)")
    parser.add_argument("--shards", metavar="SHARDS", help="where the shards are now, for --out (default: the same)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--exact", action="store_true", help="look at every row, whatever lists there are")
    how.add_argument("--approximate", action="store_true", help="look only at the nearest lists")
    args = parser.read(argv)
    from mm.evaluation.files import open_image, read_lines

    words = [*args.queries, *(read_lines(args.file, "one query") if args.file else [])]
    _check(args, words)
    asked = [(query, open_image(query) if _is_picture(query) else None) for query in words]
    _need_faiss()
    from mm.evaluation.vectors import VectorIndex

    vectors = VectorIndex.open(args.index)
    moved = _moved(args.shards)
    model = _model(vectors, args.model)
    embeddings = _embed(model, asked, args.without or [], args.together)
    if args.together:
        asked = [(" + ".join(query for query, _ in asked), None)]
    from mm.evaluation.hits import contact_sheet, hits, pictures
    from mm.evaluation.images import png_bytes, write_whole

    which = True if args.approximate else False if args.exact else None
    found = hits(vectors, *vectors.search(embeddings, args.k, approximate=which), args.min_score)
    if vectors.note:
        print(f"mm search: {vectors.note}", file=sys.stderr)
    if args.out:
        images, changed = pictures(vectors, [hit for some in found for hit in some], moved)
        for path in changed:
            print(f"mm search: {path} changed since it was indexed; mm index brings it up to date", file=sys.stderr)
        write_whole(args.out, png_bytes(contact_sheet(asked, found, images)))
    _print(asked, found, args)
    return 0


def _check(args: Any, words: list[str]) -> None:
    """Raises UsageError for what cannot be meant, before a model is loaded."""
    if not words:
        raise UsageError('mm search: nothing to look for; give words such as "red heart", or an image file')
    for query in words:
        if not query.strip():
            raise UsageError("mm search: a query is blank; give words or an image file")
        if Path(query).suffix.lower() in PICTURES and not Path(query).exists() and " " not in query:
            raise UsageError(f"{query}: no such image file")
    if args.out and (Path(args.out).suffix.lower() != ".png" or Path(args.out).is_dir()):
        raise UsageError(f"--out {args.out}: the pictures found are a PNG file; end its name in .png")
    if args.shards and not args.out:
        raise UsageError("--shards: is for the pictures of --out; give --out FILE.png too")
    if args.min_score != args.min_score:
        raise UsageError("--min-score nan: must be a number, a cosine from -1 to 1")


def _is_picture(query: str) -> bool:
    """A file by its ending, or named with a folder: the word `heart` is a word, whatever lies beside it."""
    try:
        return (Path(query).suffix.lower() in PICTURES or os.sep in query) and Path(query).is_file()
    except (OSError, ValueError):  # words too long for a file's name, or with a zero byte
        return False


def _moved(spec: str | None) -> list[str]:
    from mm.data.shards import expand

    return expand(spec, mixed=True) if spec else []


def _model(vectors: VectorIndex, elsewhere: str | None) -> LoadedModel:
    """The model that the index was made with. Raises UsageError where it is not to be had there."""
    import mm
    from mm.models.fingerprint import model_hash

    about = vectors.about
    source = elsewhere or about.source
    if elsewhere is None and os.path.isabs(source) and not os.path.exists(source):
        raise UsageError(f"{source}: the model that the index was made with is not there any more; give --model RUN")
    model = mm.load(source)
    if model_hash(model) != about.hash:
        raise UsageError(
            f"{source}: is not the model that {vectors.folder} was made with (hash {about.hash[:12]}); "
            f"make the index anew, or name that one with --model"
        )
    return model


def _embed(
    model: LoadedModel, asked: Sequence[tuple[str, Image.Image | None]], without: list[str], together: bool
) -> Tensor:
    """Unit-norm `[Q, E]`, one row where they are taken `together`.

    `without`: each query loses its part along these words (orthogonal negation: Widdows, ACL 2003).
    """
    import torch

    found = torch.zeros(len(asked), model.config.model.embed_dim)
    images = {place: picture for place, (_, picture) in enumerate(asked) if picture is not None}
    texts = {place: query for place, (query, picture) in enumerate(asked) if picture is None}
    for name, items in (("image", images), ("text", texts)):
        if items:
            found[list(items)] = model.inference.encode(name, list(items.values()))
    if together:
        found = torch.nn.functional.normalize(found.mean(0, keepdim=True), dim=1)
    if without:
        directions = torch.linalg.qr(model.encode(text=without)["text"].T)[0].T  # [words, E], at right angles
        found = found - (found @ directions.T) @ directions
        if float(found.norm(dim=1).min()) < 1e-3:
            raise UsageError(f"--not {without[0]!r}: says what the query says; nothing is left of it")
        found = torch.nn.functional.normalize(found, dim=1)
    return found


def _print(asked: Sequence[tuple[str, Image.Image | None]], found: list[list[Hit]], args: Any) -> None:
    if args.json:
        both = zip(asked, found, strict=True)
        print(json.dumps([{"query": query, "hits": [hit.to_dict() for hit in some]} for (query, _), some in both]))
        return
    for (query, _), some in zip(asked, found, strict=True):
        if len(asked) > 1:
            print(f"{query}:")
        for hit in some:
            caption = " | ".join(" ".join(text.split()) for text in hit.captions)
            print(f"{hit.score:7.4f}  {hit.key}  {caption}".rstrip())
        if not some:
            print(f"nothing scores {args.min_score:g} or more")
    if args.out:
        print(f"{args.out}: {sum(map(len, found))} pictures")


def _need_faiss() -> None:
    from importlib.util import find_spec

    if find_spec("faiss") is None:
        raise UsageError('faiss: is not installed; pip install "mm[search]", or -e ".[search]" in a clone')
