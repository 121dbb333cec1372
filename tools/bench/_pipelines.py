"""One image-text pipeline in a process of its own: `python _pipelines.py SIDE SHARDS WARM IMAGES` prints JSON.

SIDE: "ours" or "pillow", normalised in the main process as a device would; "ours-uint8" or "pillow-uint8" without that;
"open_clip", the pipeline of its trainer. All: batches of 64, two workers, random-resized-crop to 224, CLIP's tokens.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BATCH, SIZE, CONTEXT, WORKERS = 64, 224, 77, 2
SCALE = 0.9  # open_clip's default: crops of 0.9 to 1.0 of the area
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Pairs = Iterator[tuple[Tensor, Tensor]]  # images [64, 3, 224, 224], tokens [64, 77]


def ours(shards: str) -> Pairs:
    from mm.adapters.image import ImageProcessor
    from mm.adapters.text import ClipTokenizer, TextProcessor
    from mm.data.loader import Loader

    processors = {"image": ImageProcessor(SIZE, crop_scale=SCALE), "text": TextProcessor(ClipTokenizer(), CONTEXT)}
    for batch in Loader(shards, processors, batch_size=BATCH, train=True, workers=WORKERS):
        yield batch.inputs["image"], batch.inputs["text"]


def open_clip(shards: str) -> Pairs:
    from open_clip import get_tokenizer
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.params import parse_args

    command = f"--train-num-samples 1000000 --dataset-type webdataset --batch-size {BATCH} --workers {WORKERS}"
    args = parse_args(["--train-data", shards, "--model", "ViT-B-32", *command.split()])
    args.rank, args.world_size, args.distributed = 0, 1, False  # its main() sets them
    transform = image_transform(SIZE, is_train=True, mean=MEAN, std=STD)
    yield from get_wds_dataset(args, transform, is_train=True, tokenizer=get_tokenizer("ViT-B-32")).dataloader


class _Plain(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The obvious way: members at known offsets, Pillow, torchvision's crop, one sample at a time."""

    def __init__(self, shards: str) -> None:
        from open_clip import get_tokenizer
        from torchvision.transforms import InterpolationMode, RandomResizedCrop
        from webdataset.shardlists import expand_urls

        self.crop = RandomResizedCrop(SIZE, scale=(SCALE, 1.0), interpolation=InterpolationMode.BICUBIC)
        self.tokenize = get_tokenizer("ViT-B-32")
        self.files: dict[str, int] = {}
        self.samples: list[dict[str, tuple[str, int, int]]] = []
        for shard in expand_urls(shards):
            with tarfile.open(shard) as tar:
                parts = [(member.name[-3:], (shard, member.offset_data, member.size)) for member in tar]
            self.samples += [dict(pair) for pair in zip(parts[::2], parts[1::2], strict=True)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        import numpy as np
        from PIL import Image

        sample = self.samples[number]
        picture = self.crop(Image.open(io.BytesIO(self._bytes(*sample["jpg"]))).convert("RGB"))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return pixels, self.tokenize(self._bytes(*sample["txt"]).decode())[0]

    def _bytes(self, shard: str, offset: int, size: int) -> bytes:
        if shard not in self.files:
            self.files[shard] = os.open(shard, os.O_RDONLY)
        return os.pread(self.files[shard], size, offset)


def pillow(shards: str) -> Pairs:
    dataset = _Plain(shards)
    while True:
        yield from torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True)


def normalised(pairs: Pairs) -> Pairs:
    """What an encoder does to uint8 on its device, here on the CPU, so that all sides end with the same tensors."""
    mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    for images, tokens in pairs:
        yield images.float().sub_(mean).div_(std), tokens  # in place: on a CPU new memory costs more than arithmetic


SIDES = {
    "ours": lambda shards: normalised(ours(shards)),
    "ours-uint8": ours,
    "pillow": lambda shards: normalised(pillow(shards)),
    "pillow-uint8": pillow,
    "open_clip": open_clip,
}


def main(side: str, shards: str, warm: int, images: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    torch.set_num_threads(1)  # the workers have both cores: a pool of threads beside them waits for itself
    first, last = warm // BATCH, (warm + images) // BATCH
    pairs = SIDES[side](shards)
    next(itertools.islice(pairs, first - 1, None))
    start = time.perf_counter()
    pixels, tokens = next(itertools.islice(pairs, last - first - 1, None))
    seconds = time.perf_counter() - start
    print(json.dumps({"images": BATCH * (last - first), "seconds": seconds, **facts(pixels, tokens)}))


def facts(pixels: Tensor, tokens: Tensor) -> dict[str, Any]:
    """What both sides must agree on."""
    values = pixels.float()
    return {
        "shape": list(pixels.shape),
        "tokens": list(tokens.shape),
        "type": str(pixels.dtype),
        "range": [values.min().item(), values.max().item()],
        "mean": values.mean().item(),
        "std": values.std().item(),
        "words": (tokens != 0).sum(1).float().mean().item(),
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
