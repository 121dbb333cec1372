"""Which sample comes when: pure functions of (seed, epoch, position), equal on every machine and numpy version.

Position p of the endless stream belongs to epoch p // N; each epoch holds every sample exactly once. Global batch n is
positions nB ... (n+1)B, so that a batch may straddle two epochs and none is short.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """63 random bits that belong to this sample in this epoch of this run."""
    digest = hashlib.blake2b(f"{seed}\0{epoch}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def order_hash(previous: str, keys: Iterable[str]) -> str:
    """16 hex digits over `previous` and one global batch's keys: equal for two runs that saw the same data in order."""
    return hashlib.blake2b(f"{previous}\n{chr(0).join(keys)}".encode(), digest_size=8).hexdigest()


class Order:
    """Shards in random order, joined, then shuffled within blocks of `block` samples: random, yet reads stay close.

    `sizes`: samples a shard. Raises ValueError where there is no sample or `block` is not positive.
    """

    def __init__(self, sizes: Sequence[int], seed: int, block: int) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        self.seed, self.block = seed, block
        if not self.samples:
            raise ValueError("order: no samples; name shards that hold some")
        if block < 1:
            raise ValueError(f"data.shuffle_block: {block} must be at least 1 (1 keeps the order within a shard)")
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Sample indices of one epoch, `[N]`, read-only."""
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:  # this one and the next are in use at an epoch's end
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = self._permutation(epoch)
        return self._epochs[epoch]

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample index) at one position of the stream."""
        epoch, place = divmod(position, self.samples)
        return epoch, int(self.epoch(epoch)[place])

    def span(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and sample indices, both `[stop - start]`, of consecutive positions."""
        epochs, places = np.divmod(np.arange(start, stop, dtype=np.int64), self.samples)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self.epoch(int(epoch))[places[here]]
        return epochs, indices

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        # raw Philox bits and sorting: numpy promises that stream for ever, but not that of Generator.permutation
        digest = hashlib.blake2b(f"{self.seed}\0{epoch}\0order".encode(), digest_size=16).digest()
        bits = np.random.Philox(key=int.from_bytes(digest, "big"))
        shards = np.argsort(bits.random_raw(len(self.sizes)), kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        joined = np.concatenate([np.arange(starts[s], starts[s] + self.sizes[s], dtype=np.int64) for s in shards])
        blocks = np.arange(self.samples) // self.block
        shuffled = joined[np.lexsort((bits.random_raw(self.samples), blocks))]
        shuffled.flags.writeable = False
        return shuffled
