"""An embedding index while it is written: columns that only grow, and a note of how far whole shards reach.

What is killed at any moment goes on from the last shard that was finished: columns are cut back to where the note says.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from mm.evaluation import vector_store as store
from mm.evaluation.images import write_whole
from mm.evaluation.vector_store import About

PLAN, NOTE = "plan.json", "progress.json"
RAW = {  # columns by name, and their type
    "embeddings": "",  # the index's precision
    "keys": "uint8",
    "key_ends": "int64",
    "captions": "uint8",
    "caption_ends": "int64",
    "caption_counts": "int64",
    "shard_rows": "int64",
}
OURS = {store.INDEX, store.EMBEDDINGS, store.SAMPLES, store.LISTS, store.LEDGER, PLAN, NOTE}
OURS |= {f"{name}.raw" for name in RAW}


class Part:
    """`OUT.part`, begun anew or gone on with. A context manager; on leaving it the files are closed, never removed."""

    def __init__(self, out: Path, plan: dict[str, Any], dim: int) -> None:
        self.folder, self.plan, self.dim = beside(out, ".part"), plan, dim
        self.kind = store.PRECISIONS[plan["precision"]]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ValueError(f"{self.folder}: another mm index writes there; wait for it") from error
        note = self._note()
        if note is None:
            for path in self.folder.iterdir():
                path.unlink()
            note = {"shards": 0, "rows": 0, "seen": 0, "unusable": 0, "lengths": {}}
            write_whole(self.folder / PLAN, json.dumps(plan).encode())
        self.shards, self.rows, self.seen, self.unusable = (
            int(note[name]) for name in ("shards", "rows", "seen", "unusable")
        )
        self._files: dict[str, IO[bytes]] = {}
        for name in (*(f"{name}.raw" for name in RAW), store.LEDGER):
            file = open(self.folder / name, "ab")  # noqa: SIM115 (closed by __exit__)
            file.truncate(int(note["lengths"].get(name, 0)))
            self._files[name] = file
        self._captions = self._size("caption_ends.raw") // 8
        self._shard_rows = 0

    def _note(self) -> dict[str, Any] | None:
        """How far an earlier try of the same plan came; None where there is none that can be gone on with."""
        try:
            if json.loads((self.folder / PLAN).read_text(encoding="utf-8")) != self.plan:
                return None
            note = json.loads((self.folder / NOTE).read_text(encoding="utf-8"))
            long_enough = all((self.folder / name).stat().st_size >= size for name, size in note["lengths"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # cut short, or not there yet
            return None
        return note if long_enough else None

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        os.close(self._lock)

    def _size(self, name: str) -> int:
        return self._files[name].seek(0, os.SEEK_END)

    def add(self, embeddings: Tensor, keys: Sequence[str], captions: Sequence[Sequence[str]]) -> None:
        """Rows of the shard that is being written: float `[b, E]` with their keys and captions."""
        self.add_bytes(embeddings.numpy().astype(self.kind, copy=False), keys, captions)

    def add_bytes(self, embeddings: np.ndarray, keys: Sequence[str], captions: Sequence[Sequence[str]]) -> None:
        self._files["embeddings.raw"].write(np.ascontiguousarray(embeddings).data)
        self._strings("keys", "key_ends", keys)
        self._strings("captions", "caption_ends", [text for texts in captions for text in texts])
        counts = self._captions + np.cumsum([len(texts) for texts in captions], dtype=np.int64)
        self._captions = int(counts[-1]) if len(counts) else self._captions
        self._files["caption_counts.raw"].write(counts.tobytes())
        self._shard_rows += len(keys)

    def _strings(self, name: str, ends: str, texts: Sequence[str]) -> None:
        data = [text.encode("utf-8", "replace") for text in texts]
        start = self._size(f"{name}.raw")
        self._files[f"{name}.raw"].write(b"".join(data))
        self._files[f"{ends}.raw"].write((start + np.cumsum([len(text) for text in data], dtype=np.int64)).tobytes())

    def finish_shard(self, lost: Iterable[tuple[str, str, str]] = (), seen: int = 0, unusable: int = 0) -> None:
        """The shard is whole: from here on a killed run goes on behind it. `lost`: (shard, key, reason)."""
        for shard, key, reason in lost:
            line = json.dumps({"shard": shard, "key": key, "reason": reason})
            self._files[store.LEDGER].write(line.encode() + b"\n")
        self._files["shard_rows.raw"].write(self._shard_rows.to_bytes(8, "little"))
        self.shards, self.rows, self._shard_rows = self.shards + 1, self.rows + self._shard_rows, 0
        self.seen, self.unusable = self.seen + seen, self.unusable + unusable
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        lengths = {name: self._size(name) for name in self._files}
        numbers = {"shards": self.shards, "rows": self.rows, "seen": self.seen, "unusable": self.unusable}
        write_whole(self.folder / NOTE, json.dumps(numbers | {"lengths": lengths}).encode())

    def write_columns(self) -> list[int]:
        """The columns as safetensors files; returns the rows of each shard."""
        for file in self._files.values():
            file.flush()
        captions = self._size("caption_ends.raw") // 8
        lengths = {"keys": self._size("keys.raw"), "captions": self._size("captions.raw"), "caption_ends": captions}
        columns = [
            (name, kind, (lengths.get(name, self.rows),), self.folder / f"{name}.raw")
            for name, kind in RAW.items()
            if name not in ("embeddings", "shard_rows")
        ]
        store.write_columns(self.folder / store.SAMPLES, columns)
        embeddings = ("embeddings", self.kind, (self.rows, self.dim), self.folder / "embeddings.raw")
        store.write_columns(self.folder / store.EMBEDDINGS, [embeddings])
        return np.fromfile(self.folder / "shard_rows.raw", np.int64).tolist()


def beside(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)


def claim(out: Path) -> None:
    """Raises ValueError where `out`, or what is written beside it, holds files that are not an index's.

    Ends what a killed run had all but ended: a whole index that only had to be put in its place.
    """
    for folder in (out, beside(out, ".part"), beside(out, ".old")):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: is a file; name a folder for the index")
        others = sorted(path.name for path in folder.iterdir() if path.name not in OURS) if folder.is_dir() else []
        others = [name for name in others if not name.startswith(tuple(f".{ours}." for ours in OURS))]
        if others:
            raise ValueError(f"{folder}: holds {others[0]}, which is no part of an index; name another folder")
    if (beside(out, ".part") / store.INDEX).is_file():
        publish(out)
    if out.is_dir():
        shutil.rmtree(beside(out, ".old"), ignore_errors=True)


def publish(out: Path) -> None:
    """Puts the whole index in `OUT.part` in its place, and what was there away.

    Killed between the two renames, `out` is not there and the part is: `claim` puts it there.
    """
    part, old = beside(out, ".part"), beside(out, ".old")
    for name in (PLAN, NOTE, *(f"{name}.raw" for name in RAW)):
        (part / name).unlink(missing_ok=True)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
    os.rename(part, out)
    shutil.rmtree(old, ignore_errors=True)


def write_about(folder: Path, about: About) -> None:
    write_whole(folder / store.INDEX, about.to_bytes())
