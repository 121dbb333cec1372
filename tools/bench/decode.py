"""Random crops of 224 pixels out of JPEGs of 500×375, one core: ours against plain Pillow, and how near they are."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from _common import alternate, report
from _photographs import photographs
from PIL import Image

from mm.adapters.image import ImageProcessor, random_box
from mm.data.decode import picture

COUNT, SIZE, LEAST = 96, 224, 0.08
ROUNDS = 9
NEAR = 55.0  # dB: below it the two would not have made the same crop


def main() -> None:
    torch.set_num_threads(1)
    files = list(photographs(COUNT))
    processor = ImageProcessor(SIZE, crop_scale=LEAST)

    def ours(number: int) -> np.ndarray:
        rng = np.random.default_rng(number)
        return processor.prepare(picture(files[number]), train=True, rng=rng)["pixels"]

    def pillow(number: int) -> np.ndarray:
        rng = np.random.default_rng(number)
        opened = Image.open(io.BytesIO(files[number])).convert("RGB")
        box = random_box(opened.size, 1.0, LEAST, rng)
        return np.asarray(opened.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))

    def all_of(crop: Callable[[int], np.ndarray]) -> Callable[[], None]:
        def run() -> None:
            for number in range(COUNT):
                crop(number)

        return run

    near = [decibels(ours(number), pillow(number)) for number in range(COUNT)]
    assert min(near) > NEAR, f"a crop is only {min(near):.1f} dB from Pillow's"
    seconds = alternate(all_of(ours), all_of(pillow), ROUNDS)
    mean, peer = ([COUNT / value for value in side] for side in seconds)
    report(
        f"random crops of {SIZE} out of JPEG 500x375, one core, against plain Pillow",
        mean,
        peer,
        unit="crops/s",
        mark=1.3,
        better="higher",
        packages=("mm", "numpy", "pillow", "simplejpeg", "torch"),
        psnr={"least": min(near), "median": float(np.median(near))},
        kilobytes=sum(map(len, files)) / COUNT / 1000,
        microseconds=parts(files),
    )


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays; infinite where they are equal."""
    error = np.square(one.astype(np.float64) - other).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def parts(files: list[bytes]) -> dict[str, float]:
    """Median microseconds of each step of one of our crops."""
    spent: dict[str, list[float]] = {"header": [], "decode": [], "resize": []}
    for number, data in enumerate(files):
        rng = np.random.default_rng(number)
        start = time.perf_counter()
        opened = picture(data)
        headed = time.perf_counter()
        opened.pixels()
        decoded = time.perf_counter()
        opened.crop(random_box(opened.size, 1.0, LEAST, rng), (SIZE, SIZE))
        resized = time.perf_counter()
        for name, duration in zip(spent, (headed - start, decoded - headed, resized - decoded), strict=True):
            spent[name].append(duration * 1e6)
    return {name: median(each) for name, each in spent.items()}


if __name__ == "__main__":
    main()
