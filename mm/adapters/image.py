"""Images: pictures to uint8 tensors and back, and patches as tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mm.adapters.base import Adapter, Processor
from mm.adapters.resample import Fit, Opened
from mm.nn.block import Norm
from mm.nn.position import grid_positions
from mm.types import Batch, Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mm.config import ImageConfig


class ImageProcessor(Processor):
    """Pictures (PIL images, or anything `Croppable`) to uint8 `[3, size, size]`.

    In training a random-resized-crop of at least `crop_scale` of the area and a jitter of brightness and contrast;
    otherwise the largest part in the centre, or what `resize` says (mm.adapters.resample.Fit): what a model that comes
    from elsewhere was trained with. Outside a picture there is nothing, so the crop never leaves it.
    """

    source = "image"

    def __init__(self, size: int, crop_scale: float = 1.0, color_jitter: float = 0.0, resize: Fit | None = None):
        self.size, self.crop_scale, self.color_jitter, self.resize = size, crop_scale, color_jitter, resize

    @classmethod
    def from_config(cls, config: ImageConfig) -> ImageProcessor:
        fit = None if config.resize == "crop" else Fit(config.resize, config.interpolation, config.fill)
        return cls(config.size, config.crop_scale, config.color_jitter, fit)

    def prepare(
        self,
        raw: Any,
        *,
        train: bool,
        rng: np.random.Generator | None = None,
        size: tuple[int, int] | None = None,
    ) -> dict[str, np.ndarray]:
        """`pixels`: uint8 `[height, width, 3]`, of `size` (width, height) where it is given and square otherwise."""
        picture = Opened(loaded(raw)) if isinstance(raw, Image.Image) else raw
        if not (hasattr(picture, "crop") and hasattr(picture, "size")):  # a Croppable; isinstance takes 60 µs to tell
            raise ValueError(f"an image must be a PIL.Image or have `size` and `crop`, not {type(raw).__name__}")
        width, height = size or (self.size, self.size)
        random = rng if train else None
        if random is not None and self.crop_scale < 1.0:
            pixels = picture.crop(random_box(picture.size, width / height, self.crop_scale, random), (width, height))
        elif self.resize is not None and width == height:
            pixels = self.resize(picture, width)
        else:
            pixels = picture.crop(centre_box(picture.size, width / height), (width, height))
        if random is not None and self.color_jitter > 0:
            pixels = jitter(pixels, self.color_jitter, random)
        return {"pixels": pixels}

    def collate(self, items: Sequence[dict[str, np.ndarray]]) -> tuple[Tensor, None]:
        """uint8 `[B, 3, H, W]`."""
        pixels = torch.from_numpy(np.stack([item["pixels"] for item in items]))
        return pixels.permute(0, 3, 1, 2).contiguous(), None

    def render(self, tensor: Tensor) -> list[Image.Image]:
        """PIL images from uint8 `[B, 3, H, W]`."""
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in tensor.cpu()]


def loaded(picture: Image.Image) -> Image.Image:
    """The picture, decoded: Pillow opens a damaged file and says so only later. Raises ValueError where it cannot."""
    if not picture.width or not picture.height:
        raise ValueError(f"an image of {picture.width}x{picture.height} pixels holds nothing")
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise ValueError(f"image cannot be decoded: {' '.join(str(error).split())[:200]}") from error
    if picture.mode == "F" and not np.isfinite(np.asarray(picture)).all():
        raise ValueError("an image has levels that are not finite numbers")
    return picture


def centre_box(size: tuple[int, int], ratio: float = 1.0) -> tuple[int, int, int, int]:
    """The largest centred part of a picture with width / height = `ratio`, in whole pixels."""
    width, height = size
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_box(
    size: tuple[int, int], ratio: float, least: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Whole pixels of a part with at least `least` of the area, width / height within 4/3 of `ratio`; four draws.

    Of a picture too long or too tall for that: the largest part with the bound of the ratio, as in torchvision.
    """
    width, height = size
    area, log_ratio, left, top = rng.random(4)
    side = math.sqrt(width * height * (least + (1 - least) * area))
    narrow, wide = math.sqrt(ratio * 3 / 4), math.sqrt(ratio * 4 / 3)  # of which the squares are width / height
    low, high = max(narrow, side / height), min(wide, width / side)  # so that it fits
    if low <= high:
        stretch = low * (high / low) ** log_ratio
        w, h = side * stretch, side / stretch
    elif width / height > ratio:
        w, h = height * wide**2, height
    else:
        w, h = width, width / narrow**2
    w, h = min(max(1, round(w)), width), min(max(1, round(h)), height)
    x, y = round(left * (width - w)), round(top * (height - h))
    return x, y, x + w, y + h


