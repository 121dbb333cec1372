"""Tables as safetensors files: written whole, mapped into memory, and believed only where they are consistent."""

from __future__ import annotations

import json
import mmap
import os
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm.data.table import APART, LARGEST, LOOKS, NONE, PARTS, Shard, Table
from mm.data.tar import BLOCK, open_file

_FORMAT = "mm-index-1"
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32}


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


def write_apart(table: Table, path: str) -> None:
    """The same, with what was seen of the images in a file beside it: training hardly needs that in memory."""
    from safetensors.numpy import save

    looks = {name: column for name, column in table.columns.items() if name in LOOKS}
    Path(path + APART).unlink(missing_ok=True)
    if looks:
        Path(path + APART).write_bytes(save(looks))
    write(Table(table.shards, {name: c for name, c in table.columns.items() if name not in LOOKS}), path)


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
        columns = {name: _column(data, start, entry) for name, entry in header.items()}
        # a table of many shards was joined here from such that were checked: its pages are not all read for a start
        if len(about["shards"]) == 1 and about.get("sum") != _sum(about["shards"], columns):
            raise ValueError("checksum differs")
        table = Table([Shard(**shard) for shard in about["shards"]], columns)
        _check(table)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: not an index of this version ({' '.join(str(error).split())[:100]})") from error
    return table


def _column(data: bytes | mmap.mmap, start: int, entry: dict[str, Any]) -> NDArray[Any]:
    first, last = entry["data_offsets"]
    kind = np.dtype(_DTYPES[entry["dtype"]])
    return np.frombuffer(data, kind, (last - first) // kind.itemsize, start + first)


def _check(table: Table) -> None:
    rows = sum(shard.rows for shard in table.shards)
    names = sum(shard.key_bytes for shard in table.shards)
    for name, column in table.columns.items():
        if len(column) != (names if name == "keys" else rows):
            raise ValueError(f"column {name} has {len(column)} entries")
    if not {"keys", "key_sizes"} <= table.columns.keys():
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
    if table.columns["key_sizes"].sum(dtype=np.int64) != shard.key_bytes:
        raise ValueError("keys of other lengths")
    for part in PARTS:
        if f"{part}.size" not in table.columns:
            continue
        sizes, blocks = table.columns[f"{part}.size"], table.columns[f"{part}.block"]
        last = np.where(sizes == NONE, 0, blocks.astype(np.int64) * BLOCK + sizes)
        if (last > shard.bytes).any() or (sizes[sizes != NONE] > LARGEST).any():
            raise ValueError(f"{part} outside of the shard")
