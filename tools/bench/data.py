"""Images a second from JPEG shards to batches ready for a model: ours, open_clip's trainer, and plain Pillow.

JPEGs of 500×375 and 45 kB, random-resized-crop to 224, CLIP's tokens; two workers on two cores, shards in page cache.
All sides end with normalised float32 `[64, 3, 224, 224]`: open_clip's workers do that, for the others the main process,
where a device would (`-uint8`: their rates without it). Every round starts each side in a fresh process; with
`--quick 1` only ours and open_clip's, after one round with Pillow's, which the outputs are held against.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from _common import OPEN_CLIP, ROOT, arguments, peer_python, report
from _photographs import HEIGHT, WIDTH, captions, photograph_shards
from _pipelines import CONTEXT, SCALE, SIDES, SIZE
from PIL import Image

SHARDS, PER_SHARD = 8, 512
_DEADLINE = 300  # seconds for one side of one round


def main() -> None:
    args = arguments(__doc__.splitlines()[0], rounds=5, images=2048, warm=512, quick=0)
    if args.quick:
        args.images, args.warm = 1024, 256
    shards = photograph_shards(SHARDS, PER_SHARD)
    pattern = str(shards[0]).replace("000000.tar", f"{{000000..{len(shards) - 1:06d}}}.tar")
    interpreters = dict.fromkeys(SIDES, sys.executable) | {"open_clip": peer_python(*OPEN_CLIP)}
    _check_tokens()
    sides = ["ours", "open_clip", "pillow"] if args.quick else list(SIDES)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    facts: dict[str, dict[str, Any]] = {}
    for number in range(args.rounds):
        for shard in shards:
            shard.read_bytes()  # into the page cache
        turn = number % len(sides)
        for side in sides[turn:] + sides[:turn]:  # each is first in turn
            facts[side] = _run(interpreters[side], side, pattern, args.warm, args.images)
            rates[side].append(facts[side]["images"] / facts[side]["seconds"])
        if not number:
            _check(facts)
            sides = sides[:2] if args.quick else sides
        print(f"round {number + 1}: {', '.join(f'{side} {rates[side][-1]:.0f}' for side in sides)} images/s")
    rate = {side: round(median(values), 1) for side, values in rates.items()}
    report(
        "JPEG shards to normalised batches of 224 px, two workers, against open_clip",
        rates["ours"],
        rates["open_clip"],
        unit="images/s",
        mark=1.7,
        better="higher",
        packages=("mm", "open_clip_torch", "torch", "torchvision", "pillow"),
        args=args,
        what="JPEG shards to normalised batches, 224 px",
        against="open_clip_train's webdataset pipeline, two workers",
        images_a_round=facts["ours"]["images"],
        bytes_a_sample=round(sum(shard.stat().st_size for shard in shards) / (SHARDS * PER_SHARD)),
        rates=rate,
        spreads={side: [round(min(values), 1), round(max(values), 1)] for side, values in rates.items()},
        against_pillow={"ratio": rate["ours"] / rate["pillow"], "mark": 1.3},
        without_normalising=None if args.quick else {"ratio to pillow": rate["ours-uint8"] / rate["pillow-uint8"]},
        crop_area=_crop_areas(),
        facts=facts,
        open_clip_runs_on=list(OPEN_CLIP[1:]),
    )


def _run(interpreter: str, side: str, pattern: str, warm: int, images: int) -> dict[str, Any]:
    command = [interpreter, str(Path(__file__).with_name("_pipelines.py")), side, pattern, str(warm), str(images)]
    environment = {**os.environ, **({} if side == "open_clip" else {"PYTHONPATH": ROOT})}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=_DEADLINE)
    if result.returncode:
        raise RuntimeError(f"{side} failed: {result.stderr.strip()[-1000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def _check(facts: dict[str, dict[str, Any]]) -> None:
    """Same number of images, same shapes, same type, like values."""
    ours, peer = facts["ours"], facts["open_clip"]
    for side in ("open_clip", "pillow"):
        for name in ("images", "shape", "tokens", "type"):
            assert ours[name] == facts[side][name], f"{name}: {ours[name]} of ours, {facts[side][name]} of {side}"
        for name in ("mean", "std"):
            assert abs(ours[name] - facts[side][name]) < 0.2, f"{name}: {ours[name]:.3f} and {facts[side][name]:.3f}"
    assert np.allclose(ours["range"], peer["range"], atol=0.1), f"range: {ours['range']} and {peer['range']}"


def _check_tokens() -> None:
    """The same caption gives the same 77 tokens."""
    from open_clip import get_tokenizer

    from mm.adapters.text import ClipTokenizer, TextProcessor

    texts, processor = captions(64), TextProcessor(ClipTokenizer(), CONTEXT)
    ids, _ = processor.collate([processor.prepare(text, train=True) for text in texts])
    assert ids.equal(get_tokenizer("ViT-B-32")(texts)), "the two sides' tokens differ"


def _crop_areas(draws: int = 300) -> dict[str, float]:
    """Mean area of a random crop, of the picture's: read from crops of a picture whose colours are its coordinates."""
    from open_clip.transform import image_transform

    from mm.adapters.image import ImageProcessor

    x, y = np.meshgrid(np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT))
    picture = Image.fromarray(np.stack([x, y, x], axis=-1).astype(np.uint8))
    processor, rng = ImageProcessor(SIZE, crop_scale=SCALE), np.random.default_rng(0)
    transform = image_transform(SIZE, is_train=True, mean=(0, 0, 0), std=(1, 1, 1))
    sides = {
        "ours": lambda: np.moveaxis(processor.prepare(picture, train=True, rng=rng)["pixels"] / 255.0, -1, 0),
        "open_clip": lambda: transform(picture).numpy(),
    }

    def area(crop: np.ndarray) -> float:  # [3, size, size] in 0 .. 1
        return float(np.ptp(crop[0]) * np.ptp(crop[1]))

    return {side: round(mean(area(draw()) for _ in range(draws)), 3) for side, draw in sides.items()}


if __name__ == "__main__":
    main()
