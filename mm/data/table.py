"""A table of samples: their keys, and where the parts of each lie in its shard. About 37 bytes a sample, memory-mapped.

On disk it is a safetensors file, of one shard (its sidecar) or of many, so that it opens in the usual tools.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm.data.dimensions import dimensions
from mm.data.tar import BLOCK, Scan, Stream, open_file

IMAGES = ("jpg", "jpeg", "png", "webp")
PARTS = ("image", "txt", "caption", "json")  # nothing else in a shard is ever read
_PART = {**dict.fromkeys(IMAGES, "image"), "txt": "txt", "caption": "caption", "json": "json"}
NONE = 0xFFFFFFFF  # size of a part that a sample does not have
LARGEST = 256 << 20  # bytes of a member: a larger one is refused
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's rule: the key ends at the first dot of the file name
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32}
_FORMAT = "mm-index-1"


@dataclass
class Shard:
    """What is known of one shard beside its samples."""

    name: str  # path or URL
    bytes: int  # its size when it was read
    version: str = ""  # changes when it changes: modification time in ns, or a store's etag
    sha256: str = ""  # of the whole file; "" where only headers were read
    rows: int = 0
    key_bytes: int = 0
    extensions: list[str] = field(default_factory=list)
    damage: str = ""  # of the file as a whole
    problems: list[tuple[str, str]] = field(default_factory=list)  # (key or "", reason) of refused members
    lost: list[str] = field(default_factory=list)  # keys known from elsewhere that are no longer there
    partial: list[str] = field(default_factory=list)  # keys that are there, but a part of theirs no longer is
    unreadable: str = ""  # why none of its samples can be used


@dataclass
class Table:
    """Columns over the N samples of `shards`, shard after shard; `path` where they are mapped from a file.

    `keys` uint8, all keys joined; `key_ends` uint32 [N], within the shard's; `P.block` and `P.size` uint32 [N] for each
    part P that any sample has, in units of 512 bytes and bytes; `width` and `height` uint16 [N], 0 unknown; `crc`
    uint32 [N], CRC-32 of the image, 0 where only headers were read.
    """

    shards: list[Shard]
    columns: dict[str, NDArray[Any]]
    path: str = ""

    def __len__(self) -> int:
        return len(self.columns["key_ends"])

    def __getstate__(self) -> dict[str, Any]:  # another process maps the same file: memory is shared, not copied
        return {"path": self.path} if self.path else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(load(state["path"]).__dict__ if state["path"] else state)

    def sizes(self, part: str) -> NDArray[np.uint32]:
        """Bytes of a part, [N]; NONE where a sample lacks it."""
        column = self.columns.get(f"{part}.size")
        return np.full(len(self), NONE, np.uint32) if column is None else column


def build(shard: Shard, scan: Scan) -> Table:
    """The table of one shard from its members. From a `Stream` images are looked at too: dimensions and CRC."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    looks: dict[str, tuple[int, int, int]] = {}
    chosen: dict[str, str] = {}  # key -> extension of the image taken
    extensions: set[str] = set()
    stream = isinstance(scan.source, Stream)
    for name, offset, size, problem in scan:
        match = _KEY.match(name)
        if not problem and match is None:  # a hidden file, or no extension: not part of a sample
            continue
        if match is not None:
            extensions.add(match[2].lower())
        if not problem and size > LARGEST:
            problem = f"{size} bytes is over the limit of {LARGEST}"
        if not problem and offset >= BLOCK << 32:
            problem = "it lies behind 2 TiB, where no index reaches"
        if problem or match is None:
            shard.problems.append(("", f"member {name} refused: {problem}"))
            if match is not None:  # a sample all the same, which is counted as one that cannot be used
                samples.setdefault(match[1], {})
            continue
        key, extension = match[1], match[2].lower()
        parts = samples.setdefault(key, {})
        part = _PART.get(extension)
        if part is None:
            continue
        if part in parts:
            rank = IMAGES.index
            if part != "image" or extension == chosen[key]:
                shard.problems.append((key, f"second member {name} ignored"))
                continue
            if rank(extension) > rank(chosen[key]):  # one picture in two formats: always the same one is taken
                continue
        parts[part] = (offset, size)
        if part == "image":
            chosen[key] = extension
            if stream:
                data = scan.source.read(offset, size)
                looks[key] = (*(dimensions(data[:65536]) or (0, 0)), zlib.crc32(data))
    shard.damage, shard.extensions, shard.rows = scan.damage, sorted(extensions)[:50], len(samples)
    return Table([shard], _columns(shard, samples, looks))


