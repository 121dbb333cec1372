"""One table over many shards, kept from one start to the next: 10,000 shards are opened in well under a second."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from mm.config import ConfigError
from mm.data import remote, sidecar, table, table_file
from mm.data.table import Table

_MANY = 32  # shards from which on their joined table is kept for the next start
_KEPT = 16  # joined tables kept
_THREADS = 16  # sidecars fetched at once


def open_table(shards: Sequence[str], *, anew: bool = False, options: remote.Options = remote.DEFAULTS) -> Table:
    """One table over `shards`: from the last start's where nothing changed, else from sidecars, else by reading.

    With `anew`, remote shards are asked whether they changed. Raises ConfigError for a shard that cannot be read and
    was never indexed.
    """
    stamps = [_stamp(shard) for shard in shards]
    kept = _joined(shards, stamps)
    if len(shards) >= _MANY and not anew:
        try:
            return table_file.load(kept)
        except (OSError, ValueError):  # not there yet, or of another version
            pass
    many = ThreadPoolExecutor(_THREADS if any(map(remote.is_remote, shards)) else 1)
    with many as pool, tqdm(total=len(shards), desc="opening shards", unit="shard", disable=None, leave=False) as bar:
        tables = []
        for one in pool.map(_one, shards, stamps, itertools.repeat(anew), itertools.repeat(options)):
            tables.append(one)
            bar.update()
    whole = table.join(tables)
    if len(shards) >= _MANY and not any(about.unreadable for about in whole.shards):  # it may be readable next time
        _keep(whole, kept)
        if os.path.exists(kept):
            return table_file.load(kept)
    return whole


def _stamp(shard: str) -> tuple[int, str] | OSError:
    if remote.is_remote(shard):
        return (
            -1,
            "",
        )  # asking for each of many thousands takes longer than a start may: changes show when it is fetched
    try:
        return sidecar.stamp(shard)
    except OSError as error:
        return error


def _one(shard: str, stamp: tuple[int, str] | OSError, anew: bool, options: remote.Options) -> Table:
    try:
        old = sidecar.find(shard, options)
        if isinstance(stamp, OSError):
            raise stamp
        if old is not None and sidecar.is_same(old.shards[0], stamp):
            return old
        if remote.is_remote(shard):
            if old is not None and not anew:
                return old
            new = sidecar.fresh(shard, old, options=options)
            if new is not old:  # it was read whole for this: never twice
                sidecar.keep(shard, new)
            return new
        return sidecar.fresh(shard, old, options=options)
    except OSError as error:
        old = sidecar.find(shard) if not remote.is_remote(shard) else None
        reason = error.strerror or str(error)
        if old is None:
            raise ConfigError(f"shard {shard!r} cannot be read: {reason}; mend it, or leave it out") from error
        old.path, old.shards[0].unreadable = "", f"cannot be read: {reason}"
        return old


def _joined(shards: Sequence[str], stamps: Sequence[tuple[int, str] | OSError]) -> str:
    """Where the joined table of exactly these shards, in this state, is kept."""
    digest = hashlib.blake2b(digest_size=16)
    for shard, stamp in zip(shards, stamps, strict=True):
        place = shard if remote.is_remote(shard) else os.path.abspath(shard)
        digest.update(f"{place}\0{stamp if isinstance(stamp, tuple) else 'unreadable'}\n".encode())
    return str(sidecar.cache_folder() / "joined" / (digest.hexdigest() + sidecar.SUFFIX))


def _keep(whole: Table, path: str) -> None:
    """Saves a start's work for the next; a cache that cannot be written only makes that one slower."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
        table_file.write_apart(whole, path)
        others = sorted((e for e in os.scandir(folder) if e.name.endswith(sidecar.SUFFIX)), key=_age)
        for entry in others[:-_KEPT]:
            for name in glob.glob(glob.escape(entry.path) + "*"):
                os.unlink(name)
    except OSError:
        pass


def _age(entry: os.DirEntry[str]) -> float:
    return entry.stat().st_mtime
