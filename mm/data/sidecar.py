"""One shard's table: from its sidecar where that is still true, from the shard itself where not."""

from __future__ import annotations

import functools
import hashlib
import operator
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mm.data import img2dataset, remote
from mm.data.shards import SUFFIX
from mm.data.table import NONE, PARTS, Shard, Table, build, keys_of, same_samples
from mm.data.table_file import from_bytes, load, to_bytes, write
from mm.data.tar import File, Scan, Stream, open_file

LOCAL = "mtime:"  # how the version of a local file begins
_CHUNK = 4 << 20
_MOST_LOST = 1_000_000


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


def find(shard: str, options: remote.Options = remote.DEFAULTS) -> Table | None:
    """The table in the shard's sidecar, wherever that is; None where there is none of this version. OSError where its
    store cannot be reached."""
    far = remote.is_remote(shard)
    for place in (str(apart(shard)), beside(shard)):
        try:
            if far and place == beside(shard):
                data = remote.read_small(place, options)
                table = from_bytes(data, place) if data is not None else None
            else:
                table = load(place)
        except ValueError:
            continue
        except OSError:  # nothing there, or nothing that may be read as one
            if far and place == beside(shard):
                raise
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
    return status.st_size, f"{LOCAL}{status.st_mtime_ns}"


def is_same(about: Shard, now: tuple[int, str]) -> bool:
    """Whether a shard is still as it was read. One that was indexed as a local file and then uploaded: by its size."""
    size, version = now
    uploaded = about.version.startswith(LOCAL) and not version.startswith(LOCAL)
    return about.bytes == size and (about.version == version or uploaded)


def facts(shard: str, options: remote.Options = remote.DEFAULTS) -> tuple[int, str]:
    """Size and version of a shard anywhere. Raises OSError."""
    if not remote.is_remote(shard):
        return stamp(shard)
    found = remote.facts(shard, options)
    return found.size, found.version


def scan(shard: str, *, whole: bool, options: remote.Options = remote.DEFAULTS) -> Table:
    """The table of a shard read now: all of it and hashed where `whole` or remote, else only its headers.

    Raises OSError where it cannot be read.
    """
    size, version = facts(shard, options)
    about = Shard(shard, size, version)
    if remote.is_remote(shard):
        return _streamed(about, remote.chunks(shard, 0, options))
    fd = open_file(shard)
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


def fresh(shard: str, old: Table | None, *, whole: bool = False, options: remote.Options = remote.DEFAULTS) -> Table:
    """The shard's table as it is now, given its sidecar's: that one where the shard is unchanged, else read anew.

    Samples that are known and no longer there are entered as lost. Raises OSError where the shard cannot be read.
    """
    about = old.shards[0] if old is not None else None
    if old is not None and about is not None and (about.sha256 or not whole) and is_same(about, facts(shard, options)):
        return old
    new = scan(shard, whole=whole, options=options)
    now = new.shards[0]
    same = old is not None and about is not None and same_samples(old, new) and now.problems == about.problems
    if same and old is not None and about is not None and not now.sha256 and not now.damage:
        about.bytes, about.version = now.bytes, now.version  # copied or touched, not changed
        about.sha256, old.path = "", ""  # no longer what the file says
        return old
    now.lost, now.partial = missing(shard, new, old)
    if about is not None and not now.lost and not now.damage and not now.sha256 and not same_samples(old or new, new):
        now.problems.append(("", "the index is older than the shard, which was read anew: mm shards index"))
    return new


def missing(shard: str, new: Table, old: Table | None) -> tuple[list[str], list[str]]:
    """Keys that a damaged shard should hold and does not, and those it holds without a part that they should have.

    By its earlier index; without one, by what img2dataset wrote, and by the parts that all samples but the last have.
    """
    if not new.shards[0].damage:
        return [], []
    there = dict(zip(keys_of(new), _parts(new), strict=True))
    if old is not None:
        before = dict(zip(keys_of(old), _parts(old), strict=True))
        partial = [key for key in there if before.get(key, 0) & ~there[key] or key in old.shards[0].partial]
        return [key for key in [*before, *old.shards[0].lost] if key not in there], partial
    *others, last = there.values() if there else [0]
    partial = list(there)[-1:] if others and functools.reduce(operator.and_, others) & ~last else []
    said = None if remote.is_remote(shard) else img2dataset.successes(shard)
    if isinstance(said, int):
        return [f"(unnamed {number})" for number in range(len(there), min(said, _MOST_LOST))], partial
    return [key for key in said or [] if key not in there], partial


def _parts(table: Table) -> list[int]:
    """Which parts each sample has, a bit each."""
    return sum(((table.sizes(part) != NONE).astype(np.uint8) << bit for bit, part in enumerate(PARTS))).tolist()
