"""Pictures that cost a decoder what photographs cost it: seeded noise with their spectrum, and captions, in shards."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from _common import cache_folder
from PIL import Image

from mm.data.pack import ShardWriter

WIDTH, HEIGHT, QUALITY = 500, 375, 85
_EXPONENT = 1.4  # amplitude over spatial frequency; with _CONTRAST, files of 45 kB as ImageNet's
_CONTRAST = 50.0  # standard deviation of the brightness, of 255
_COLOUR = 0.25  # of it, in either colour difference
_BASES = 48  # distinct pictures, of which the others are crops, mirrored or not, lighter or darker


def photographs(count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` JPEGs of 500×375 pixels, mean size 40 to 50 kB."""
    rng = np.random.default_rng(seed)
    bases = [_noise(rng, HEIGHT + 105, WIDTH + 140) for _ in range(min(_BASES, count))]
    for number in range(count):
        base = bases[number % len(bases)]
        y, x = rng.integers(base.shape[0] - HEIGHT + 1), rng.integers(base.shape[1] - WIDTH + 1)
        pixels = base[y : y + HEIGHT, x : x + WIDTH] * np.float32(rng.uniform(0.85, 1.15)) + 118
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
        yield file.getvalue()


def captions(count: int, seed: int = 0) -> list[str]:
    """`count` captions of 6 to 17 of CLIP's 5,000 commonest words (Zipf): 13.5 of its tokens with both ends.

    So long are alt texts: Conceptual Captions' have 10.3 words (Sharma et al., ACL 2018, table 2).
    """
    from mm.adapters.text import clip_table

    rng = np.random.default_rng(seed)
    ends = (token.removesuffix("</w>") for token in clip_table().encoder if token.endswith("</w>"))  # by rank
    words = [word for word in ends if len(word) > 1 and word.isascii() and word.isalpha()][:5000]
    frequency = 1 / np.arange(1, len(words) + 1)
    lengths = rng.integers(6, 18, size=count)
    return [" ".join(rng.choice(words, size=length, p=frequency / frequency.sum())) for length in lengths]


def photograph_shards(shards: int = 8, per_shard: int = 512, seed: int = 0) -> list[Path]:
    """Shards of `photographs` with `captions`, made once and kept in the user's cache."""
    pictures = f"{WIDTH}x{HEIGHT}-q{QUALITY}-{_EXPONENT}-{_CONTRAST:g}-{_COLOUR}-{_BASES}"
    settings = f"{shards}x{per_shard}-{pictures}-{seed}-words"
    folder = cache_folder("bench", f"photographs-{settings}")
    paths = [folder / f"train-{number:06d}.tar" for number in range(shards)]
    if not all(path.is_file() for path in paths):
        count = shards * per_shard
        with ShardWriter(folder, per_shard) as writer:
            for number, (data, caption) in enumerate(zip(photographs(count, seed), captions(count, seed), strict=True)):
                writer.add("train", f"{number:06d}", {"jpg": data, "txt": caption.encode()})
            writer.finish({"source": settings})
    return paths


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """RGB float32 [height, width, 3] about 0: amplitude falls with frequency, phases are random."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    planes = np.empty((3, height, width), np.float32)
    for plane, strength in zip(planes, (1.0, _COLOUR, _COLOUR), strict=True):
        phases = np.exp(2j * np.pi * rng.random(frequency.shape))
        values = np.fft.irfft2(frequency**-_EXPONENT * phases, s=(height, width))
        plane[:] = values * (_CONTRAST * strength / values.std())
    y, cb, cr = planes
    return np.stack([y + 1.402 * cr, y - 0.344 * cb - 0.714 * cr, y + 1.772 * cb], axis=-1)  # JPEG's colour space
