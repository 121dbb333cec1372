"""Pictures out of shards, some at a time: memory does not grow with the number of samples.

Letters: B samples of a chunk, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm.adapters.base import EXTENSION
from mm.config import ConfigError
from mm.data import decode
from mm.data.captions import Captions
from mm.data.index import Entry, ShardIndex
from mm.data.reader import Reader

if TYPE_CHECKING:
    from mm.adapters.base import Processor

CHUNK = 256  # samples


@dataclass
class Chunk:
    """Consecutive usable samples, in the order of the shards."""

    keys: list[str]
    shards: list[str]  # absolute path or URL of each sample's shard
    images: Tensor  # uint8 [B, 3, H, W], at the model's size
    captions: list[list[str]]  # those that each sample has; [] each where none were asked for
    members: list[dict[str, bytes]]  # by extension, those that were asked for

    def __len__(self) -> int:
        return len(self.keys)


class Stream:
    """Iterates over the samples of some shard files in chunks; each iteration begins anew.

    `captions`: where captions are ("txt", "json.FIELD", ...), "" where pictures alone are wanted. `members`: extensions
    that a sample must have ("cls"), whose bytes come along. `workers`: decoding processes; 0 decodes in this one.
    `numbers`: only these samples, counted from 0 over all shards, in this order.
    After an iteration `lost` says what could not be used and why; `len` is the number of indexed samples, at most
    `limit`. Raises ConfigError where the shards hold no sample, and ValueError where all that were read are unusable.
    """

    def __init__(
        self,
        files: Sequence[str],
        processor: Processor,
        *,
        captions: str = "",
        members: Sequence[str] = (),
        chunk: int = CHUNK,
        workers: int = 0,
        limit: int | None = None,
        numbers: Sequence[int] | None = None,
        progress: str = "",
    ) -> None:
        for name, value, least in (("chunk", chunk, 1), ("workers", workers, 0), ("limit", limit, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} = {value!r}: must be a whole number of at least {least}")
        if isinstance(members, str):
            raise ValueError(f"members = {members!r}: must be a list; write [{members!r}]")
        for member in members:
            if not isinstance(member, str) or not EXTENSION.match(member):
                raise ValueError(f"members: {member!r} is no extension in lower case, such as 'cls' or 'depth.png'")
        places = Captions(captions) if captions else None
        index = ShardIndex(list(files), parts=places.parts if places else ())
        self._samples = _Samples(Reader(index, places or Captions("txt"), cache_bytes=0), processor, places, members)
        chosen = range(len(index)) if numbers is None else list(numbers)
        self._numbers = chosen if limit is None else chosen[:limit]
        self.files, self.chunk, self.workers, self.progress = list(files), chunk, workers, progress
        self.indexed_away = list(index.ledger)  # unusable by the index alone
        self.lost: list[Entry] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Chunk]:
        from torch.utils.data import DataLoader
        from tqdm import tqdm

        self.lost, usable = list(self.indexed_away), 0
        loader = DataLoader(
            self._samples,
            batch_size=self.chunk,
            sampler=self._numbers,
            num_workers=self.workers,
            collate_fn=_as_they_are,
            multiprocessing_context="forkserver" if self.workers else None,
            generator=torch.Generator(),  # or it would draw from the caller's random numbers
        )
        quiet = None if self.progress else True  # None: shown on a terminal only
        with tqdm(total=len(self), desc=self.progress, unit="sample", disable=quiet, leave=False) as bar:
            for rows in loader:
                good = [row for row in rows if not isinstance(row, Entry)]
                self.lost += [row for row in rows if isinstance(row, Entry)]
                usable += len(good)
                bar.update(len(rows))
                if good:
                    keys, shards, items, captions, members = (list(column) for column in zip(*good, strict=True))
                    yield Chunk(keys, shards, self._samples.processor.collate(items)[0], captions, members)
        if not usable:
            first = f"; {self.lost[0].key}: {self.lost[0].reason}" if self.lost else ""
            raise ConfigError(f"{self.files[0]}: none of {len(self)} samples can be used{first}")


class _Samples(torch.utils.data.Dataset[Any]):
    """Sample by number: its key, shard, arrays, captions and members, or a ledger entry. Picklable, for workers."""

    def __init__(self, reader: Reader, processor: Processor, captions: Captions | None, members: Sequence[str]) -> None:
        self.reader, self.processor, self.captions, self.members = reader, processor, captions, tuple(members)

    def __getitem__(self, number: int) -> Any:
        index = self.reader.index
        key, shard = index.key(number), index.shards[index.shard_of(number)]
        names = ("image", *(self.captions.parts if self.captions else ()))
        try:
            data = self.reader.parts(number, names, self.members)
            item = self.processor.prepare(decode.picture(data["image"]), train=False)
            found = self.captions.texts(data.get, every=True) if self.captions else []
        except ValueError as error:
            return Entry(shard, key, str(error))
        texts = list(dict.fromkeys(text for strings, _ in found for text in strings))
        there = shard if "://" in shard else os.path.abspath(shard)
        return key, there, item, texts, {name: data[name] for name in self.members}


def _as_they_are(rows: list[Any]) -> list[Any]:
    return rows
