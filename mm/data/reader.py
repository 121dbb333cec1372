"""Samples out of shards: reads at known offsets, local or fetched; small pictures decoded once and kept."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mm.data import decode, remote
from mm.data.captions import Captions, Texts
from mm.data.index import LARGEST_TEXT, Entry, ShardIndex
from mm.data.members import Beside, beside
from mm.data.shard_cache import ShardCache
from mm.data.sidecar import LOCAL, cache_folder, is_same
from mm.data.table import Shard, build
from mm.data.tar import File, Scan, open_file

_OPEN_FILES = 32
_TOGETHER = 1 << 14  # bytes up to which the parts of a sample are read at once: of more, taking them apart costs more
_LOOKS = 3  # at a shard that changes while it is read
_SMALL = 256 * 256  # pixels: larger pictures are not kept, they would crowd out many
_OVERHEAD = 1000  # bytes that Python spends on a kept sample beside its pixels
_DISK = 20_000_000_000  # bytes that fetched shards may take
_AHEAD = 4  # remote shards fetched before they are needed


Parts = dict[str, bytes]


class ShardLost(ValueError):
    """A whole shard cannot be read; none of its samples will be tried again."""


class SampleLost(ValueError):
    """A sample is no longer in its shard, and neither are those after it."""


class _Opened(NamedTuple):
    """A shard that is open, as it was then."""

    fd: int
    state: tuple[int, int] | None  # None: a copy of our own, which nobody else writes to
    rows: int | None = None  # the samples that it still has, where it was damaged since it was indexed
    damage: str = ""


class Sample(NamedTuple):
    """One sample. The picture is shared by all who ask for it."""

    image: decode.Picture | None
    texts: Texts  # its captions
    members: Parts = {}  # noqa: RUF012 (never changed); by extension, those of `Reader.members`


class Reader:
    """Reads samples by index number. Picklable; safe to use from several threads; holds few open files.

    `captions`: where captions are, one for all shards or one each; `every` reads all that a sample has, else the first.
    `members`: extensions ("depth.png") of what else to read of each sample, as bytes; a sample must have them.
    Decoded small pictures stay in memory up to `cache_bytes`, first come: an epoch visits each sample once, so that
    replacing old ones by new ones would never find anything. Remote shards are fetched into `store` whole, once.
    """

    def __init__(
        self,
        index: ShardIndex,
        captions: Captions | Sequence[Captions] = Captions("txt"),  # noqa: B008 (never changed)
        *,
        images: bool = True,
        every: bool = False,
        members: Sequence[str] = (),
        cache_bytes: int = 256 << 20,
        store: ShardCache | None = None,
    ) -> None:
        self.members = tuple(members)
        self.index, self.images, self.every, self.cache_bytes = index, images, every, cache_bytes
        self.captions = [captions] * len(index.shards) if isinstance(captions, Captions) else list(captions)
        far = any(map(remote.is_remote, index.shards))
        self.store = store or (ShardCache(str(cache_folder() / "shards"), _DISK) if far else None)
        self._start()

    def _start(self) -> None:
        self._files: OrderedDict[int, _Opened] = OrderedDict()
        self._lost: dict[int, str] = {}
        self._lock = threading.Lock()
        self._kept: dict[int, Sample] = {}
        self._kept_bytes = 0

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start()

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file.fd)

    def read(self, number: int) -> Sample:
        """Sample `number` of the index. Raises ValueError where its image or caption cannot be used."""
        kept = self._kept.get(number)
        if kept is not None:
            return kept
        captions = self.captions[self.index.shard_of(number)]
        names = ("image", *captions.parts) if self.images else captions.parts
        data = self.parts(number, names, self.members)
        texts = captions.texts(data.get, every=self.every)
        picture = decode.picture(data["image"]) if self.images else None
        sample = Sample(picture, texts, {name: data[name] for name in self.members})
        pixels = picture.width * picture.height if picture is not None else 0
        more = sum(map(len, sample.members.values()))
        if pixels <= _SMALL and more <= 3 * _SMALL:
            if picture is not None:
                picture.pixels()
            size = (picture.nbytes if picture is not None else 0) + more + _OVERHEAD
            if self._kept_bytes + size <= self.cache_bytes:
                self._kept[number] = sample
                self._kept_bytes += size
        return sample

    def texts(self, number: int) -> Texts:
        """Captions of a sample. Raises ValueError where it has none that can be used."""

        captions = self.captions[self.index.shard_of(number)]
        return captions.texts(self.parts(number, captions.parts).get, every=self.every)

    def bytes(self, number: int, part: str) -> bytes:
        """Bytes of a sample's "image", "txt", "caption" or "json". Raises as `parts`."""
        return self.parts(number, (part,)).get(part, b"")

    def parts(self, number: int, names: Sequence[str], members: Sequence[str] = ()) -> Parts:
        """Bytes of those parts that a sample has, and of members, which it must have. Raises ValueError where the shard
        lacks them or one is too large, and ShardLost where it cannot be read at all."""
        shard, spans = self.index.spans(number, names)
        for name, (_, size) in spans.items():
            if name != "image" and size > LARGEST_TEXT:
                raise ValueError(f"{name} of {size} bytes is over the limit of {LARGEST_TEXT}")
        with self._lock:  # another thread may not close the file between finding and reading it
            for _ in range(_LOOKS):
                file = self._open(shard)
                if file.rows is not None and self.index.place(number) >= file.rows:
                    raise SampleLost(f"lost since it was indexed: {file.damage}")
                try:
                    more = beside(self.index, number, members, File(file.fd)) if members else Beside({}, "")
                    found = spans | more.spans
                    data = _read(file.fd, found)
                except OSError as error:
                    raise ValueError(f"shard cannot be read: {error.strerror}") from error
                if file.state is not None and file.state != _state(file.fd):  # what was read may be anything
                    os.close(self._files.pop(shard).fd)
                    continue
                if more.problem:
                    raise ValueError(more.problem)
                short = [name for name in found if len(data[name]) < found[name][1]]
                if short:
                    offset = found[short[0]][0] + len(data[short[0]])
                    raise ValueError(f"shard ends at byte {offset}, inside the sample")
                return data
        raise ValueError("shard is written to while it is read")

    def ahead(self, numbers: np.ndarray[Any, Any]) -> None:
        """A hint: these samples come next. Remote shards among them are fetched meanwhile."""
        if self.store is None:
            return
        shards = self.index.shards_of(numbers)
        _, first = np.unique(shards, return_index=True)
        soon = [int(shards[place]) for place in np.sort(first)[:_AHEAD]]
        self.store.ahead(
            [(self.index.shards[s], self._facts(s)) for s in soon if remote.is_remote(self.index.shards[s])]
        )

    def _facts(self, shard: int) -> remote.Facts | None:
        """What a remote shard was when it was indexed; None where it was a local file then."""
        about = self.index.table.shards[shard]
        return None if about.version.startswith(LOCAL) else remote.Facts(about.bytes, about.version)

    def _open(self, shard: int) -> _Opened:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if shard in self._lost:
            raise ShardLost(self._lost[shard])
        if len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1].fd)
        name = self.index.shards[shard]
        try:
            if self.store is not None and remote.is_remote(name):
                file = _Opened(self.store.open(name, self._facts(shard)), None)
                if os.fstat(file.fd).st_size != self.index.table.shards[shard].bytes:
                    os.close(file.fd)
                    raise OSError("it changed since it was indexed")
            else:
                file = self._look(open_file(name), shard)
        except OSError as error:
            self._lost[shard] = f"shard cannot be read: {error.strerror or error}"
            raise ShardLost(self._lost[shard]) from error
        self._files[shard] = file
        return file

    def _look(self, fd: int, shard: int) -> _Opened:
        """What a local shard holds now. Raises OSError, and closes it, where it is not the one that was indexed."""
        about, (size, changed) = self.index.table.shards[shard], _state(fd)
        if is_same(about, (size, f"{LOCAL}{changed}")):
            return _Opened(fd, (size, changed))
        try:
            now = build(Shard(about.name, size), Scan(File(fd)))
            rows = self.index.still(shard, now)
            if rows is None:
                raise OSError("it changed since it was indexed")
        except BaseException:
            os.close(fd)
            raise
        damage = now.shards[0].damage
        return _Opened(fd, (size, changed), rows if damage else None, damage)


