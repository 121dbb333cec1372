"""Pictures that others begin at, and masks of what is drawn anew of them.

Letters: B pictures, C H W picture or latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm.adapters.image import ImageProcessor

if TYPE_CHECKING:
    from mm.adapters.latents import LatentSpace

HALF = 128  # level from which a mask's pixel is white


class Redraw:
    """Some of B pictures begin at a picture (the middle of it, at the model's size), some of these inside a mask.

    Raises ValueError naming the item that is no picture or mask, or a mask that fits no start.
    """

    def __init__(
        self,
        latents: LatentSpace,
        size: int,
        start: Sequence[Image.Image | None],
        masks: Sequence[Image.Image | None],
    ) -> None:
        self.latents, self._processor = latents, ImageProcessor(size)
        self._start = [None if one is None else self._pixels(one, f"start[{i}]") for i, one in enumerate(start)]
        self._masks = [
            None if mask is None else self._mask(mask, start[i], f"masks[{i}]") for i, mask in enumerate(masks)
        ]

    def _pixels(self, picture: Image.Image, name: str) -> Tensor:
        """uint8 `[3, H, W]`."""
        if not isinstance(picture, Image.Image):
            raise ValueError(f"{name}: must be a PIL.Image, not {type(picture).__name__}")
        try:
            return self._processor.collate([self._processor.prepare(picture, train=False)])[0][0]
        except (ValueError, OSError, SyntaxError) as error:  # a truncated file is read only here
            raise ValueError(f"{name}: {error}") from error

    def _mask(self, mask: Image.Image, start: Image.Image | None, name: str) -> Tensor:
        """bool `[1, H, W]`, True where it is white."""
        if not isinstance(mask, Image.Image):
            raise ValueError(f"{name}: must be a PIL.Image, not {type(mask).__name__}")
        if start is None:
            raise ValueError(f"{name}: there is no start picture for it to lie on; give start[...] too")
        if mask.mode not in ("1", "L"):
            raise ValueError(f"{name}: mode {mask.mode}; must be 1 or L, white where it is drawn anew: .convert('L')")
        if mask.size != start.size:
            raise ValueError(
                f"{name}: {mask.width}x{mask.height} pixels, its start picture has {start.width}x{start.height}; "
                "make them equal"
            )
        white = self._pixels(mask.convert("L").point(lambda level: 255 * (level >= HALF)), name)[:1] >= HALF
        if not white.any():
            raise ValueError(f"{name}: nothing in it is white, so that nothing would be drawn")
        return white

    def groups(self) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Rows of those without a start, with one, and with a mask too; and of these `start` and `redraw`.

        `start`: latents `[b, C, h, w]`; `redraw`: bool `[b, 1, h, w]`, True wherever any pixel of it is.
        """
        kinds = [(one is not None, mask is not None) for one, mask in zip(self._start, self._masks, strict=True)]
        for kind in ((False, False), (True, False), (True, True)):
            rows = [row for row, found in enumerate(kinds) if found == kind]
            if not rows:
                continue
            more = {}
            if kind[0]:  # one at a time: always alike
                more["start"] = torch.cat([self._encoded(row) for row in rows])
            if kind[1]:
                grid = (len(rows), 1, *self.latents.shape[1:])
                white = torch.stack([mask for row in rows if (mask := self._masks[row]) is not None]).float()
                more["redraw"] = torch.nn.functional.adaptive_max_pool2d(white, grid[2:]).bool()
            yield rows, more

    def _encoded(self, row: int) -> Tensor:
        pixels = self._start[row]
        assert pixels is not None
        device = next(self.latents.parameters(), torch.empty(0)).device
        with torch.inference_mode():
            return self.latents.encode(pixels[None].to(device)).cpu()

    def kept(self, pixels: Tensor) -> Tensor:
        """Drawn pictures, uint8 `[B, 3, H, W]`, with the very pixels of the start wherever a mask is not white."""
        out = pixels.clone()
        for row, (start, mask) in enumerate(zip(self._start, self._masks, strict=True)):
            if start is not None and mask is not None:
                out[row] = torch.where(mask, out[row], start)
        return out


def fingerprint(picture: Image.Image) -> str:
    """SHA-256 in hex of a picture's size and RGB pixels: whether two files hold the same picture."""
    import hashlib

    pixels = np.asarray(picture.convert("RGB"))
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
