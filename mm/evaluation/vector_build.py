"""Pictures of shards made into an embedding index: streamed, in constant memory, shard after shard."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.config import ConfigError
from mm.data import sidecar
from mm.data.index import Entry
from mm.data.remote import is_remote
from mm.evaluation import vector_store as store
from mm.evaluation.nearest import BLOCK, Lists
from mm.evaluation.stream import Stream
from mm.evaluation.vector_part import Part, claim, publish, write_about
from mm.evaluation.vector_store import About, ShardFacts
from mm.evaluation.vectors import MANY, VectorIndex

if TYPE_CHECKING:
    from mm.evaluation.inference import Inference


@dataclass
class Built:
    """An index, and how much of it was work: rows encoded now, and taken over from the index before or a part of it."""

    about: About
    encoded: int
    kept: int
    listed: bool = False  # nothing but lists was made


def build_index(
    inference: Inference,
    files: Sequence[str],
    out: str | os.PathLike[str],
    *,
    source: str,
    model_hash: str,
    captions: str = "txt",
    limit: int | None = None,
    precision: str = "fp32",
    approximate: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> Built:
    """Makes, or brings up to date, the index of shard `files` in the folder `out`.

    Shards that lie unchanged in an index of the same model and options are not encoded again; nothing is done where
    none changed. A killed run goes on behind its last whole shard, and ends with the same bytes. `captions`: a spec as
    in a config, "" for none. `approximate` makes lists too, as over a million rows do. Raises ValueError where `out`
    holds something else, ConfigError where no sample can be used.
    """
    out = Path(os.path.abspath(out))
    claim(out)
    paths = [file if is_remote(file) else os.path.abspath(file) for file in files]
    shards = [ShardFacts(path, *sidecar.facts(path)) for path in paths]
    plan: dict[str, Any] = {"hash": model_hash, "captions": captions, "limit": limit, "precision": precision}
    old = _old(out, plan)
    if old is not None and [_stamp(shard) for shard in old.about.shards] == [_stamp(shard) for shard in shards]:
        if old.about.source != source:
            old.about.source, old.about.name = source, _name(source)
            write_about(out, old.about)
        listed = approximate and not old.about.lists
        if listed:
            old.about.lists = _write_lists(out, old.about, progress)
            write_about(out, old.about)
        return Built(old.about, 0, len(old), listed)
    plan["shards"] = [list(_stamp(shard)) for shard in shards]  # as JSON gives it back
    before = {} if old is None else _ledger(out)
    reuse = {} if old is None or limit is not None else _places(old.about)
    dim = inference.config.model.embed_dim
    with Part(out, plan, dim) as part:
        kept, start = part.rows, part.shards
        for same, group in itertools.groupby(shards[start:], lambda shard: _stamp(shard) in reuse):
            if same and old is not None:
                for shard in group:
                    kept += _take_over(part, old, *reuse[_stamp(shard)], before.get(shard.path, []))
            else:
                _encode(part, inference, [shard.path for shard in group], captions, limit, workers, progress)
        if not part.rows:
            shutil.rmtree(part.folder)
            raise ConfigError(f"{files[0]}: no picture in {len(files)} shard(s) can be used; mm shards verify says why")
        for shard, rows in zip(shards, part.write_columns(), strict=True):
            shard.rows = rows
        about = About(
            source=source,
            name=_name(source),
            hash=model_hash,
            captions=captions,
            limit=limit,
            count=part.rows,
            dim=dim,
            precision=precision,
            unusable=part.unusable,
            shards=shards,
            mm=_version(),
        )
        if approximate or part.rows > MANY:
            about.lists = _write_lists(part.folder, about, progress)
        write_about(part.folder, about)  # from here on it is whole
        publish(out)
    return Built(about, about.count - kept, kept)


def _stamp(shard: ShardFacts) -> tuple[str, int, str]:
    return shard.path, shard.bytes, shard.version


def _old(out: Path, plan: dict[str, Any]) -> VectorIndex | None:
    """The index in `out` where it is one of this model with these options."""
    if not (out / store.INDEX).is_file():
        return None
    try:
        old = VectorIndex.open(out)
    except ValueError:  # damaged: made anew
        return None
    return old if all(getattr(old.about, name) == value for name, value in plan.items()) else None


def _places(about: About) -> dict[Any, tuple[int, int]]:
    """First row and number of rows of each shard."""
    ends = list(itertools.accumulate(shard.rows for shard in about.shards))
    return {_stamp(shard): (end - shard.rows, shard.rows) for shard, end in zip(about.shards, ends, strict=True)}


def _ledger(folder: Path) -> dict[str, list[Entry]]:
    """What an index could not use, by shard."""
    found: dict[str, list[Entry]] = defaultdict(list)
    path = folder / store.LEDGER
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        entry = Entry(**json.loads(line))
        found[entry.shard].append(entry)
    return found


def _take_over(part: Part, old: VectorIndex, first: int, count: int, lost: list[Entry]) -> int:
    """Copies the rows of a shard that has not changed."""
    for start in range(first, first + count, BLOCK):
        rows = range(start, min(start + BLOCK, first + count))
        keys, captions = [old.key(row) for row in rows], [old.captions(row) for row in rows]
        part.add_bytes(old.embeddings[rows.start : rows.stop], keys, captions)
    part.finish_shard(lost, unusable=sum(bool(entry.key) for entry in lost))
    return count


def _encode(
    part: Part,
    inference: Inference,
    paths: list[str],
    captions: str,
    limit: int | None,
    workers: int,
    progress: bool,
) -> None:
    """Appends all usable samples of some shards, as many as `limit` still allows."""
    left = None if limit is None else limit - part.seen
    stream, current, lost = None, 0, _Lost()
    try:
        if left is None or left > 0:
            label = "encoding pictures" if progress else ""
            processor = inference.processor("image")
            stream = Stream(paths, processor, captions=captions, workers=workers, limit=left, progress=label)
            lost.begin(stream)
            for chunk in stream:
                embeddings = inference.embed("image", (chunk.images,))
                start = 0
                for shard, group in itertools.groupby(chunk.shards):
                    while paths[current] != shard:
                        lost.finish(part, paths[current])
                        current += 1
                    rows = slice(start, start := start + len(list(group)))
                    part.add(embeddings[rows], chunk.keys[rows], chunk.captions[rows])
                    lost.used += rows.stop - rows.start
    except ConfigError as error:  # nothing in these shards can be used: fatal only where there is nothing else either
        if part.rows or len(part.plan["shards"]) > len(paths):
            lost.more(Entry(paths[0], "", str(error)))
        else:
            raise
    while current < len(paths):
        lost.finish(part, paths[current])
        current += 1


class _Lost:
    """What a stream could not use, entered shard by shard as shards are finished."""

    def __init__(self) -> None:
        self.used = 0  # samples of the present shard
        self._stream: Stream | None = None
        self._taken, self._away = 0, 0
        self._by_shard: dict[str, list[tuple[Entry, bool]]] = defaultdict(list)

    def begin(self, stream: Stream) -> None:
        self._stream, self._away = stream, len(stream.indexed_away)

    def more(self, entry: Entry) -> None:
        self._by_shard[entry.shard].append((entry, False))

    def finish(self, part: Part, shard: str) -> None:
        """Ends the present shard. Samples seen are those that were decoded or tried, not those without a picture."""
        if self._stream is not None:
            for number, entry in enumerate(self._stream.lost[self._taken :], self._taken):
                self._by_shard[entry.shard].append((entry, number >= self._away))
            self._taken = len(self._stream.lost)
        entries = self._by_shard.pop(shard, [])
        seen = self.used + sum(tried for _, tried in entries)
        part.finish_shard([entry for entry, _ in entries], seen, sum(bool(entry.key) for entry, _ in entries))
        self.used = 0


def _write_lists(folder: Path, about: About, progress: bool) -> str:
    """Writes lists.safetensors beside the embeddings, whole or not at all; returns its SHA-256."""
    from tqdm import tqdm

    wanted: dict[str, Any] = {"embeddings": (store.PRECISIONS[about.precision], (about.count, about.dim))}
    embeddings = store.read_columns(folder / store.EMBEDDINGS, wanted)["embeddings"]
    quiet = None if progress else True
    with tqdm(total=about.count, desc="sorting into lists", unit="row", disable=quiet, leave=False) as bar:
        lists = Lists.of(embeddings, progress=bar.update)
    path = folder / f".{store.LISTS}.part"
    store.write_columns(
        path,
        [
            ("centres", "float32", lists.centres.shape, lists.centres),
            ("rows", "uint32", lists.rows.shape, lists.rows),
            ("ends", "int64", lists.ends.shape, lists.ends),
        ],
    )
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    os.replace(path, folder / store.LISTS)
    return digest


def _name(source: str) -> str:
    return os.path.basename(source.rstrip("/")) if os.path.exists(source) else source


def _version() -> str:
    try:
        return importlib.metadata.version("mm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
