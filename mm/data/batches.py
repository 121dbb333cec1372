"""One global batch number to one rank's `Batch`: the same whoever makes it, in whatever thread or process."""

from __future__ import annotations

import hashlib
import pickle
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mm.adapters.base import Processor
from mm.config import ConfigError
from mm.data import captions
from mm.data.buckets import Buckets
from mm.data.index import Entry, ShardIndex
from mm.data.mixture import Mixture
from mm.data.order import Order, sample_seed
from mm.data.reader import Reader, Sample, SampleLost, ShardLost
from mm.types import Batch

_MOST_LOST_IN_A_ROW = 4  # shards: then the store is gone rather than a shard
_AHEAD = 4096  # samples looked ahead for remote shards

AnyOrder = Order | Mixture | Buckets


class Made(NamedTuple):
    """A batch with what went wrong while it was made: ledger entries, and which positions met a bad sample."""

    batch: Batch
    ledger: list[Entry]
    bad: list[bool]


class Streams:
    """Random streams numbered by (seed, stream), one generator reset in place: ten times as fast as making one each."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._state: Any = self._bits.state

    def at(self, seed: int, stream: int) -> np.random.Generator:
        """The generator at the start of a stream; valid until the next call."""
        self._state["state"]["key"][:] = seed, stream
        self._bits.state = self._state
        return self._generator


def stream_number(name: str) -> int:
    """64 bits that tell one use of a sample's seed from another."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


