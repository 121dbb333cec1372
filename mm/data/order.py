"""Which sample comes when: pure functions of (seed, epoch, position), equal on every machine and numpy version.

Position p of the endless stream belongs to epoch p // N; each epoch holds every sample exactly once. Global batch n is
positions nB ... (n+1)B, so that a batch may straddle two epochs and none is short. No order holds a list of all
samples: at any position it is made from the shards of one epoch and the samples of one block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mm.config import ConfigError

_PAGE = 1024  # samples made at once where blocks are smaller


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """63 random bits that belong to this sample in this epoch of this run."""
    digest = hashlib.blake2b(f"{seed}\0{epoch}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def order_hash(previous: str, keys: Iterable[str]) -> str:
    """16 hex digits over `previous` and one global batch's keys: equal for two runs that saw the same data in order."""
    return chain(previous, key_sums(keys))


def key_sums(keys: Iterable[str], start: int = 0) -> list[int]:
    """Four numbers over keys and their places in the global batch, of which these begin at `start`.

    Those of a batch's slices add up to those of the whole batch, so processes need not show each other their keys.
    """
    total = np.zeros(4, dtype=np.int64)
    for place, key in enumerate(keys, start):
        digest = hashlib.blake2b(f"{place}\0{key}".encode(), digest_size=16).digest()
        total += np.frombuffer(digest, dtype="<u4")
    return [int(number) for number in total]


def chain(previous: str, sums: Iterable[int]) -> str:
    """The running hash, 16 hex digits, after a global batch of these sums."""
    text = " ".join(str(number & 0xFFFFFFFF) for number in sums)
    return hashlib.blake2b(f"{previous}\n{text}".encode(), digest_size=8).hexdigest()


def draws(seed: int, number: int, use: str, start: int, stop: int) -> NDArray[np.uint64]:
    """Draws `start` ... `stop` of the random stream that belongs to (seed, number, use), `[stop - start]`.

    Made at any place without those before it. To be sorted by: numpy promises raw Philox bits for ever, but not the
    stream of Generator.permutation.
    """
    digest = hashlib.blake2b(f"{seed}\0{number}\0{use}".encode(), digest_size=16).digest()
    count, skip = divmod(start, 4)  # Philox makes four draws a count
    return np.random.Philox(key=int.from_bytes(digest, "big"), counter=count).random_raw(skip + stop - start)[skip:]


class Order:
    """Shards in random order, joined, then shuffled within blocks of `block` samples: random, yet reads stay close.

    `sizes`: samples a shard, some perhaps 0. `samples`: N, an epoch's. Any position costs time and memory in the order
    of shards + block. Raises ConfigError where there is no sample or `block` is not positive.
    """

    def __init__(self, sizes: Sequence[int] | NDArray[np.int64], seed: int, block: int) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        self.seed, self.block = seed, block
        if not self.samples:
            raise ConfigError("order: no samples; name shards that hold some")
        if block < 1:
            raise ConfigError(f"data.shuffle_block: {block} must be at least 1 (1 keeps the order within a shard)")
        self._page_size = block * max(_PAGE // block, 1)  # whole blocks
        # this epoch and the next are in use at an epoch's end, and so are two pages here and two where one reads ahead
        self._shards = lru_cache(maxsize=2)(self._make_shards)
        self._page = lru_cache(maxsize=4)(self._make_page)

    def __reduce__(self) -> tuple[type[Order], tuple[NDArray[np.int64], int, int]]:
        return Order, (self.sizes, self.seed, self.block)  # without what is kept

    def span(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and sample numbers, both `[stop - start]`, of positions `start` ... `stop`."""
        parts = [np.empty(0, dtype=np.int64)]
        position = start
        while position < stop:
            epoch, place = divmod(position, self.samples)
            page, offset = divmod(place, self._page_size)
            parts.append(self._page(epoch, page)[offset : offset + stop - position])
            position += len(parts[-1])
        return np.arange(start, stop, dtype=np.int64) // self.samples, np.concatenate(parts)

    def _make_shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each shard of an epoch ends when they are joined, and sample number less place in it, both `[S]`."""
        shards = np.argsort(draws(self.seed, epoch, "order", 0, len(self.sizes)), kind="stable")
        ends = np.cumsum(self.sizes[shards])
        return ends, np.cumsum(self.sizes)[shards] - ends

    def _make_page(self, epoch: int, page: int) -> NDArray[np.int64]:
        """Sample numbers of one page of an epoch: one block or several small ones, the last of an epoch perhaps short.

        The epoch's stream goes on behind the shards with one draw a sample.
        """
        start = page * self._page_size
        stop = min(start + self._page_size, self.samples)
        ends, shifts = self._shards(epoch)
        places = np.arange(start, stop, dtype=np.int64)
        joined = places + shifts[np.searchsorted(ends, places, side="right")]
        keys = draws(self.seed, epoch, "order", len(self.sizes) + start, len(self.sizes) + stop)
        return joined[np.lexsort((keys, places // self.block))]
