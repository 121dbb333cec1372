"""How well a block-wise order mixes, against webdataset's shuffle buffer over shuffled shards: both at their defaults,
the buffer's being that of open_clip's trainer, and both at either size.

A sample's way from its place in the index says little: shuffling shards alone makes it that of a uniform permutation.
So the ratio is of the way from its place in the order of reading, the shards joined: what blocks or buffer add.
A buffer's samples wait in memory, with a long tail; a block's are read at their offsets when they are due, from the few
shards that it touches. Lengths are in those of a uniform permutation of the epoch (mean N/3, median (1 - √½)N).
"""

from __future__ import annotations

from statistics import fmean

import numpy as np
import webdataset as wds
from _common import report
from numpy.typing import NDArray

from mm.config import DataConfig
from mm.data.order import Order

SHARDS, SHARD, BATCH = 100, 1000, 256
N = SHARDS * SHARD
BUFFER, BLOCK, ROUNDS = 5000, DataConfig().shuffle_block, 7
SIZES = (BUFFER, BLOCK)


def ours(block: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples as they come, and as they are read: in blocks of one they come as they are read."""
    return Order([SHARD] * SHARDS, seed, block).span(0, N)[1], Order([SHARD] * SHARDS, seed, 1).span(0, N)[1]


def peer(buffer: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same of webdataset's own parts."""
    shards = wds.SimpleShardList([str(shard) for shard in range(SHARDS)], seed=seed)
    joined = [int(shard["url"]) * SHARD + place for shard in shards for place in range(SHARD)]
    return np.array(list(wds.shuffle(buffer, initial=buffer, seed=seed)(iter(joined)))), np.array(joined)


def quality(order: NDArray[np.int64], joined: NDArray[np.int64], size: int) -> dict[str, float]:
    assert np.array_equal(np.sort(order), np.arange(N)), "an epoch is not every sample once"
    came, read = np.argsort(order), np.argsort(joined)  # places, by sample
    from_index, from_read = np.abs(came - np.arange(N)), np.abs(came - read)
    shards = order // SHARD
    return {
        "mean_way": float(from_read.mean()) / (N / 3),
        "median_way": float(np.median(from_read)) / (N * (1 - 0.5**0.5)),
        "mean_way_from_index": float(from_index.mean()) / (N / 3),
        "median_way_from_index": float(np.median(from_index)) / (N * (1 - 0.5**0.5)),
        "shards_in_a_batch": fmean(len(set(shards[start : start + BATCH])) for start in range(0, N - BATCH + 1, BATCH)),
        "shards_in_a_run": fmean(len(set(shards[start : start + size])) for start in range(0, N - size + 1, size)),
    }


def main() -> None:
    found: dict[int, dict[str, list[dict[str, float]]]] = {}
    for size in SIZES:
        found[size] = {
            side.__name__: [quality(*side(size, seed), size) for seed in range(ROUNDS)] for side in (ours, peer)
        }
    means = {
        str(size): {
            side: {name: fmean(one[name] for one in rounds) for name in rounds[0]} for side, rounds in sides.items()
        }
        for size, sides in found.items()
    }
    for size, sides in means.items():
        for name in sides["ours"]:
            print(f"{size:>6} {name:<22} {sides['ours'][name]:8.4f} against {sides['peer'][name]:8.4f}")
    report(
        f"way of a sample from where it is read, {SHARDS} shards of {SHARD}, blocks of {BLOCK}, buffer of {BUFFER}",
        [one["mean_way"] for one in found[BLOCK]["ours"]],
        [one["mean_way"] for one in found[BUFFER]["peer"]],
        unit="of a uniform permutation's",
        mark=1.0,
        better="higher",
        packages=("mm", "numpy", "webdataset"),
        sizes=means,
    )


if __name__ == "__main__":
    main()
