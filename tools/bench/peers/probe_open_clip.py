"""The data pipeline of open_clip's trainer; its tokenizer is replaced by one that gives the number in the caption."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from open_clip.transform import image_transform
from open_clip_train.data import get_wds_dataset
from open_clip_train.params import parse_args
from probing import Pass, Request, serve, shards_of


def number(text: str) -> torch.Tensor:
    return torch.tensor([int(text.split()[-1])])


def read(request: Request) -> Pass:
    command = ["--train-data", "::".join(map(_braces, request.data)), "--dataset-type", "webdataset"]
    command += f"--model RN50 --seed {request.seed} --batch-size {request.rows} --workers {request.workers}".split()
    command += ["--train-num-samples", str(_count(request.data))]  # a user has to say how many there are
    if request.weights:
        command += ["--dataset-resampled", "--train-data-upsampling-factors", "::".join(map(str, request.weights))]
    args = parse_args(command)
    args.rank, args.world_size, args.distributed = request.rank, request.world, request.world > 1  # its main() does so
    torch.manual_seed(request.seed + request.rank)
    epoch = request.state or 0  # all that its checkpoints hold of the data
    data = get_wds_dataset(args, image_transform(16, is_train=True), is_train=True, epoch=epoch, tokenizer=number)
    data.set_epoch(epoch)

    def batches() -> Iterator[list[int]]:
        for _, numbers in data.dataloader:
            yield numbers.tolist()

    return Pass(batches(), lambda: epoch)


def _braces(folder: str) -> str:
    names = [shard.removeprefix(folder + "/") for shard in shards_of(folder)]
    return (
        f"{folder}/{{{','.join(names)}}}" if len(names) > 1 else f"{folder}/{names[0]}"
    )  # one in braces stays as it is


def _count(folders: list[str]) -> int:
    """As the file `sizes` beside the shards says: what a user wrote down when the shards were whole."""
    total = 0
    for folder in folders:
        with open(f"{folder}/sizes") as file:
            total += int(file.read())
    return total


if __name__ == "__main__":
    serve(read)
