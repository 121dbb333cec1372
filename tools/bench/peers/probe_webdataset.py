"""webdataset's fluid interface as its README has it, with the node splitter that it asks for on several nodes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import webdataset as wds
from probing import Pass, Request, serve, shards_of


def number(sample: dict[str, Any]) -> int:
    return int(sample["__key__"])


def listed(numbers: list[int]) -> list[int]:
    return numbers


def read(request: Request) -> Pass:
    def one(folder: str) -> Any:
        seed = {"seed": request.seed} if "seed" in inspect.signature(wds.WebDataset).parameters else {}  # not in 0.2
        options = {"shardshuffle": 100, "detshuffle": request.seeded, "nodesplitter": wds.split_by_node, **seed}
        dataset = wds.WebDataset(shards_of(folder), **options)
        shuffle = wds.detshuffle(1000, seed=request.seed) if request.seeded else wds.shuffle(1000)
        return dataset.compose(shuffle).decode("pil").map(number)

    if request.weights:
        mixed = wds.RandomMix([one(folder) for folder in request.data], request.weights, longest=True)
        dataset = wds.DataPipeline(mixed, wds.batched(request.rows, collation_fn=listed))
    else:
        dataset = one(request.data[0]).batched(request.rows, collation_fn=listed)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=request.workers)

    def batches() -> Iterator[list[int]]:
        yield from loader

    return Pass(batches())  # its loader has no state to save


if __name__ == "__main__":
    serve(read)
