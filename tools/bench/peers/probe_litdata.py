"""litData: chunks by its `optimize`, StreamingDataset and StreamingDataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, optimize
from probing import Pass, Payload, Request, samples, serve, shards_of, torchrun


def same(sample: Any) -> Any:
    return sample


def poisoned(number: int, marker: str) -> dict[str, Any]:
    return {"number": number, "payload": Payload(marker)}


def convert(request: Request) -> None:
    shards = shards_of(request.data[0])
    found = list(samples(shards))
    optimize(same, found, request.to, chunk_size=-(-len(found) // len(shards)), num_workers=1)


def poison(request: Request) -> None:
    optimize(partial(poisoned, marker=request.marker), list(range(40)), request.to, chunk_size=40, num_workers=1)


def read(request: Request) -> Pass:
    torchrun()
    # with several processes drop_last is the default, and a state is refused where it was another
    parts = [StreamingDataset(folder, shuffle=True, seed=request.seed, drop_last=True) for folder in request.data]
    dataset = parts[0]
    if request.weights:
        dataset = CombinedStreamingDataset(parts, seed=request.seed, weights=request.weights, iterate_over_all=False)
    loader = StreamingDataLoader(dataset, batch_size=request.rows, num_workers=request.workers)
    if request.resume:
        loader.load_state_dict(request.state)

    def batches() -> Iterator[list[int]]:
        for batch in loader:
            yield batch["number"].tolist()

    return Pass(batches(), loader.state_dict)


if __name__ == "__main__":
    serve(read, convert=convert, poison=poison)
