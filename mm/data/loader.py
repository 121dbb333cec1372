"""Batches in an exact, repeatable order: the same for any number of workers, ranks, and after any resume."""

from __future__ import annotations

import atexit
import multiprocessing
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from mm.adapters.base import Processor
from mm.config import ConfigError
from mm.data.batches import Batches, Carried, Failure, Made
from mm.data.index import Entry, ShardIndex, expand
from mm.data.order import Order
from mm.data.reader import read_captions
from mm.types import Batch

_DEPTH = 2  # batches made ahead
_ENOUGH = 200  # samples before the error rate means something


class Loader:
    """Iterate for `mm.types.Batch`; every iteration begins at global batch `start`.

    `spec`: shards, as `mm.data.index.expand` reads them. `processors`: input name -> processor, whose `source` says
    whether it is given the sample's "image" (an RGB PIL image, decoded once and shared: not to be written) or "text".
    `batch_size` is global; rank `rank` of `world` gets its slice. With `train` the stream is endless and shuffled by
    (seed, epoch), samples are augmented, and `caption="aliases"` draws among a sample's names. Without, one pass in
    index order, the last batch short (on the last ranks perhaps of no samples). `workers` 0 prepares in a thread, or,
    without `ahead`, between two steps: on a CPU a thread beside torch's own holds all of them up for longer than it
    works.

    `samples`: usable samples an epoch. `batches`: batches a pass. `ledger`: everything that could not be used, so far.
    Raises ConfigError where nothing is usable, a value cannot work, or more than `max_error_rate` of the samples fail.
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
        shuffle_block: int = 4096,
        caption: Literal["txt", "aliases"] = "txt",
        max_error_rate: float = 0.05,
        cache_bytes: int = 256 << 20,
        ahead: bool = True,
    ) -> None:
        _check(processors, batch_size, workers, rank, world, start, caption, max_error_rate)
        self.index = ShardIndex(expand(spec), spec=spec)
        self.workers, self.start, self.train, self.max_error_rate = workers, start, train, max_error_rate
        self.ahead = ahead
        self.samples = len(self.index)
        self.batches = -(-self.samples // batch_size)
        self.ledger: list[Entry] = []
        self._known: set[Entry] = set()
        self._seen = self._bad = self._found = 0
        self._note(self.index.ledger)
        if self.index.rejected > max_error_rate * self.index.seen:
            raise ConfigError(self._too_many(self.index.rejected, self.index.seen, f"shards {spec!r}"))
        self._batches = Batches(
            self.index,
            processors,
            order=Order(self.index.sizes, seed, shuffle_block) if train else None,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world=world,
            aliases=caption == "aliases",
            cache_bytes=cache_bytes // max(workers, 1),  # each worker keeps its own
        )

    def __iter__(self) -> Iterator[Batch]:
        numbers = range(self.start, sys.maxsize if self.train else self.batches)
        for made in self._made(numbers):
            self._found += self._note(made.ledger)
            self._seen += made.seen
            self._bad += made.bad
            self._judge()
            yield made.batch

    def _made(self, numbers: range) -> Iterator[Made]:
        if self.workers:
            return self._in_workers(numbers)
        return _in_thread(self._batches, numbers) if self.ahead else map(self._batches.__getitem__, numbers)

    def captions(self, *, aliases: bool = False) -> tuple[list[str], list[str]]:
        """Keys and captions of all samples, in index order; with `aliases` each sample's other names follow its own."""
        keys, captions, ledger = read_captions(self.index, aliases=aliases)
        self._note(ledger)
        return keys, captions

    def _in_workers(self, numbers: range) -> Iterator[Made]:
        # a forked copy of a process with threads and CUDA may hang: workers start from a clean, small server process
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mm.data.batches"])
        loader: DataLoader[Made | Failure] = DataLoader(
            Carried(self._batches),
            batch_size=None,  # a worker makes whole batches
            sampler=numbers,
            num_workers=self.workers,
            collate_fn=_same,
            worker_init_fn=_start_worker,
            multiprocessing_context=context,
            prefetch_factor=_DEPTH,
            generator=torch.Generator(),  # else it draws from the global one, and workers would change the run
        )
        for made in loader:
            if isinstance(made, Failure):
                raise made.error from RuntimeError(f"in a data worker:\n{made.trace}")
            yield made

    def _judge(self) -> None:
        """Stops where the samples found unusable are too many of all, or surely will be: three deviations above."""
        if self._found > self.max_error_rate * self.samples:
            raise ConfigError(self._too_many(self._found, self.samples, "data"))
        expected = self.max_error_rate * self._seen
        if self._seen >= _ENOUGH and self._bad > expected + 3 * expected**0.5:
            raise ConfigError(self._too_many(self._bad, self._seen, "data"))

    def _note(self, entries: list[Entry]) -> int:
        """Enters what is not there yet, and counts it."""
        new = [entry for entry in dict.fromkeys(entries) if entry not in self._known]
        self._known.update(new)
        self.ledger += new
        return len(new)

    def _too_many(self, bad: int, seen: int, where: str) -> str:
        entry = self.ledger[-1]
        return (
            f"{where}: {bad} of {seen} samples cannot be used, over data.max_error_rate = {self.max_error_rate:g}; "
            f"the last, {entry.key or 'a member'} in {entry.shard}: {entry.reason}; mend the shards or raise the limit"
        )


def _check(
    processors: Mapping[str, Processor],
    batch_size: int,
    workers: int,
    rank: int,
    world: int,
    start: int,
    caption: str,
    max_error_rate: float,
) -> None:
    for name, processor in processors.items():
        if processor.source not in ("image", "text"):
            raise ConfigError(f"processor {name!r}: source {processor.source!r} must be 'image' or 'text'")
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
    if caption not in ("txt", "aliases"):
        raise ConfigError(f"data.caption: {caption!r} must be 'txt' or 'aliases'")
    if not 0 <= max_error_rate <= 1:
        raise ConfigError(f"data.max_error_rate: {max_error_rate} must be from 0 to 1")


def _in_thread(batches: Batches, numbers: range) -> Iterator[Made]:
    """Batches made ahead in a thread, which ends when this generator is closed; its errors are raised here."""
    made: queue.Queue[Made | BaseException | None] = queue.Queue(_DEPTH)
    stop = threading.Event()

    def put(item: Made | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for number in numbers:
                if stop.is_set():
                    return
                put(batches[number])
            put(None)
        except BaseException as error:  # carried over to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="mm-data", daemon=True)

    def close() -> None:
        stop.set()
        thread.join(timeout=10)

    atexit.register(close)  # a thread inside torch while the interpreter is taken down aborts the process
    thread.start()
    try:
        while True:
            try:
                item = made.get(timeout=5)
            except queue.Empty:
                if not thread.is_alive() and made.empty():
                    raise RuntimeError("the data thread ended without a word") from None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        close()
        atexit.unregister(close)


def _same(made: Any) -> Any:  # a lambda would not pickle
    return made


def _start_worker(number: int) -> None:
    """Ctrl-C and Slurm's warning reach the whole process group; the main process decides, workers go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
