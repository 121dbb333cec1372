"""One shard's table: from its sidecar where that is still true, from the shard itself where not."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from mm.data import remote
from mm.data.table import Shard, Table, build, from_bytes, keys_of, load, same_samples, to_bytes, write
from mm.data.tar import File, Scan, Stream

SUFFIX = ".mmindex"
_CHUNK = 4 << 20


def cache_folder() -> Path:
    """Where indexes and fetched shards are kept: `$MM_CACHE`, else `mm` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("MM_CACHE") or os.path.join(home, "mm"))


def beside(shard: str) -> str:
    """Path or URL of the sidecar that lies beside a shard."""
    return shard + SUFFIX


def apart(shard: str) -> Path:
    """Where the sidecar goes when the shard's own folder or store cannot be written."""
    place = shard if remote.is_remote(shard) else os.path.abspath(shard)
    return cache_folder() / "index" / (hashlib.blake2b(place.encode(), digest_size=16).hexdigest() + SUFFIX)


def find(shard: str, options: remote.Options | None = None) -> Table | None:
    """The table in the shard's sidecar, wherever that is; None where there is none of this version. OSError where its
    store cannot be reached."""
    far = remote.is_remote(shard)
    for place in (str(apart(shard)), beside(shard)):
        try:
            if far and place == beside(shard):
                data = remote.read_small(place, options or remote.Options())
                table = from_bytes(data, place) if data is not None else None
            else:
                table = load(place)
        except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError):
            continue
        if table is not None and len(table.shards) == 1:
            table.shards[0].name = shard
            return table
    return None


def keep(shard: str, table: Table) -> str:
    """Writes the sidecar beside the shard, or apart from it where that is not allowed; returns the place."""
    table.shards[0].name = os.path.basename(shard)
    try:
        if _beside(shard, table):
            apart(shard).unlink(missing_ok=True)
            return beside(shard)
        apart(shard).parent.mkdir(parents=True, exist_ok=True)
        write(table, apart(shard))
        return str(apart(shard))
    finally:
        table.shards[0].name = shard


def _beside(shard: str, table: Table) -> bool:
    if remote.is_remote(shard):
        return remote.write_small(beside(shard), to_bytes(table))
    try:
        write(table, beside(shard))
    except OSError:  # a read-only folder, or a full one
        return False
    return True


def stamp(path: str) -> tuple[int, str]:
    """Size of a local file, and what changes when it is written. Raises OSError."""
    status = os.stat(path)
    return status.st_size, str(status.st_mtime_ns)


def facts(shard: str, options: remote.Options | None = None) -> tuple[int, str]:
    """Size and version of a shard anywhere. Raises OSError."""
    if not remote.is_remote(shard):
        return stamp(shard)
    found = remote.facts(shard, options or remote.Options())
    return found.size, found.version


def scan(shard: str, *, whole: bool, options: remote.Options | None = None) -> Table:
    """The table of a shard read now: all of it and hashed where `whole` or remote, else only its headers.

    Raises OSError where it cannot be read.
    """
    size, version = facts(shard, options)
    about = Shard(shard, size, version)
    if remote.is_remote(shard):
        return _streamed(about, remote.chunks(shard, 0, options or remote.Options()))
    fd = os.open(shard, os.O_RDONLY)
    try:
        return _streamed(about, _pieces(fd)) if whole else build(about, Scan(File(fd)))
    finally:
        os.close(fd)


def _pieces(fd: int) -> Iterator[bytes]:
    while piece := os.read(fd, _CHUNK):
        yield piece


def _streamed(about: Shard, pieces: Iterator[bytes]) -> Table:
    stream = Stream(pieces, about.bytes)
    table = build(about, Scan(stream))
    seen, about.sha256 = stream.finish()
    if seen != about.bytes:
        raise OSError(f"{about.name}: was {about.bytes} bytes, and {seen} when read; it changes while it is read")
    return table


def fresh(shard: str, old: Table | None, *, whole: bool = False, options: remote.Options | None = None) -> Table:
    """The shard's table as it is now, given its sidecar's: that one where the shard is unchanged, else read anew.

    Samples that are known and no longer there are entered as lost. Raises OSError where the shard cannot be read.
    """
    about = old.shards[0] if old is not None else None
    known = (about.bytes, about.version) if about is not None and (about.sha256 or not whole) else None
    if old is not None and known is not None and facts(shard, options) == known:
        return old
    new = scan(shard, whole=whole, options=options)
    now = new.shards[0]
    if old is not None and about is not None and not now.sha256 and not now.damage and same_samples(old, new):
        about.bytes, about.version = now.bytes, now.version  # copied or touched, not changed
        about.sha256, old.path = "", ""  # no longer what the file says
        return old
    now.lost = lost(shard, new, old)
    if about is not None and not now.lost and not now.damage and not same_samples(old or new, new):
        now.problems.append(("", "the index is older than the shard, which was read anew: mm shards index"))
    return new


def lost(shard: str, new: Table, old: Table | None) -> list[str]:
    """Keys that a damaged shard should hold and does not: by its earlier index, or by what img2dataset wrote."""
    if not new.shards[0].damage:
        return []
    there = dict.fromkeys(keys_of(new))
    known = [*keys_of(old), *old.shards[0].lost] if old is not None else _img2dataset(shard, len(there))
    return [key for key in known if key not in there]


def _img2dataset(shard: str, found: int) -> list[str]:
    """Keys that img2dataset says it put into a shard: from its parquet file where pyarrow is there, else only as many
    as its statistics count; [] where neither lies beside the shard."""
    stem = shard.removesuffix(".tar")
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        rows = parquet.read_table(stem + ".parquet", columns=["key", "status"]).to_pylist()
        return [str(row["key"]) for row in rows if row["status"] == "success"]
    except (ImportError, OSError, ValueError, KeyError):
        pass
    try:
        count = int(json.loads(Path(stem + "_stats.json").read_text(encoding="utf-8"))["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [f"(unnamed {number})" for number in range(found, min(count, 1_000_000))]
