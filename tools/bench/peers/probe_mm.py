"""mm's own loader."""

from __future__ import annotations

from collections.abc import Iterator

from probing import Pass, Request, serve

from mm.adapters.image import ImageProcessor
from mm.data.loader import Loader


def read(request: Request) -> Pass:
    start = request.state or 0
    loader = Loader(
        "::".join(request.data),
        {"image": ImageProcessor(16)},
        batch_size=request.batch,
        seed=request.seed,
        train=True,
        workers=request.workers,
        rank=request.rank,
        world=request.world,
        start=start,
        weights="::".join(map(str, request.weights)),
    )
    given = start

    def epoch() -> Iterator[list[int]]:
        nonlocal given
        for (
            batch
        ) in loader:  # endless: the batch at the epoch's end goes on with the next epoch, which is left out here
            position = given * request.batch + request.rank * request.rows
            given += 1
            keys = batch.keys if request.weights else batch.keys[: max(loader.samples - position, 0)]
            yield [int(key) for key in keys]
            if not request.weights and given >= loader.batches:
                return

    return Pass(epoch(), lambda: given, lambda: [" ".join(entry) for entry in loader.ledger])


if __name__ == "__main__":
    serve(read)
