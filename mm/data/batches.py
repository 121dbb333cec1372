"""One global batch number to one rank's `Batch`: the same whoever makes it, in whatever thread or process."""

from __future__ import annotations

import hashlib
import pickle
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mm.adapters.base import Processor
from mm.config import ConfigError
from mm.data.index import Entry, ShardIndex
from mm.data.order import Order, sample_seed
from mm.data.reader import Reader, Sample
from mm.types import Batch

_MOST_BAD_IN_A_ROW = 256  # then the data is broken rather than damaged


class Made(NamedTuple):
    """A batch with what went wrong while it was made: ledger entries, and unusable positions of those looked at."""

    batch: Batch
    ledger: list[Entry]
    seen: int
    bad: int


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

    In training the order is endless, and an unusable sample is replaced by the next usable one of the index. Otherwise
    the order is the index's, the last batch is short, and an unusable sample is left out: a double would count twice.
    """

    def __init__(
        self,
        index: ShardIndex,
        processors: Mapping[str, Processor],
        *,
        order: Order | None,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        aliases: bool,
        cache_bytes: int,
    ) -> None:
        self.index, self.processors, self.order, self.seed = index, dict(processors), order, seed
        self.batch_size, self.rank, self.rows = batch_size, rank, batch_size // world
        needs_images = any(processor.source == "image" for processor in self.processors.values())
        self.aliases = aliases and order is not None
        self.reader = Reader(index, images=needs_images, aliases=self.aliases, cache_bytes=cache_bytes)
        self._numbers = {name: stream_number(name) for name in ("caption", *self.processors)}

    def __getitem__(self, n: int) -> Made:
        start = n * self.batch_size + self.rank * self.rows
        if self.order is not None:
            epochs, numbers = (array.tolist() for array in self.order.span(start, start + self.rows))
        else:
            numbers = list(range(min(start, len(self.index)), min(start + self.rows, len(self.index))))
            epochs = [0] * len(numbers)
        items: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in self.processors}
        keys: list[str] = []
        seeds: list[int] = []
        ledger: list[Entry] = []
        streams, bad = Streams(), 0
        for epoch, number in zip(epochs, numbers, strict=True):
            failures = len(ledger)
            made = self._usable(number, epoch, streams, ledger)
            bad += len(ledger) > failures
            if made is None:
                continue
            key, seed, prepared = made
            keys.append(key)
            seeds.append(seed)
            for name, item in prepared.items():
                items[name].append(item)
        return Made(self._collate(items, seeds, keys), ledger, len(numbers), bad)

    def _collate(self, items: dict[str, list[dict[str, np.ndarray]]], seeds: list[int], keys: list[str]) -> Batch:
        inputs: dict[str, Tensor] = {}
        lengths: dict[str, Tensor] = {}
        for name, processor in self.processors.items():
            if not keys:  # a rank that holds nothing of a short last batch
                break
            inputs[name], ragged = processor.collate(items[name])
            if ragged is not None:
                lengths[name] = ragged
        return Batch(inputs, lengths, torch.tensor(seeds, dtype=torch.int64), keys)

    def _usable(
        self, number: int, epoch: int, streams: Streams, ledger: list[Entry]
    ) -> tuple[str, int, dict[str, dict[str, np.ndarray]]] | None:
        """Key, seed and prepared items of sample `number`, or in training of the next usable one."""
        tries = min(len(self.index), _MOST_BAD_IN_A_ROW) if self.order is not None else 1
        for step in range(tries):
            candidate = (number + step) % len(self.index)
            key = self.index.keys[candidate]
            seed = sample_seed(self.seed, epoch, key)
            try:
                return key, seed, self._prepare(self.reader.read(candidate), seed, streams)
            except ValueError as error:
                ledger.append(Entry(self.index.shards[self.index.shard_of[candidate]], key, str(error)))
        if self.order is None:
            return None
        shard, key, reason = ledger[-1]
        raise ConfigError(f"shards: {tries} samples in a row cannot be used; the last, {key} in {shard}: {reason}")

    def _prepare(self, sample: Sample, seed: int, streams: Streams) -> dict[str, dict[str, np.ndarray]]:
        train, text = self.order is not None, sample.caption
        if sample.aliases:
            draw = streams.at(seed, self._numbers["caption"]).random()
            if draw >= 0.5:  # the rest of the same draw picks which
                text = sample.aliases[int((draw - 0.5) * 2 * len(sample.aliases))]
        raw = {"image": sample.image, "text": text}
        return {
            name: processor.prepare(
                raw[processor.source], train=train, rng=streams.at(seed, self._numbers[name]) if train else None
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
