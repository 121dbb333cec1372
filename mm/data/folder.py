"""A user's own pictures and captions as shards. Image bytes are copied as they are."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mm.config import ConfigError
from mm.data import decode
from mm.data.captions import text
from mm.data.pack import ShardWriter
from mm.data.table import IMAGES

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_LONGEST_KEY = 80  # a plain tar header holds names of 100 bytes


class Pair(NamedTuple):
    path: Path
    caption: str
    where: str  # for messages


def folder(
    src: str | Path,
    out: str | Path,
    *,
    captions: str | Path | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    per_shard: int = 1000,
    progress: bool = True,
) -> dict[str, Any]:
    """Builds `train-*.tar` in `out` from `x.jpg` + `x.txt` pairs anywhere under `src`, or from a table.

    `captions`: a CSV, TSV, JSONL or parquet file with one row a pair; `image_column` holds paths relative to `src`.
    Returns the manifest: samples a split, shards. Raises ConfigError, with nothing written, where there are no images,
    an image has no caption or cannot be decoded, or a column is missing (names those there are).
    """
    source = Path(src)
    if not source.is_dir():
        raise ConfigError(f"folder: {str(source)!r} is not a folder; name the one that holds the images")
    pairs = _beside(source) if captions is None else _table(source, Path(captions), image_column, caption_column)
    keys = _keys([pair.path.relative_to(source).as_posix() for pair in pairs])
    from tqdm import tqdm

    with ShardWriter(out, per_shard) as writer:
        mixed = sorted(zip(keys, pairs, strict=True), key=lambda item: hashlib.sha256(item[0].encode()).digest())
        for key, pair in tqdm(mixed, desc="packing images", unit="image", disable=None if progress else True):
            data, extension = _image(pair)
            fields = {"file": pair.path.relative_to(source).as_posix(), "split": "train"}
            metadata = json.dumps(fields, ensure_ascii=False).encode(errors="backslashreplace")
            writer.add("train", key, {extension: data, "txt": pair.caption.encode(), "json": metadata})
        return writer.finish({"source": "folder"})


def _beside(source: Path) -> list[Pair]:
    """Every image under `source` with the text file beside it."""
    files = sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower()[1:] in IMAGES]
    if not images:
        seen = ", ".join(sorted({path.suffix or path.name for path in files})[:12]) or "nothing"
        raise ConfigError(f"folder: no images ({', '.join(IMAGES)}) under {str(source)!r}; seen: {seen}")
    bare = [path for path in images if not path.with_suffix(".txt").is_file()]
    if bare:
        raise ConfigError(
            f"folder: {len(bare)} of {len(images)} images have no caption, the first is {str(bare[0])!r}; "
            f"write {bare[0].with_suffix('.txt').name!r} beside it, or give a table with --captions"
        )
    return [_pair(path, path.with_suffix(".txt").read_bytes(), str(path.with_suffix(".txt"))) for path in images]


def _table(source: Path, table: Path, image_column: str, caption_column: str) -> list[Pair]:
    if not table.is_file():
        raise ConfigError(f"captions: no file {str(table)!r}")
    pairs = []
    for number, row in enumerate(_rows(table), 1):
        where = f"{table} row {number}"
        for column in (image_column, caption_column):
            if column not in row:
                raise ConfigError(f"captions: {where} has no column {column!r}; it has {', '.join(map(str, row))}")
        path = source / str(row[image_column])
        if not path.is_file() or not path.resolve().is_relative_to(source.resolve()):
            raise ConfigError(f"captions: {where}: no image {str(row[image_column])!r} under {str(source)!r}")
        caption = row[caption_column]
        pairs.append(_pair(path, ("" if caption is None else str(caption)).encode(errors="surrogatepass"), where))
    if not pairs:
        raise ConfigError(f"captions: {str(table)!r} has no rows")
    return pairs


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    kind = table.suffix.lower()
    if kind == ".parquet":
        yield from _parquet(table)
        return
    if kind not in (".csv", ".tsv", ".jsonl", ".ndjson"):
        raise ConfigError(f"captions: {str(table)!r} must end in .csv, .tsv, .jsonl or .parquet")
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            if kind in (".csv", ".tsv"):
                yield from csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",")
                return
            for line in filter(str.strip, lines):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ConfigError(
                        f"captions: {str(table)!r}: {line.strip()[:40]!r} is not a JSON object; write one a line"
                    )
                yield row
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ConfigError(f"captions: {str(table)!r} cannot be read: {error}") from error


def _parquet(table: Path) -> list[dict[str, Any]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(f"captions: {str(table)!r} needs pyarrow; pip install pyarrow, or save it as CSV") from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(table).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise ConfigError(f"captions: {str(table)!r} is not a parquet file: {error}") from error
    return rows


def _pair(path: Path, caption: bytes, where: str) -> Pair:
    try:
        return Pair(path, text(caption), where)
    except ValueError as error:
        raise ConfigError(f"folder: {where}: {error}") from error


def _image(pair: Pair) -> tuple[bytes, str]:
    """The file's bytes, once they are known to decode, and the extension that is true of them."""
    try:
        data = pair.path.read_bytes()
        picture = decode.open_image(data)
        extension = _EXTENSIONS.get(picture.format or "", "")
        picture.draft("RGB", (1, 1))  # JPEG: every byte is still read, at an eighth of the size
        picture.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ConfigError(f"folder: image {str(pair.path)!r} cannot be used: {error}; mend or remove it") from error
    return data, extension


def _keys(names: list[str]) -> list[str]:
    """One plain ASCII key a file, without dots, each different: `a/b c.jpg` -> `a_b_c`."""
    keys, taken, again = [], set(), Counter[str]()
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name.rpartition(".")[0]).strip("_")[-_LONGEST_KEY:] or "image"
        key = stem
        while key in taken:
            again[stem] += 1
            key = f"{stem}-{again[stem]}"
        taken.add(key)
        keys.append(key)
    return keys
