"""What processes tell each other before a step: whether to stop, what went wrong, how long each waited."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from mm.config import ConfigError
from mm.data.index import Entry
from mm.data.loader import Loader
from mm.data.order import key_sums
from mm.distributed.world import World
from mm.training.faults import fault
from mm.training.preemption import Interrupted, Stop
from mm.types import Batch

_RANKS = 1 << 20  # a number of milliseconds and the process it belongs to travel as one


class Feed:
    """This process' batches by number, in order; begins anew wherever it is asked for another than the next."""

    def __init__(self, loader: Loader, stop: Stop) -> None:
        self.loader, self.stop = loader, stop
        self.wait = 0.0  # seconds that the last batch took to come
        self.error: Exception | None = None  # why there is none
        self._batches: Iterator[Batch] = iter(())
        self._next = -1

    def take(self, number: int) -> Batch | None:
        """Global batch `number`; None where a signal came, or an error, which is kept for all processes to know."""
        start = time.perf_counter()
        try:
            with self.stop.interrupting():
                if number != self._next:
                    self.loader.start, self._next = number, number
                    self._batches = iter(self.loader)
                fault("data", number + 1)
                batch = next(self._batches)
                self._next += 1
                return batch
        except Interrupted:
            return None
        except (ValueError, OSError, RuntimeError) as error:
            self.error = error
            return None
        finally:
            self.wait = time.perf_counter() - start


@dataclass
class Agreed:
    """What holds for all processes, in the same words."""

    stop: int = 0  # the signal that ends the run before this step; 0: none
    save: bool = False  # the last checkpoint is old enough
    sums: list[int] = field(default_factory=list)  # over the keys of the global batch
    metrics: dict[str, float] = field(default_factory=dict)


class Agreement:
    """Two small reductions a step, on the CPU: of what is decided, and of what is counted."""

    def __init__(self, world: World, minutes: float) -> None:
        self.world, self.seconds = world, minutes * 60
        self.saved = time.monotonic()  # when the last checkpoint was begun
        self.entries: list[Entry] = []  # of all processes' ledgers, each once
        self._known: set[Entry] = set()
        self.failed = False  # one process has no batch, and all of them know
        self._told = 0
        self._waited = 0.0  # in the last agreement: who waits least, all others wait for

    def before(self, feed: Feed, batch: Batch | None, stop: Stop) -> Agreed:
        """Agree on the step for which `feed` gave `batch`. Raises, in all processes, what kept one from its batch."""
        world, ledger = self.world, feed.loader.ledger
        old = self.seconds > 0 and world.main and time.monotonic() - self.saved >= self.seconds
        start = time.perf_counter()
        waits = [_pack(feed.wait, world.rank), _pack(self._waited, world.rank), -_pack(self._waited, world.rank)]
        flags = [stop.signal or 0, feed.error is not None, len(ledger) > self._told, old]
        signal, failed, news, save, *packed = world.most([*map(float, flags), *waits])
        self._waited = time.perf_counter() - start
        if failed:
            self.failed = True
            self._raise(feed.error)
        if news:
            for part in world.gather(ledger[self._told :]):
                self.entries += [entry for entry in dict.fromkeys(part) if entry not in self._known]
                self._known.update(part)
            self._told = len(ledger)
        if signal:
            return Agreed(int(signal))
        assert batch is not None
        sums = world.total(key_sums(batch.keys, world.rank * len(batch.keys)))
        metrics = {"data_wait": _unpack(packed[0])[0], "unusable": float(len(self.entries))}
        if world.size > 1:
            slowest = _unpack(-packed[2])[1]
            metrics |= {"data_wait_rank": _unpack(packed[0])[1], "straggler": slowest}
            metrics["straggler_wait"] = _unpack(packed[1])[0] - _unpack(-packed[2])[0]
        return Agreed(0, bool(save), sums, metrics)

    def _raise(self, error: Exception | None) -> None:
        told = self.world.gather(None if error is None else str(error))
        if error is not None:
            raise error
        rank, text = next((rank, text) for rank, text in enumerate(told) if text is not None)
        raise ConfigError(f"process {rank}: {text}")


def _pack(seconds: float, rank: int) -> float:
    return float(round(seconds * 1000) * _RANKS + rank)


def _unpack(number: float) -> tuple[float, float]:
    milliseconds, rank = divmod(int(number), _RANKS)
    return milliseconds / 1000, float(rank)
