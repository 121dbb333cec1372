"""The promise in full, with real workers: any ranks, any workers, stopped anywhere, the same samples in one order."""

from __future__ import annotations

import io
import itertools
import random
import tarfile
from pathlib import Path

import pytest

from mm.adapters.text import TextProcessor
from mm.data.loader import Loader
from mm.data.order import Order

pytestmark = pytest.mark.timeout(120)


class Length:
    """A tokenizer that costs nothing."""

    vocab_size = 100

    def encode(self, text: str) -> list[int]:
        return [len(text)]

    def decode(self, ids: object) -> str:
        return ""

    def to_json(self) -> str:
        return ""


def write(folder: Path, sizes: list[int]) -> list[str]:
    """Shards of these sizes; the keys in order."""
    keys = []
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for number in range(size):
                keys.append(f"{shard:04d}-{number:04d}")
                for extension, data in (("png", b"never decoded"), ("txt", b"text")):
                    info = tarfile.TarInfo(f"{keys[-1]}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return keys


@pytest.mark.parametrize("case", [*range(6), *(pytest.param(case, marks=pytest.mark.slow) for case in range(6, 60))])
def test_any_ranks_and_workers_stopped_anywhere_give_the_same_global_batches(tmp_path: Path, case: int) -> None:
    rng = random.Random(case)
    sizes = [rng.choice([1, rng.randint(1, 30), rng.randint(1, 1000)]) for _ in range(rng.randint(1, 6))]
    keys = write(tmp_path, sizes)
    world, block, seed = rng.randint(1, 8), rng.choice([1, 7, 100, 16384]), rng.randint(0, 99)
    batch_size = world * rng.randint(1, 40)
    epoch = -(-len(keys) // batch_size)
    count = min(epoch + 2, 40)
    order = Order(sizes, seed, block)
    wanted = [keys[number] for number in order.span(0, count * batch_size)[1]]
    assert sorted(wanted[: len(keys)]) == sorted(keys)[: len(wanted)] or len(wanted) < len(keys)

    stops = sorted({0, *(rng.randrange(count) for _ in range(2)), count})
    found: list[str] = []
    for start, stop in itertools.pairwise(stops):  # each part with other ranks and workers
        workers = rng.randint(0, 4) if case % 2 else 0
        ranks = [
            Loader(
                str(tmp_path),
                {"text": TextProcessor(Length(), 4)},
                batch_size=batch_size,
                seed=seed,
                train=True,
                workers=workers if rank == 0 else 0,
                rank=rank,
                world=world,
                start=start,
                shuffle_block=block,
                ahead=False,
            )
            for rank in range(world)
        ]
        parts = [[batch.keys for batch, _ in zip(rank, range(stop - start), strict=False)] for rank in ranks]
        assert {len(keys_of) for part in parts for keys_of in part} == {batch_size // world}  # equal for all
        found += [key for step in zip(*parts, strict=True) for keys_of in step for key in keys_of]
        world = rng.choice([w for w in range(1, 9) if batch_size % w == 0])
    assert found == wanted