def _state(fd: int) -> tuple[int, int]:
    """What differs once a file was written to."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def _read(fd: int, spans: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """Bytes at some places (offset, size) of a file, at once where they lie together; fewer where it ends before."""
    if len(spans) < 2 or spans.get("image", (0, 0))[1] > _TOGETHER:
        return {name: _at(fd, offset, size) for name, (offset, size) in spans.items()}
    start = min(offset for offset, _ in spans.values())
    size = max(offset + size for offset, size in spans.values()) - start
    if size > 2 * _TOGETHER:
        return {name: _at(fd, offset, size) for name, (offset, size) in spans.items()}
    data = _at(fd, start, size)
    return {name: data[offset - start : offset - start + size] for name, (offset, size) in spans.items()}


def _at(fd: int, offset: int, size: int) -> bytes:
    data = os.pread(fd, size, offset)
    while len(data) < size and (piece := os.pread(fd, size - len(data), offset + len(data))):
        data += piece
    return data


def read_captions(
    index: ShardIndex,
    captions: Captions | Sequence[Captions] = Captions("txt"),  # noqa: B008 (never changed)
    *,
    every: bool = False,
    numbers: Iterable[int] = (),
    store: ShardCache | None = None,
) -> tuple[list[str], list[str], list[Entry]]:
    """Keys and captions of all samples in index order, and ledger entries of those left out as unreadable.

    With `every`, all of a sample's captions follow each other; with `numbers`, only of those samples.
    """
    reader = Reader(index, captions, images=False, every=every, cache_bytes=0, store=store)
    keys: list[str] = []
    found: list[str] = []
    ledger: list[Entry] = []
    for number in numbers or range(len(index)):
        key = index.key(number)
        try:
            texts = list(dict.fromkeys(text for strings, _ in reader.texts(number) for text in strings))
        except ValueError as error:
            ledger.append(Entry(index.shards[index.shard_of(number)], key, str(error)))
            continue
        if not every:
            texts = texts[:1]
        keys += [key] * len(texts)
        found += texts
    return keys, found, ledger
