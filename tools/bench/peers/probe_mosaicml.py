"""mosaicml-streaming: MDS shards by its writer, StreamingDataset and StreamingDataLoader."""

from __future__ import annotations

import os
from collections.abc import Iterator

from probing import Pass, Payload, Request, samples, serve, shards_of, torchrun
from streaming import MDSWriter, Stream, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory


def convert(request: Request) -> None:
    shards = shards_of(request.data[0])
    limit = sum(map(os.path.getsize, shards)) * 4 // 5 // len(shards)  # as many shards, or one more
    columns = {"number": "int", "jpg": "bytes", "txt": "str"}
    with MDSWriter(out=request.to, columns=columns, size_limit=limit) as writer:
        for sample in samples(shards):
            writer.write(sample)


def poison(request: Request) -> None:
    with MDSWriter(out=request.to, columns={"number": "int", "payload": "pkl"}) as writer:
        for number in range(40):
            writer.write({"number": number, "payload": Payload(request.marker)})


def read(request: Request) -> Pass:
    if request.world == 1:
        clean_stale_shared_memory()  # a process that was killed leaves some behind
    torchrun()
    common = {"shuffle": True, "shuffle_seed": request.seed, "batch_size": request.rows}
    if request.weights:
        parts = zip(request.data, request.weights, strict=True)
        dataset = StreamingDataset(streams=[Stream(local=part, proportion=weight) for part, weight in parts], **common)
    else:
        dataset = StreamingDataset(local=request.data[0], **common)
    loader = StreamingDataLoader(dataset, batch_size=request.rows, num_workers=request.workers)
    if request.resume:
        loader.load_state_dict(request.state)

    def batches() -> Iterator[list[int]]:
        for batch in loader:
            yield batch["number"].tolist()

    return Pass(batches(), loader.state_dict)


if __name__ == "__main__":
    serve(read, convert=convert, poison=poison)