def _columns(
    shard: Shard, samples: dict[str, dict[str, tuple[int, int]]], looks: dict[str, tuple[int, int, int]]
) -> dict[str, NDArray[Any]]:
    names = [key.encode() for key in samples]
    shard.key_bytes = sum(map(len, names))
    columns: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(b"".join(names), np.uint8),
        "key_ends": np.cumsum([len(name) for name in names], dtype=np.int64).astype(np.uint32),
    }
    for part in PARTS:
        spans = np.array([parts.get(part, (0, NONE)) for parts in samples.values()], np.int64).reshape(-1, 2)
        if (spans[:, 1] != NONE).any():
            columns[f"{part}.block"] = (spans[:, 0] // BLOCK).astype(np.uint32)
            columns[f"{part}.size"] = spans[:, 1].astype(np.uint32)
    if looks:
        seen = np.array([looks.get(key, (0, 0, 0)) for key in samples], np.int64)
        columns |= {"width": np.minimum(seen[:, 0], 65535).astype(np.uint16)}
        columns |= {"height": np.minimum(seen[:, 1], 65535).astype(np.uint16)}
        columns |= {"crc": seen[:, 2].astype(np.uint32)}
    return columns


def join(tables: Sequence[Table]) -> Table:
    """One table of all their shards, in order."""
    if len(tables) == 1:
        return tables[0]
    names = dict.fromkeys(name for table in tables for name in table.columns)
    columns = {
        name: np.concatenate([t.columns[name] if name in t.columns else _absent(name, len(t)) for t in tables])
        for name in names
    }
    return Table([shard for table in tables for shard in table.shards], columns)


def _absent(name: str, rows: int) -> NDArray[Any]:
    kind = np.uint16 if name in ("width", "height") else np.uint32
    return np.full(rows, NONE if name.endswith(".size") else 0, kind)


def to_bytes(table: Table) -> bytes:
    """The table as a safetensors file."""
    from safetensors.numpy import save

    shards = [asdict(shard) for shard in table.shards]
    about = {"format": _FORMAT, "shards": shards, "sum": _sum(shards, table.columns)}
    return save(table.columns, {"mm": json.dumps(about)})


def _sum(shards: list[dict[str, Any]], columns: dict[str, NDArray[Any]]) -> int:
    """A checksum over all that a table says."""
    total = zlib.crc32(json.dumps(shards).encode())
    for name in sorted(columns):
        total = zlib.crc32(np.ascontiguousarray(columns[name]).data, zlib.crc32(name.encode(), total))
    return total


def write(table: Table, path: str | Path) -> None:
    """Writes the file whole or not at all."""
    part = f"{path}.{os.getpid()}.part"
    try:
        Path(part).write_bytes(to_bytes(table))
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def load(path: str | Path) -> Table:
    """The table in a file, mapped into memory. Raises ValueError where it is not one, OSError where it is not there."""
    with open(open_file(str(path)), "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path}: empty, not an index")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    table = from_bytes(mapped, str(path))
    table.path = str(path)
    return table


def from_bytes(data: bytes | mmap.mmap, where: str) -> Table:
    """The table in the bytes of a file, without copying. Raises ValueError naming `where` it is from."""
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start]) if start <= len(data) else {}
        about = json.loads(header.pop("__metadata__", {}).get("mm", "{}"))
        if about.get("format") != _FORMAT:
            raise ValueError("another format")
        columns = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            kind = np.dtype(_DTYPES[entry["dtype"]])
            columns[name] = np.frombuffer(data, kind, (last - first) // kind.itemsize, start + first)
        # a table of many shards was joined here from such that were checked: its pages are not all read for a start
        if len(about["shards"]) == 1 and about.get("sum") != _sum(about["shards"], columns):
            raise ValueError("checksum differs")
        table = Table([Shard(**shard) for shard in about["shards"]], columns)
        _check(table)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: not an index of this version ({' '.join(str(error).split())[:100]})") from error
    return table


def _check(table: Table) -> None:
    rows = sum(shard.rows for shard in table.shards)
    names = sum(shard.key_bytes for shard in table.shards)
    for name, column in table.columns.items():
        if len(column) != (names if name == "keys" else rows):
            raise ValueError(f"column {name} has {len(column)} entries")
    if not {"keys", "key_ends"} <= table.columns.keys():
        raise ValueError("no keys")
    for shard in table.shards:
        shard.problems = [(str(key), str(reason)) for key, reason in shard.problems]
        texts = [shard.name, shard.version, shard.sha256, shard.damage, shard.unreadable, *shard.extensions]
        numbers = (shard.bytes, shard.rows, shard.key_bytes)
        texts += shard.lost + shard.partial
        if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
            raise ValueError("a field of the wrong type")
    if len(table.shards) == 1:  # one of many was joined from such
        _check_places(table, table.shards[0])


def _check_places(table: Table, shard: Shard) -> None:
    ends = table.columns["key_ends"]
    if len(ends) and (ends[-1] != shard.key_bytes or (ends[1:] < ends[:-1]).any()):
        raise ValueError("keys of other lengths")
    for part in PARTS:
        if f"{part}.size" not in table.columns:
            continue
        sizes, blocks = table.columns[f"{part}.size"], table.columns[f"{part}.block"]
        last = np.where(sizes == NONE, 0, blocks.astype(np.int64) * BLOCK + sizes)
        if (last > shard.bytes).any() or (sizes[sizes != NONE] > LARGEST).any():
            raise ValueError(f"{part} outside of the shard")


def same_samples(one: Table, other: Table) -> bool:
    """Whether two tables hold the same samples at the same places."""
    places = [name for name in {**one.columns, **other.columns} if name not in ("width", "height", "crc")]
    return all(
        name in one.columns and name in other.columns and np.array_equal(one.columns[name], other.columns[name])
        for name in places
    )


def keys_of(table: Table) -> Iterable[str]:
    """The keys of a table of one shard."""
    text, start = table.columns["keys"].tobytes(), 0
    for end in table.columns["key_ends"].tolist():
        yield text[start:end].decode("utf-8", "replace")
        start = end
