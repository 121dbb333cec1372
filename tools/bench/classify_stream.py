"""100,000 pictures classified out of shards: pictures a second, and whether memory grows meanwhile.

The shards are made once, in the user's cache: 256 small generated pictures over and over, each with a key of its own.
Fails where resident memory grows by more than the bound after the first tenth. --images 2000 is a try.
"""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
from _common import arguments, cache_folder, circumstances
from _random_model import random_model
from PIL import Image

from mm.data.pack import ShardWriter

BOUND_MB = 32.0  # 100,000 pictures at the model's size would take ten times as much
DIFFERENT = 256
PER_SHARD = 10_000


def shards(images: int) -> Path:
    folder = cache_folder("bench", f"classify_stream-{images}")
    if not (folder / "shards.json").is_file():
        rng, files = np.random.default_rng(0), []
        for _ in range(DIFFERENT):
            stream = io.BytesIO()
            coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC).save(stream, "JPEG")
            files.append(stream.getvalue())
        with ShardWriter(folder, PER_SHARD) as writer:
            for number in range(images):
                writer.add("val", f"{number:09d}", {"jpg": files[number % DIFFERENT]})
            writer.finish({})
    return folder


def resident_mb() -> float:
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024


def main() -> None:
    args = arguments("pictures out of shards, classified in constant memory", images=100_000, workers=0)
    folder = shards(args.images)
    classify = random_model().classifier("imagenet")
    seen, memory = 0, []
    start = time.perf_counter()
    for _ in classify.stream(str(folder), workers=args.workers, progress=True):
        seen += 1
        if seen % max(1, args.images // 200) == 0:
            memory.append(resident_mb())
    rate = seen / (time.perf_counter() - start)
    warm = memory[: max(1, len(memory) // 10)]
    growth = max(memory) - max(warm)
    print(
        f"{seen:,} images, {len(classify.labels)} labels: {rate:.0f} images/s; resident memory {max(warm):.0f} MB "
        f"after a tenth, at most {growth:.1f} MB more later (bound {BOUND_MB:.0f})"
    )
    if seen != args.images or growth > BOUND_MB:
        raise SystemExit(f"{seen} of {args.images} images, memory grew by {growth:.1f} MB")
    if args.json:
        result = {
            "name": "images classified out of shards",
            "ours": rate,
            "peer": None,
            "ratio": None,
            "unit": "images/s",
            "mark": None,
            "better": "higher",
            "rounds": 1,
            "images": seen,
            "labels": len(classify.labels),
            "workers": args.workers,
            "resident_mb_after_a_tenth": max(warm),
            "growth_mb": growth,
            "bound_mb": BOUND_MB,
            "memory_mb": [round(value, 1) for value in memory[::10]],
            **circumstances(("mm", "torch", "numpy", "pillow")),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