class Batches(Dataset[Made]):
    """`batches[n]` is this rank's slice of global batch n.

    In training the order is endless, and an unusable sample is replaced by the next usable one of the index (of a shard
    that is lost, by the first of the next shard). Otherwise the order is the index's, the last batch is short, and an
    unusable sample is left out: a double would count twice. `shapes`: the (width, height) that each code of a `Buckets`
    order by aspect stands for. `trim`: text is padded to the batch's longest only, rounded up to 8.
    """

    def __init__(
        self,
        index: ShardIndex,
        reader: Reader,
        processors: Mapping[str, Processor],
        *,
        order: AnyOrder | None,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        most_bad_in_a_row: int = 100,
        shapes: Sequence[tuple[int, int]] = (),
        trim: bool = False,
    ) -> None:
        self.index, self.reader, self.processors, self.order = index, reader, dict(processors), order
        self.seed, self.batch_size, self.rank, self.rows = seed, batch_size, rank, batch_size // world
        self.most_bad_in_a_row, self.shapes, self.trim = most_bad_in_a_row, list(shapes), trim
        self._numbers = {name: stream_number(name) for name in ("caption", *self.processors)}

    def __getitem__(self, n: int) -> Made:
        start = n * self.batch_size + self.rank * self.rows
        shape = None
        epochs, numbers = self._numbered(start)
        if self.order is not None:
            if self.reader.store is not None:
                self.reader.ahead(self.order.span(start, start + max(_AHEAD, 2 * self.batch_size))[1])
            if self.shapes and isinstance(self.order, Buckets):
                shape = self.shapes[self.order.code(n)]
        items: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in self.processors}
        keys: list[str] = []
        seeds: list[int] = []
        ledger: list[Entry] = []
        bad: list[bool] = []
        streams = Streams()
        for epoch, number in zip(epochs, numbers, strict=True):
            failures = len(ledger)
            made = self._usable(number, epoch, shape, streams, ledger)
            bad.append(any(entry.key for entry in ledger[failures:]))  # a lost shard is counted as a whole
            if made is None:
                continue
            key, seed, prepared = made
            keys.append(key)
            seeds.append(seed)
            for name, item in prepared.items():
                items[name].append(item)
        return Made(self._collate(items, seeds, keys), ledger, bad)

    def _numbered(self, start: int) -> tuple[list[int], list[int]]:
        """Epochs and sample numbers of this rank's rows from position `start` on."""
        if self.order is not None:
            epochs, numbers = self.order.span(start, start + self.rows)
            return epochs.tolist(), numbers.tolist()
        left = list(range(min(start, len(self.index)), min(start + self.rows, len(self.index))))
        return [0] * len(left), left

    def shards_of(self, n: int) -> dict[str, str]:
        """Shard by key, of this rank's samples of batch n as the order has them."""
        _, numbers = self._numbered(n * self.batch_size + self.rank * self.rows)
        return {self.index.key(number): self.index.shards[self.index.shard_of(number)] for number in numbers}

    def bytes_of_one(self) -> int:
        """Bytes of a batch, from a first sample that can be used; 0 where there is none."""
        made = self._usable(0, 0, None, Streams(), []) if self.order is not None else None
        if made is None:
            return 0
        return self.rows * sum(array.nbytes for item in made[2].values() for array in item.values())

    def _collate(self, items: dict[str, list[dict[str, np.ndarray]]], seeds: list[int], keys: list[str]) -> Batch:
        inputs: dict[str, Tensor] = {}
        lengths: dict[str, Tensor] = {}
        for name, processor in self.processors.items():
            if not keys:  # a rank that holds nothing of a short last batch
                break
            inputs[name], ragged = processor.collate(items[name])
            if ragged is not None:
                lengths[name] = ragged
                if self.trim:
                    inputs[name] = inputs[name][:, : -(-int(ragged.max()) // 8) * 8].contiguous()
        return Batch(inputs, lengths, torch.tensor(seeds, dtype=torch.int64), keys)

    def _usable(
        self, number: int, epoch: int, shape: tuple[int, int] | None, streams: Streams, ledger: list[Entry]
    ) -> tuple[str, int, dict[str, dict[str, np.ndarray]]] | None:
        """Key, seed and prepared items of sample `number`, or in training of the next usable one."""
        candidate, tries, lost = number, 0, 0
        while True:
            key, shard = self.index.key(candidate), self.index.shards[self.index.shard_of(candidate)]
            seed = sample_seed(self.seed, epoch, key)
            try:
                return key, seed, self._prepare(self.reader.read(candidate), seed, shape, streams)
            except ShardLost as error:
                ledger.append(Entry(shard, "", str(error)))
                candidate, lost = self.index.after(candidate), lost + 1
            except ValueError as error:
                ledger.append(Entry(shard, key, str(error)))
                gone = isinstance(error, SampleLost)  # with all that follow it in this shard
                candidate = self.index.after(candidate) if gone else (candidate + 1) % len(self.index)
                tries += 1
            if self.order is None:
                return None
            if lost >= min(_MOST_LOST_IN_A_ROW, int(np.count_nonzero(self.index.sizes))):
                raise ConfigError(f"shards: {lost} in a row cannot be read; the last, {shard}: {ledger[-1].reason}")
            if tries >= min(self.most_bad_in_a_row, len(self.index)):
                raise ConfigError(
                    f"shards: {tries} samples in a row cannot be used (data.max_consecutive_errors = "
                    f"{self.most_bad_in_a_row}); the last, {key} in {shard}: {ledger[-1].reason}"
                )

    def _prepare(
        self, sample: Sample, seed: int, shape: tuple[int, int] | None, streams: Streams
    ) -> dict[str, dict[str, np.ndarray]]:
        train = self.order is not None
        text = sample.texts[0][0][0]
        if train and (len(sample.texts) > 1 or len(sample.texts[0][0]) > 1):
            text = captions.draw(sample.texts, streams.at(seed, self._numbers["caption"]))
        raw = {"image": sample.image, "text": text, **sample.members}
        return {
            name: processor.prepare(
                raw[processor.source],
                train=train,
                rng=streams.at(seed, self._numbers[name]) if train else None,
                **({"size": shape} if shape is not None and processor.source == "image" else {}),
            )
            for name, processor in self.processors.items()
        }


class Failure(NamedTuple):
    """An error of a worker process, and its traceback as text."""

    error: Exception
    trace: str


class Carried(Dataset[Any]):
    """`Batches` for a worker process: an error is a value, so that the main process raises the same one.

    torch would raise another, with the traceback inside its message.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, n: int) -> Made | Failure:
        try:
            return self.batches[n]
        except Exception as error:
            trace = traceback.format_exc()
            try:
                carried = pickle.loads(pickle.dumps(error))
            except Exception:  # an error class may not survive pickling: tell what it was
                carried = RuntimeError(repr(error))
            return Failure(carried, trace)
