"""Several sources in one endless stream, by weight: a pure function of (seed, position), as an `Order` is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm.config import ConfigError
from mm.data.order import Order, draws, sample_seed

CHUNK = 8192  # positions within which the sources' shares are exact; changing it changes every mixture's order


class Mixture:
    """Samples of several sources: each chunk of `CHUNK` positions holds `quotas[s]` samples of source s, shuffled.

    Source s brings its samples in an `Order` of its own, whose epochs do not depend on the other sources: it is passed
    over exactly once in each, and `span` tells its own epoch. `sources`: samples a shard, for each source. `weights`:
    positive, of any scale; a source's share of the samples drawn. `samples`: those of all sources. Sample numbers of
    source s begin at `offsets[s]`, behind those of source s - 1. Raises ConfigError where a weight cannot work or a
    source holds nothing.
    """

    def __init__(
        self, sources: Sequence[Sequence[int] | NDArray[np.int64]], weights: Sequence[float], seed: int, block: int
    ) -> None:
        self.weights, self.seed, self.block = list(weights), seed, block
        self.quotas = _quotas(self.weights, len(sources))
        for source, sizes in enumerate(sources):
            if not np.sum(sizes):
                raise ConfigError(f"data.weights: source {source} of {len(sources)} holds no samples; leave it out")
        self.orders = [Order(sizes, sample_seed(seed, s, "mixture"), block) for s, sizes in enumerate(sources)]
        self.offsets = np.cumsum([0, *(order.samples for order in self.orders)])
        self.samples = int(self.offsets[-1])
        self._chunk = lru_cache(maxsize=4)(self._make_chunk)

    def __reduce__(self) -> tuple[type[Mixture], tuple[Any, ...]]:
        return Mixture, ([order.sizes for order in self.orders], self.weights, self.seed, self.block)

    def span(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs (each of the sample's own source) and sample numbers, both `[stop - start]`, of these positions."""
        parts = [np.empty((2, 0), dtype=np.int64)]
        position = start
        while position < stop:
            chunk, offset = divmod(position, CHUNK)
            parts.append(self._chunk(chunk)[:, offset : offset + stop - position])
            position += parts[-1].shape[1]
        epochs, numbers = np.concatenate(parts, axis=1)
        return epochs, numbers

    def _make_chunk(self, chunk: int) -> NDArray[np.int64]:
        """Epochs and sample numbers of one chunk, `[2, CHUNK]`."""
        shuffled = np.argsort(draws(self.seed, chunk, "mixture", 0, CHUNK), kind="stable")
        places = np.split(shuffled, np.cumsum(self.quotas)[:-1])
        made = np.empty((2, CHUNK), dtype=np.int64)
        for source, (order, quota) in enumerate(zip(self.orders, self.quotas, strict=True)):
            epochs, numbers = order.span(chunk * quota, (chunk + 1) * quota)
            made[:, np.sort(places[source])] = epochs, numbers + self.offsets[source]  # sorted: its own order is kept
        return made


def _quotas(weights: Sequence[float], sources: int) -> list[int]:
    """Samples of each source in a chunk: the largest remainders of weight · CHUNK, each at least 1, `CHUNK` in all."""
    if len(weights) != sources:
        raise ConfigError(f"data.weights: {len(weights)} weights for {sources} sources; give one for each")
    if not 0 < sources <= CHUNK:
        raise ConfigError(f"data.weights: {sources} sources; mix 1 to {CHUNK}")
    for source, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"data.weights: {weight} of source {source} must be positive; leave out what is not used")
    exact = [Fraction(weight) for weight in weights]
    exact = [weight * CHUNK / sum(exact) for weight in exact]
    quotas = [max(math.floor(share), 1) for share in exact]
    step = 1 if sum(quotas) < CHUNK else -1  # below where shares are cut off, above where many are lifted to 1
    while sum(quotas) != CHUNK:
        movable = [source for source in range(sources) if quotas[source] + step >= 1]
        quotas[max(movable, key=lambda source: step * (exact[source] - quotas[source]))] += step
    return quotas
