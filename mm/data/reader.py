"""Samples out of shards: reads at known offsets, decoded once where they are small enough to keep."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import NamedTuple

from PIL import Image

from mm.data import decode
from mm.data.index import LARGEST_TEXT, Entry, ShardIndex

_OPEN_FILES = 32
_SMALL = 256 * 256  # pixels: larger pictures are not kept, they would crowd out many
_OVERHEAD = 1000  # bytes that Python spends on a kept sample beside its pixels


class Sample(NamedTuple):
    """One decoded sample. The image is shared by all who ask for it: copy before writing."""

    image: Image.Image | None
    caption: str
    aliases: tuple[str, ...]


class Reader:
    """Reads samples by index number. Picklable; safe to use from several threads; holds few open files.

    Decoded small samples stay in memory up to `cache_bytes`, first come: an epoch visits each sample once, so that
    replacing old ones by new ones would never find anything.
    """

    def __init__(self, index: ShardIndex, *, images: bool = True, aliases: bool = False, cache_bytes: int = 256 << 20):
        self.index, self.images, self.aliases, self.cache_bytes = index, images, aliases, cache_bytes
        self._start()

    def _start(self) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        self._kept: dict[int, Sample] = {}
        self._kept_bytes = 0

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start()

    def __del__(self) -> None:
        for fd in getattr(self, "_files", {}).values():
            os.close(fd)

    def read(self, number: int) -> Sample:
        """Sample `number` of the index. Raises ValueError where its image or caption cannot be used."""
        kept = self._kept.get(number)
        if kept is not None:
            return kept
        picture = decode.image(self.bytes(number, 0)) if self.images else None
        sample = Sample(picture, self.caption(number), tuple(self.names(number)) if self.aliases else ())
        pixels = picture.width * picture.height if picture is not None else 0
        size = 3 * pixels + len(sample.caption) + _OVERHEAD
        if pixels <= _SMALL and self._kept_bytes + size <= self.cache_bytes:
            self._kept[number] = sample
            self._kept_bytes += size
        return sample

    def caption(self, number: int) -> str:
        """Raises ValueError where it is empty or not UTF-8."""
        return decode.caption(self.bytes(number, 1))

    def names(self, number: int) -> list[str]:
        """Aliases in the metadata; [] where there is none. Raises ValueError where it is not JSON."""
        size = self.index.spans[number, 2, 1]
        if size < 0:
            return []
        if size > LARGEST_TEXT:
            raise ValueError(f"metadata of {size} bytes is over the limit of {LARGEST_TEXT}")
        return decode.aliases(self.bytes(number, 2))

    def bytes(self, number: int, part: int) -> bytes:
        """Bytes of a sample's image (0), caption (1) or metadata (2). Raises ValueError where the shard lacks them."""
        offset, size = map(int, self.index.spans[number, part])
        shard = int(self.index.shard_of[number])
        data = b""
        try:
            with self._lock:  # another thread may not close the file between finding and reading it
                fd = self._open(shard)
                while len(data) < size:
                    piece = os.pread(fd, size - len(data), offset + len(data))
                    if not piece:
                        raise ValueError(f"shard ends at byte {offset + len(data)}, inside the sample")
                    data += piece
        except OSError as error:
            raise ValueError(f"shard cannot be read: {error.strerror}") from error
        return data

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.index.shards[shard], os.O_RDONLY)
        return self._files[shard]


def read_captions(index: ShardIndex, *, aliases: bool = False) -> tuple[list[str], list[str], list[Entry]]:
    """Keys and captions of all samples in index order, and ledger entries of those left out as unreadable.

    With `aliases`, every alias follows its sample's caption as one more (key, caption).
    """
    reader = Reader(index, images=False, cache_bytes=0)
    keys: list[str] = []
    captions: list[str] = []
    ledger: list[Entry] = []
    for number, key in enumerate(index.keys):
        try:
            texts = [reader.caption(number), *(reader.names(number) if aliases else [])]
        except ValueError as error:
            ledger.append(Entry(index.shards[index.shard_of[number]], key, str(error)))
            continue
        keys += [key] * len(texts)
        captions += texts
    return keys, captions, ledger
