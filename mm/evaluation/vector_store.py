"""The files of an embedding index: `index.json` and two safetensors files, mapped, believed only where they agree.

embeddings.safetensors  `embeddings` float32 or float16 [N, E], unit norm
samples.safetensors     `keys` uint8, all keys joined, and `key_ends` int64 [N]; `captions` uint8, all captions joined,
                        `caption_ends` int64 [M], and `caption_counts` int64 [N], how many there are up to each sample
lists.safetensors       where there are lists: `centres` float32 [L, E], `rows` uint32 [N], `ends` int64 [L]
index.json              the model, the shards, counts and options: what is read first, and written last
ledger.jsonl            samples that could not be used, with shard, key and reason
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INDEX, EMBEDDINGS, SAMPLES, LISTS, LEDGER = (
    *("index.json", "embeddings.safetensors", "samples.safetensors"),
    *("lists.safetensors", "ledger.jsonl"),
)
FORMAT = "mm-vectors-1"
PRECISIONS = {"fp32": "float32", "fp16": "float16"}
_KINDS = {"float32": "F32", "float16": "F16", "int64": "I64", "uint32": "U32", "uint8": "U8"}
_LARGEST_JSON, _LARGEST_HEADER = 512 << 20, 1 << 20  # bytes


@dataclass
class ShardFacts:
    """A shard when it was indexed, and how many rows of the index are of it."""

    path: str
    bytes: int
    version: str
    rows: int = 0


@dataclass
class About:
    """What `index.json` says."""

    source: str  # what `mm.load` was given
    name: str
    hash: str  # of `mm.models.fingerprint.model_hash`
    count: int
    dim: int
    precision: str
    captions: str  # where they are from; "" for none
    limit: int | None
    unusable: int
    shards: list[ShardFacts] = field(default_factory=list)
    lists: str = ""  # SHA-256 of lists.safetensors; "" where there is none
    mm: str = ""  # version that wrote it

    def to_bytes(self) -> bytes:
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode()


def read_about(folder: str | os.PathLike[str]) -> About:
    """Raises ValueError of one line where the folder is no index of this version or its `index.json` is damaged."""
    path = Path(folder) / INDEX
    if not path.is_file():
        part = Path(f"{os.fspath(folder).rstrip('/')}.part")
        hint = "; its making was interrupted: the same mm index command goes on" if part.is_dir() else ""
        what = "is no index: it has no index.json" if Path(folder).exists() else "no such index; mm index makes one"
        raise ValueError(f"{folder}: {what}{hint}")
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"over {_LARGEST_JSON >> 20} MB")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise ValueError("another format")
        about = About(**found)
        about.shards = [ShardFacts(**shard) for shard in about.shards]  # type: ignore[arg-type]
        _check(about)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        first = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: not an index of this version ({first}); make it anew") from error
    return about


def _check(about: About) -> None:
    texts = [about.source, about.name, about.hash, about.precision, about.captions, about.lists, about.mm]
    numbers = [about.count, about.dim, about.unusable]
    for shard in about.shards:
        texts += [shard.path, shard.version]
        numbers += [shard.bytes, shard.rows]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text of another type")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a number of another type")
    if about.limit is not None and type(about.limit) is not int:
        raise ValueError("limit of another type")
    if about.precision not in PRECISIONS or not about.dim or not about.count:
        raise ValueError(f"precision {about.precision!r}, dim {about.dim}, count {about.count}")
    if sum(shard.rows for shard in about.shards) != about.count:
        raise ValueError("rows of the shards do not add up to count")


def read_columns(path: str | os.PathLike[str], wanted: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """The arrays of a safetensors file, mapped, by name; `wanted` is the type and shape of each, -1 for any length.

    Raises ValueError of one line where the file is not exactly that.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise ValueError(f"{size} bytes")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(data[:8], "little")
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        if header.keys() != wanted.keys():
            raise ValueError(f"holds {', '.join(sorted(header)) or 'nothing'}, not {', '.join(sorted(wanted))}")
        return {name: _column(data, 8 + length, name, header[name], *wanted[name]) for name in wanted}
    except FileNotFoundError as error:
        raise ValueError(f"{path}: is missing; make the index anew") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        first = " ".join(str(error).split())[:160]
        raise ValueError(f"{path}: damaged ({first}); make the index anew") from error


def _column(
    data: mmap.mmap, start: int, name: str, entry: dict[str, Any], kind: str, shape: tuple[int, ...]
) -> NDArray[Any]:
    found, (first, last) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] != _KINDS[kind]:
        raise ValueError(f"{name} is {entry['dtype']}, not {_KINDS[kind]}")
    if len(found) != len(shape) or any(w not in (-1, f) for f, w in zip(found, shape, strict=True)):
        raise ValueError(f"{name} is {found}, not {list(shape)}")
    if not all(type(number) is int and number >= 0 for number in (*found, first, last)):
        raise ValueError(f"{name} has a size that is no number")
    count, item = math.prod(found), np.dtype(kind).itemsize
    if last - first != count * item or start + last > len(data):
        raise ValueError(f"{name} of {count * item} bytes is cut short, or lies elsewhere")
    return np.frombuffer(data, kind, count, start + first).reshape(found)


def write_columns(path: Path, columns: Sequence[tuple[str, str, tuple[int, ...], Path | NDArray[Any]]]) -> None:
    """A safetensors file of arrays `(name, type, shape, bytes)`, the bytes an array or a file, which is copied a piece
    at a time: memory does not grow with it. Written to the disk before this returns, but in place.
    """
    columns = sorted(columns, key=lambda column: -np.dtype(column[1]).itemsize)  # so that each lies aligned
    header, at = {}, 0
    for name, kind, shape, _ in columns:
        size = math.prod(shape) * np.dtype(kind).itemsize
        header[name] = {"dtype": _KINDS[kind], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with open(path, "wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for name, kind, shape, source in columns:
            before = file.tell()
            if isinstance(source, Path):
                with open(source, "rb") as raw:
                    shutil.copyfileobj(raw, file, 1 << 22)
            else:
                file.write(np.ascontiguousarray(source, kind).data)
            assert file.tell() - before == math.prod(shape) * np.dtype(kind).itemsize, name
        file.flush()
        os.fsync(file.fileno())