def jitter(pixels: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Contrast about the middle grey and brightness, each changed by up to `amount`."""
    contrast, brightness = 1 + amount * (2 * rng.random(2) - 1)
    table = np.clip((np.arange(256) - 127.5) * contrast + 127.5 * brightness, 0, 255).astype(np.uint8)
    return table.take(pixels)


class ImageAdapter(Adapter):
    """Patches of normalised pixels, each a token, with a learned position (arXiv 2010.11929)."""

    mean: Tensor
    std: Tensor
    grid: Tensor

    def __init__(self, config: ImageConfig, processor: ImageProcessor, name: str = "image"):
        super().__init__(name, processor)
        self.patch = config.patch
        self.side = side = config.size // config.patch
        self.register_buffer("mean", 255 * torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("grid", grid_positions(side, side), persistent=False)
        self.proj = nn.Linear(3 * config.patch**2, config.width, bias=config.patch_bias)
        self.cls = nn.Parameter(torch.zeros(1, config.width)) if config.pool in ("cls", "patches") else None
        self.position = nn.Parameter(torch.zeros(side * side + (self.cls is not None), config.width))
        self.norm = Norm(config.width, eps=config.eps) if config.pre_norm else nn.Identity()

    def embed(self, batch: Batch) -> Tokens:
        """Tokens `[B, N, D]` from uint8 pixels `[B, 3, H, W]`; what is left of H or W beyond whole patches is not seen.

        SigLIP's 384 pixels are 27 patches of 14 and 6 pixels more, which its convolution leaves out.
        """
        pixels = batch.inputs[self.name]
        rows, columns = pixels.shape[2] // self.patch, pixels.shape[3] // self.patch
        patches = patchify(pixels[..., : rows * self.patch, : columns * self.patch], self.patch)
        mean, std = (patchify(x.expand(-1, -1, self.patch, self.patch), self.patch) for x in (self.mean, self.std))
        x = self.proj((patches - mean).div_(std))  # as bytes until here: in memory, moving pixels is what costs
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        usual = rows == columns == self.side
        grid = self.grid if usual else grid_positions(rows, columns).to(x.device)
        x = self.norm(x + self._positions(rows, columns))
        return Tokens(x, max_len=x.shape[1], positions=grid)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The learned positions, stretched over a grid of another shape as over the square one: `[N, D]`."""
        return self.position if rows == columns == self.side else stretch(self.position, self.side, rows, columns)


class PixelAdapter(Adapter):
    """Each normalised pixel a token of width 3: what a wrapped encoder, which cuts patches itself, is given."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageConfig, processor: ImageProcessor, name: str = "image"):
        super().__init__(name, processor)
        self.register_buffer("mean", 255 * torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    def embed(self, batch: Batch) -> Tokens:
        """Tokens `[B, H W, 3]` in reading order (a view), from square uint8 pixels `[B, 3, H, W]`."""
        pixels = (batch.inputs[self.name].float() - self.mean) / self.std
        return Tokens(pixels.flatten(2).transpose(1, 2), max_len=pixels.shape[2] * pixels.shape[3])


def stretch(position: Tensor, side: int, rows: int, columns: int) -> Tensor:
    """Positions `[extra + side side, D]` of a square grid over one of rows x columns; the `extra` first ones stay."""
    extra = len(position) - side**2
    square = position[extra:].T.unflatten(1, (side, side))  # [D, side, side]
    stretched = F.interpolate(square[None].float(), (rows, columns), mode="bicubic", antialias=True)
    return torch.cat([position[:extra], stretched[0].flatten(1).T.to(position.dtype)])  # [extra + N, D]


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
