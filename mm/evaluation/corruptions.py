"""Pictures made worse in fifteen ways and five strengths, after Hendrycks & Dietterich (arXiv 1903.12261).

Fourteen of the paper's fifteen corruptions, with its strengths: frost needs its photographs of frost, and `saturate`,
one of its four extra ones, stands in. The paper's pictures have 224 pixels: what it counts in pixels (radii, movements,
flakes) is scaled by the shorter side / 224, so that a corruption hides as much of what is shown at any size; what it
counts in brightness, shares and JPEG quality stays. Four differ in how they are made:

- `elastic_transform` moves pixels smoothly, and ever further; the paper's first two strengths are mostly a shear and a
  turn, larger than those of the last, so that its strengths have no order;
- `glass_blur` takes each pixel from near by where the paper swaps neighbours, one after the other;
- `fog` adds clouds of ever finer grids where the paper has a diamond-square fractal, with the same decay;
- `saturate` only takes colour away: the paper's first takes some, and its third adds some.

A picture's random numbers come from its key, the corruption and a seed, and begin alike at every severity. With the
paper's numbers the squared error grows with severity but for two steps: snow at 2 and 3 is about as strong, and fog
at 4 is more uneven than at 3, not denser.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm.evaluation import filters
from mm.fields import suggestion

Array = np.ndarray
Function = Callable[..., Array]  # float64 [H, W, 3] in [0, 1], random numbers, what a severity means
SIZE = 224  # pixels that the paper's strengths are for
SEVERITIES = (1, 2, 3, 4, 5)


def _scale(x: Array) -> float:
    return min(x.shape[:2]) / SIZE


def _gaussian_noise(x: Array, rng: np.random.Generator, deviation: float) -> Array:
    return x + deviation * rng.standard_normal(x.shape)


def _shot_noise(x: Array, rng: np.random.Generator, photons: float) -> Array:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Array, rng: np.random.Generator, share: float) -> Array:
    hit, white = rng.random(x.shape) < share, rng.random(x.shape) < 0.5
    return np.where(hit, white, x)


def _defocus_blur(x: Array, rng: np.random.Generator, radius: float) -> Array:
    return filters.blurred(x, filters.disk(radius * _scale(x)))


def _glass_blur(x: Array, rng: np.random.Generator, sigma: float, reach: float, rounds: int) -> Array:
    kernel = filters.gaussian(sigma * _scale(x))
    x = filters.blurred(x, kernel)
    for _ in range(rounds):
        down, right = reach * _scale(x) * rng.uniform(-1, 1, (2, *x.shape[:2]))
        x = filters.moved(x, down, right)
    return filters.blurred(x, kernel)


def _motion_blur(x: Array, rng: np.random.Generator, radius: float, sigma: float) -> Array:
    angle = rng.uniform(-45, 45)
    return filters.blurred(x, filters.motion(radius * _scale(x), sigma * _scale(x), angle))


def _zoom_blur(x: Array, rng: np.random.Generator, most: float, step: float) -> Array:
    factors = np.arange(1, most + step / 2, step)
    return (x + sum(filters.zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(
    x: Array,
    rng: np.random.Generator,
    mean: float,
    deviation: float,
    flake: float,
    least: float,
    radius: float,
    sigma: float,
    kept: float,
) -> Array:
    height, width = x.shape[:2]
    scale, angle = max(_scale(x), 1 / 28), rng.uniform(-135, -45)
    # flakes of less than a pixel are drawn at the paper's size and averaged: cut off at a pixel there would be too many
    flake, radius, sigma = (length * max(scale, 1) for length in (flake, radius, sigma))
    canvas = round(height / min(scale, 1)), round(width / min(scale, 1))
    grid = rng.normal(mean, deviation, (max(1, round(canvas[0] / flake)), max(1, round(canvas[1] / flake))))
    layer = filters.stretched(grid, canvas)
    layer = np.clip(np.where(layer < least, 0, layer), 0, 1)[..., None]
    layer = filters.blurred(layer, filters.motion(radius, sigma, angle))[..., 0]
    small = Image.fromarray(layer.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    layer = np.asarray(small)[..., None]
    grey = x @ (0.299, 0.587, 0.114)
    paler = kept * x + (1 - kept) * np.maximum(x, 1.5 * grey[..., None] + 0.5)
    return paler + layer + layer[::-1, ::-1]


def _fog(x: Array, rng: np.random.Generator, amount: float, decay: float) -> Array:
    whitest = x.max()
    return (x + amount * filters.clouds(x.shape[:2], decay, rng)[..., None]) * whitest / (whitest + amount)


def _brightness(x: Array, rng: np.random.Generator, more: float) -> Array:
    """Value of HSV raised, hue and saturation kept: all three channels by one factor."""
    value = x.max(2, keepdims=True)
    bright = np.minimum(value + more, 1)
    return np.where(value > 0, x * bright / np.maximum(value, 1e-9), bright)


def _contrast(x: Array, rng: np.random.Generator, kept: float) -> Array:
    mean = x.mean((0, 1))
    return mean + kept * (x - mean)


def _saturate(x: Array, rng: np.random.Generator, kept: float) -> Array:
    """Saturation of HSV lowered, hue and value kept."""
    value = x.max(2, keepdims=True)
    return value - kept * (value - x)


def _elastic_transform(x: Array, rng: np.random.Generator, far: float, sigma: float) -> Array:
    down, right = (filters.smooth(x.shape[:2], sigma * _scale(x), rng) for _ in range(2))
    return filters.moved(x, far * _scale(x) * down, far * _scale(x) * right)


def _pixelate(x: Array, rng: np.random.Generator, share: float) -> Array:
    height, width = x.shape[:2]
    small = max(1, int(width * share)), max(1, int(height * share))
    box = Image.Resampling.BOX
    return np.asarray(Image.fromarray(_bytes(x)).resize(small, box).resize((width, height), box)) / 255


def _jpeg_compression(x: Array, rng: np.random.Generator, quality: int) -> Array:
    stream = io.BytesIO()
    Image.fromarray(_bytes(x)).save(stream, "JPEG", quality=quality)
    with Image.open(stream) as picture:
        return np.asarray(picture.convert("RGB")) / 255


# what severities 1 to 5 mean to each: the paper's numbers but for elastic_transform and saturate
CORRUPTIONS: dict[str, tuple[Function, tuple[tuple[Any, ...], ...]]] = {
    "gaussian_noise": (_gaussian_noise, ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))),
    "shot_noise": (_shot_noise, ((60,), (25,), (12,), (5,), (3,))),
    "impulse_noise": (_impulse_noise, ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))),
    "defocus_blur": (_defocus_blur, ((3,), (4,), (6,), (8,), (10,))),
    "glass_blur": (_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (_zoom_blur, ((1.1, 0.01), (1.15, 0.01), (1.2, 0.02), (1.25, 0.02), (1.3, 0.03))),
    "snow": (
        _snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "fog": (_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (_brightness, ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "contrast": (_contrast, ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    "saturate": (_saturate, ((0.7,), (0.5,), (0.3,), (0.15,), (0.0,))),
    "elastic_transform": (_elastic_transform, ((1, 6), (1.5, 6), (2.25, 6), (3.25, 6), (4.5, 6))),
    "pixelate": (_pixelate, ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))),
    "jpeg_compression": (_jpeg_compression, ((25,), (18,), (15,), (10,), (7,))),
}


def corrupt(picture: Array, name: str, severity: int, rng: np.random.Generator) -> Array:
    """The picture, uint8 `[H, W, 3]`, with corruption `name` at severity 1 to 5; the same again for the same `rng`.

    Raises ValueError for an unknown name or severity, and for what is no picture.
    """
    check(name, severity)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"picture: {picture.dtype} of shape {list(picture.shape)}; must be uint8 [H, W, 3]")
    function, strengths = CORRUPTIONS[name]
    return _bytes(function(picture / 255, rng, *strengths[severity - 1]))


def corrupted(pictures: Tensor, keys: Sequence[str], name: str, severity: int, *, seed: int = 0) -> Tensor:
    """uint8 `[B, 3, H, W]`: each picture with a corruption, its random numbers those of its key; see `corrupt`."""
    rows = [
        corrupt(picture.permute(1, 2, 0).numpy(), name, severity, random(key, name, seed))
        for picture, key in zip(pictures, keys, strict=True)
    ]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous() if rows else pictures


def random(key: str, name: str, seed: int) -> np.random.Generator:
    """Random numbers of one sample and corruption: Philox, keyed by a hash of both and the seed."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def check(name: str, severity: int = 1) -> None:
    """Raises ValueError unless there is such a corruption, and such a severity of it."""
    if name not in CORRUPTIONS:
        near = suggestion(str(name), CORRUPTIONS)
        raise ValueError(f"corruption {name!r}: not known{near}; there are {', '.join(CORRUPTIONS)}")
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise ValueError(f"severity = {severity!r}: must be a whole number from 1 to 5")


def _bytes(x: Array) -> Array:
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
