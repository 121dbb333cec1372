"""Images: pictures to uint8 tensors and back, and patches as tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mm.adapters.base import Adapter, Processor
from mm.nn.position import grid_positions
from mm.types import Batch, Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mm.config import ImageConfig


class ImageProcessor(Processor):
    """PIL images to uint8 `[3, size, size]`.

    In training a random-resized-crop of at least `crop_scale` of the area and a jitter of brightness and contrast;
    otherwise the shorter side is resized and the centre is cut. Outside a picture there is nothing, so the crop never
    leaves it.
    """

    source = "image"

    def __init__(self, size: int, crop_scale: float = 1.0, color_jitter: float = 0.0):
        self.size, self.crop_scale, self.color_jitter = size, crop_scale, color_jitter

    def prepare(self, raw: Any, *, train: bool, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        if not isinstance(raw, Image.Image):
            raise ValueError(f"an image must be a PIL.Image, not {type(raw).__name__}")
        if raw.mode != "RGB":
            raw = flatten(raw)
        random = rng if train else None
        box = self._random_box(raw.size, random) if random is not None else centre_box(raw.size)
        resample = Image.Resampling.BOX if raw.width % self.size == 0 and not train else Image.Resampling.BICUBIC
        if raw.size != (self.size, self.size) or box != (0, 0, self.size, self.size):
            raw = raw.resize((self.size, self.size), resample, box=box)
        pixels = np.asarray(raw)  # [H, W, 3] uint8
        if random is not None and self.color_jitter > 0:
            pixels = jitter(pixels, self.color_jitter, random)
        return {"pixels": pixels}

    def _random_box(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
        width, height = size
        if self.crop_scale >= 1.0:
            return centre_box(size)
        area, log_ratio, left, top = rng.random(4)
        side = math.sqrt(width * height * (self.crop_scale + (1 - self.crop_scale) * area))
        ratio = math.exp((2 * log_ratio - 1) * math.log(4 / 3) / 2)
        w, h = min(side * ratio, width), min(side / ratio, height)
        x, y = left * (width - w), top * (height - h)
        return x, y, x + w, y + h

    def collate(self, items: Sequence[dict[str, np.ndarray]]) -> tuple[Tensor, None]:
        """uint8 `[B, 3, H, W]`."""
        pixels = torch.from_numpy(np.stack([item["pixels"] for item in items]))
        return pixels.permute(0, 3, 1, 2).contiguous(), None

    def render(self, tensor: Tensor) -> list[Image.Image]:
        """PIL images from uint8 `[B, 3, H, W]`."""
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in tensor.cpu()]


def centre_box(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred square of a picture."""
    width, height = size
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def flatten(picture: Image.Image) -> Image.Image:
    """RGB, with transparent parts on white."""
    if "A" in picture.mode or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return picture.convert("RGB")


def jitter(pixels: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Contrast about the middle grey and brightness, each changed by up to `amount`."""
    contrast, brightness = 1 + amount * (2 * rng.random(2) - 1)
    table = np.clip((np.arange(256) - 127.5) * contrast + 127.5 * brightness, 0, 255).astype(np.uint8)
    return table[pixels]


class ImageAdapter(Adapter):
    """Patches of normalised pixels, each a token, with a learned position (arXiv 2010.11929)."""

    mean: Tensor
    std: Tensor
    grid: Tensor

    def __init__(self, config: ImageConfig, processor: ImageProcessor, name: str = "image"):
        super().__init__(name, processor)
        self.patch = config.patch
        side = config.size // config.patch
        self.register_buffer("mean", 255 * torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("grid", grid_positions(side, side), persistent=False)
        self.proj = nn.Linear(3 * config.patch**2, config.width)
        self.cls = nn.Parameter(torch.zeros(1, config.width)) if config.pool == "cls" else None
        self.position = nn.Parameter(torch.zeros(side * side + (self.cls is not None), config.width))

    def embed(self, batch: Batch) -> Tokens:
        """Tokens `[B, N, D]` from uint8 pixels `[B, 3, H, W]`."""
        pixels = (batch.inputs[self.name].float() - self.mean) / self.std
        x = self.proj(patchify(pixels, self.patch))
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        return Tokens(x + self.position, max_len=x.shape[1], positions=self.grid)


def patchify(images: Tensor, patch: int) -> Tensor:
    """`[B, C, H, W]` to `[B, (H / patch)(W / patch), C patch patch]`, in reading order."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch: int, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify`, to images of `shape` (C, H, W)."""
    channels, height, width = shape
    x = tokens.unflatten(1, (height // patch, width // patch)).unflatten(3, (channels, patch, patch))
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), channels, height, width)
