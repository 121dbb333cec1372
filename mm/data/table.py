"""A table of samples: their keys, and where the parts of each lie in its shard. About 37 bytes a sample, memory-mapped.

On disk it is a safetensors file, of one shard (its sidecar) or of many, so that it opens in the usual tools.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm.data.dimensions import dimensions
from mm.data.tar import BLOCK, Scan, Stream

IMAGES = ("jpg", "jpeg", "png", "webp")
PARTS = ("image", "txt", "caption", "json")  # nothing else in a shard is ever read
_PART = {**dict.fromkeys(IMAGES, "image"), "txt": "txt", "caption": "caption", "json": "json"}
LOOKS = ("width", "height", "crc")  # columns on the images themselves
NONE = 0xFFFFFFFF  # size of a part that a sample does not have
LARGEST = 256 << 20  # bytes of a member: a larger one is refused
KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's rule: the key ends at the first dot of the file name
APART = ".looks"  # suffix of the file that holds them apart from a table of many shards
_LONGEST_KEY = 65535  # bytes


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

    `keys` uint8, all keys joined; `key_sizes` uint16 [N], bytes of each; `P.block` and `P.size` uint32 [N] for each
    part P that any sample has, in units of 512 bytes and bytes; `width` and `height` uint16 [N], 0 unknown; `crc`
    uint32 [N], CRC-32 of the image, 0 where only headers were read.
    """

    shards: list[Shard]
    columns: dict[str, NDArray[Any]]
    path: str = ""

    def __len__(self) -> int:
        return len(self.columns["key_sizes"])

    def __getstate__(self) -> dict[str, Any]:  # another process maps the same file: memory is shared, not copied
        return {"path": self.path} if self.path else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        from mm.data.table_file import load

        self.__dict__.update(load(state["path"]).__dict__ if state["path"] else state)

    def look(self, name: str) -> NDArray[Any] | None:
        """`width`, `height` or `crc`, [N]; None where no image was looked at."""
        if name in LOOKS and name not in self.columns and os.path.exists(self.path + APART):
            from safetensors.numpy import load_file

            return load_file(self.path + APART).get(name)
        return self.columns.get(name)

    def places(self, row: int) -> list[tuple[int, int]]:
        """Where each part of a row begins, and where the next header follows, in bytes."""
        found = []
        for part in PARTS:
            size = self.columns.get(f"{part}.size")
            if size is not None and int(size[row]) != NONE:
                start = BLOCK * int(self.columns[f"{part}.block"][row])
                found.append((start, start - -int(size[row]) // BLOCK * BLOCK))
        return found

    def sizes(self, part: str, rows: slice = slice(None)) -> NDArray[np.uint32]:
        """Bytes of a part, [N] or of some rows; NONE where a sample lacks it."""
        column = self.columns.get(f"{part}.size")
        if column is None:
            return np.full(len(self.columns["key_sizes"][rows]), NONE, np.uint32)
        return column[rows]


def build(shard: Shard, scan: Scan) -> Table:
    """The table of one shard from its members. From a `Stream` images are looked at too: dimensions and CRC."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    looks: dict[str, tuple[int, int, int]] = {}
    chosen: dict[str, str] = {}  # key -> extension of the image taken
    extensions: set[str] = set()
    stream = isinstance(scan.source, Stream)
    for name, offset, size, problem in scan:
        match = KEY.match(name)
        if not problem and match is None:  # a hidden file, or no extension: not part of a sample
            continue
        if match is not None:
            extensions.add(match[2].lower())
        if not problem and size > LARGEST:
            problem = f"{size} bytes is over the limit of {LARGEST}"
        if not problem and offset >= BLOCK << 32:
            problem = "it lies behind 2 TiB, where no index reaches"
        if match is not None and len(match[1].encode()) > _LONGEST_KEY:
            match, problem = None, f"a key of more than {_LONGEST_KEY} bytes"
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
        "key_sizes": np.array([len(name) for name in names], np.uint16),
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


def same_samples(one: Table, other: Table) -> bool:
    """Whether two tables hold the same samples at the same places."""
    places = [name for name in {**one.columns, **other.columns} if name not in LOOKS]
    return all(
        name in one.columns and name in other.columns and np.array_equal(one.columns[name], other.columns[name])
        for name in places
    )


def keys_of(table: Table) -> Iterable[str]:
    """The keys of a table of one shard."""
    text, start = table.columns["keys"].tobytes(), 0
    for size in table.columns["key_sizes"].tolist():
        yield text[start : start + size].decode("utf-8", "replace")
        start += size
