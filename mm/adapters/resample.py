"""Parts of pictures at other sizes. The one resampling of training, evaluation and inference; imports torch late."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]


class Croppable(Protocol):
    """A picture that gives parts of itself, so that it need not decode more than they take."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""

    def crop(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Fresh uint8 `[h, w, 3]`: `box` (left, top, right, bottom) at `size` (width, height)."""


class Opened:
    """A PIL image as `Croppable`."""

    def __init__(self, picture: Image.Image):
        self.picture, self.size = picture, picture.size

    def crop(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        part = rgb(self.picture.crop(snap(box, self.size)))  # first the part: less to convert
        return resize(np.array(part), (0, 0, *part.size), size)


def resize(pixels: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Fresh contiguous uint8 `[h, w, 3]`: `box` (left, top, right, bottom) of `pixels` `[H, W, 3]` at `size` (w, h).

    Where the box is a whole multiple of `size`, each pixel is the mean of those it covers, rounded; otherwise bicubic
    with antialiasing, nothing taken from outside the box: what Pillow makes of the cut-out part, within one level where
    it shrinks. In whole numbers, so that it is the same with any number of threads.
    """
    import torch  # here: whoever only lists and checks pictures need not wait for it

    left, top, right, bottom = box
    part = pixels[top:bottom, left:right]
    (width, height), (w, h) = (right - left, bottom - top), size
    if (width, height) == size:
        return part.copy()
    if width % w == 0 and height % h == 0:
        across, down = width // w, height // h
        total = part[::down].astype(np.uint32)
        for row in range(1, down):  # whole rows at a time: a tenth of the time of one sum over a view
            total += part[row::down]
        total = np.einsum("hwac->hwc", total.reshape(h, w, across, 3))
        return ((total + across * down // 2) // (across * down)).astype(np.uint8)
    part = np.require(part, requirements=["C", "W"])  # torch warns of arrays that it could not write to
    image = torch.from_numpy(part).permute(2, 0, 1)[None]
    image = torch.nn.functional.interpolate(image, size=(h, w), mode="bicubic", antialias=True)
    return np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Fit:
    """A whole picture at size x size, by Pillow, as open_clip's evaluation transforms do it (of RGB: to the bit).

    shortest: its shorter side at `size`, then the centre; squash: both sides at `size`; longest: its longer side at
    `size`, padded to a square with level `fill`.
    """

    mode: Literal["shortest", "squash", "longest"]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fill: int = 0

    def __call__(self, picture: Croppable, size: int) -> np.ndarray:
        """Fresh uint8 `[size, size, 3]`."""
        width, height = picture.size
        image = Image.fromarray(picture.crop((0, 0, width, height), (width, height)))
        how = Image.Resampling.BICUBIC if self.interpolation == "bicubic" else Image.Resampling.BILINEAR
        if self.mode == "squash":
            wanted = (size, size)
        elif self.mode == "shortest":
            short = min(width, height)
            wanted = (size if width <= height else int(size * width / short), 0)
            wanted = (wanted[0], size if height <= width else int(size * height / short))
        else:
            ratio = max(height / size, width / size)
            wanted = (max(1, round(width / ratio)), max(1, round(height / ratio)))  # open_clip has an error for 0
        if wanted != (width, height):
            image = image.resize(wanted, how)
        left, top = _middle(wanted[0], size), _middle(wanted[1], size)
        ground = Image.new("RGB", (size, size), (self.fill,) * 3)
        ground.paste(image, (-left, -top))
        return np.array(ground)


def _middle(length: int, size: int) -> int:
    """Where the middle `size` of `length` begins; below 0 where there is too little, as torchvision pads."""
    return round((length - size) / 2) if length >= size else -((size - length) // 2)


def snap(box: Box, size: tuple[int, int], scale: int = 1) -> tuple[int, int, int, int]:
    """`box` on the pixel grid of a picture of `size` (width, height) that was reduced by `scale`: inside, not empty."""
    left, right = _span(box[0], box[2], size[0], scale)
    top, bottom = _span(box[1], box[3], size[1], scale)
    return left, top, right, bottom


def _span(low: float, high: float, limit: int, scale: int) -> tuple[int, int]:
    start = min(max(int(low / scale + 0.5), 0), limit - 1)  # half up: both ends of a whole multiple move alike
    return start, min(max(int(high / scale + 0.5), start + 1), limit)


def rgb(picture: Image.Image) -> Image.Image:
    """`picture` in RGB: transparent parts laid on white, 16 bits scaled to 8."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit greyscale; Pillow would clip it, not scale it
        grey = np.asarray(picture).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return picture.convert("RGB")
