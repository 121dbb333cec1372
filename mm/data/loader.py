"""Batches in an exact, repeatable order: the same for any number of workers, ranks, and after any resume."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from mm.adapters.base import EXTENSION, Processor
from mm.config import ConfigError
from mm.data.background import in_thread, in_workers
from mm.data.batches import Batches, Made
from mm.data.index import Entry
from mm.data.reader import Reader
from mm.data.sources import Access, by_likeness, open_sources
from mm.types import Batch

_MOST_AHEAD = 4  # batches that a worker makes ahead: more only uses memory
_ENOUGH = 200  # samples before the error rate means something


class Loader:
    """Iterate for `mm.types.Batch`; every iteration begins at global batch `start`.

    `spec`: shards, as `mm.data.shards.expand` reads them. `processors`: input name -> processor, whose `source` says
    whether it is given the sample's "image" (decoded once and shared: not to be written), its "text", or the bytes of
    the member with that extension ("depth.png"), without which a sample cannot be used. `batch_size` is global; rank
    `rank` of `world` gets its slice. With `train` the stream is endless and shuffled by (seed, epoch), samples are
    augmented, and captions drawn as `caption` says (`mm.data.captions`). Without, one pass in index order, the last
    batch short (on the last ranks perhaps of no samples). `weights` mixes the parts of `spec` joined by `::` by sample.
    `buckets` groups like samples into batches: "text" by the caption's bytes, "aspect" by the picture's, with `shapes`
    (width, height) to crop to. `workers` 0 prepares in a thread, or, without `ahead`, between two steps: on a CPU a
    thread beside torch's own holds all of them up for longer than it works. `buffer_mb` bounds the batches made ahead
    in all workers, `cache_mb` small pictures kept, `fetch_gb` the disk that fetched shards take; a remote shard that
    brings nothing for `stall_seconds` is tried again, and then lost.

    `samples`: usable samples an epoch. `batches`: batches a pass. `ledger`: everything that could not be used, so far.
    Raises ConfigError where nothing is usable, a value cannot work, more than `max_error_rate` of the samples fail, or
    more than `max_consecutive_errors` in a row.
    """

    def __init__(
        self,
        spec: str,
        processors: Mapping[str, Processor],
        *,
        batch_size: int,
        seed: int = 0,
        train: bool,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        shuffle_block: int = 16384,
        caption: str = "txt",
        weights: str = "",
        buckets: Literal["none", "text", "aspect"] = "none",
        shapes: Sequence[tuple[int, int]] = (),
        max_error_rate: float = 0.05,
        max_consecutive_errors: int = 100,
        buffer_mb: int = 512,
        cache_mb: int = 256,
        fetch_gb: float = 20.0,
        stall_seconds: float = 60.0,
        ahead: bool = True,
    ) -> None:
        _check(processors, batch_size, workers, rank, world, start, max_error_rate)
        access = Access(fetch_gb, stall_seconds)
        sources = open_sources(spec, caption, weights, access)
        self.index, self.captions = sources.index, sources.captions
        self.workers, self.start, self.train, self.ahead = workers, start, train, ahead
        self.max_error_rate, self.max_consecutive_errors = max_error_rate, max_consecutive_errors
        self.buffer_bytes = buffer_mb << 20
        self.samples = len(self.index)
        self.batches = -(-self.samples // batch_size)
        self.ledger: list[Entry] = []
        self._known: set[Entry] = set()
        self._seen = self._bad = self._found = self._in_a_row = 0
        self._note(self.index.ledger)
        if self.index.rejected > max_error_rate * self.index.seen:
            problem = self._too_many(self.index.rejected, self.index.seen, f"shards {spec!r}")
            raise ConfigError(f"{problem}; mm shards stats counts them by reason")
        order = sources.order(seed, shuffle_block) if train else None
        grouped = (
            order if order is None or buckets == "none" else by_likeness(order, self.index, buckets, shapes, batch_size)
        )
        reader = Reader(
            self.index,
            self.captions,
            images=any(processor.source == "image" for processor in processors.values()),
            every=train,
            members=sorted({processor.source for processor in processors.values()} - {"image", "text"}),
            cache_bytes=(cache_mb << 20) // max(workers, 1),  # each worker keeps its own
            store=access.store(self.index),
        )
        self._batches = Batches(
            self.index,
            reader,
            processors,
            order=grouped,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world=world,
            most_bad_in_a_row=max_consecutive_errors,
            shapes=shapes if buckets == "aspect" else (),
            trim=buckets == "text",
        )

    def __iter__(self) -> Iterator[Batch]:
        numbers = range(self.start, sys.maxsize if self.train else self.batches)
        for made in self._made(numbers):
            self._found += self._note(made.ledger)
            self._seen += len(made.bad)
            self._bad += sum(made.bad)
            for bad in made.bad:
                self._in_a_row = self._in_a_row + 1 if bad else 0
            self._judge()
            yield made.batch

    def shards_of(self, n: int) -> dict[str, str]:
        """Shard by key, of this process' samples of batch n as the order has them: without substitutes."""
        return self._batches.shards_of(n)

    def _made(self, numbers: range) -> Iterator[Made]:
        if self.workers:
            return in_workers(self._batches, numbers, self.workers, self._depth())
        return in_thread(self._batches, numbers) if self.ahead else map(self._batches.__getitem__, numbers)

    def _depth(self) -> int:
        """Batches that each worker makes ahead: as many as `buffer_mb` holds, one at least."""
        return min(max(self.buffer_bytes // max(self.workers * self._batches.bytes_of_one(), 1), 1), _MOST_AHEAD)

    def _judge(self) -> None:
        """Stops where the samples found unusable are too many of all, or surely will be: three deviations above."""
        if self._in_a_row > self.max_consecutive_errors:
            raise ConfigError(
                f"data: {self._in_a_row} samples in a row cannot be used, over data.max_consecutive_errors = "
                f"{self.max_consecutive_errors}; {self._last()}"
            )
        if self._found > self.max_error_rate * self.samples:
            raise ConfigError(self._too_many(self._found, self.samples, "data"))
        expected = self.max_error_rate * self._seen
        if self._seen >= _ENOUGH and self._bad > expected + 3 * expected**0.5:
            raise ConfigError(self._too_many(self._bad, self._seen, "data"))

    def _note(self, entries: list[Entry]) -> int:
        """Enters what is not there yet, and counts the samples of it."""
        new = [entry for entry in dict.fromkeys(entries) if entry not in self._known]
        self._known.update(new)
        self.ledger += new
        return sum(1 if entry.key else self._sizes().get(entry.shard, 0) for entry in new)

    def _sizes(self) -> dict[str, int]:
        return dict(zip(self.index.shards, self.index.sizes.tolist(), strict=True))

    def _too_many(self, bad: int, seen: int, where: str) -> str:
        return (
            f"{where}: {bad} of {seen} samples cannot be used, over data.max_error_rate = {self.max_error_rate:g}; "
            f"{self._last()}"
        )

    def _last(self) -> str:
        entry = self.ledger[-1]
        what = f"{entry.key} in {entry.shard}" if entry.key else entry.shard
        return f"the last, {what}: {entry.reason}; mend the shards or raise the limit"


def _check(
    processors: Mapping[str, Processor],
    batch_size: int,
    workers: int,
    rank: int,
    world: int,
    start: int,
    max_error_rate: float,
) -> None:
    for name, processor in processors.items():
        if not EXTENSION.match(processor.source):
            raise ConfigError(
                f"processor {name!r}: source {processor.source!r} must be 'image', 'text' or the extension of a "
                "shard's members in small letters, such as 'depth.png'"
            )
    if batch_size < 1:
        raise ConfigError(f"data.batch_size: {batch_size} must be at least 1")
    if not 0 <= rank < world:
        raise ConfigError(f"rank: {rank} must be from 0 to world - 1 = {world - 1}")
    if batch_size % world:
        near = max(batch_size // world, 1) * world
        raise ConfigError(f"data.batch_size: {batch_size} cannot be divided among {world} processes; use {near}")
    if workers < 0:
        raise ConfigError(f"data.workers: {workers} must not be negative; 0 decodes in a thread")
    if start < 0:
        raise ConfigError(f"start: batch {start} must not be negative")
    if not 0 <= max_error_rate <= 1:
        raise ConfigError(f"data.max_error_rate: {max_error_rate} must be from 0 to 1")
