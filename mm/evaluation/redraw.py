"""Pictures that others begin at, and masks of what is drawn anew of them.

Letters: B pictures, C H W picture or latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm.adapters.image import ImageProcessor
from mm.adapters.resample import rgb

if TYPE_CHECKING:
    from mm.adapters.latents import LatentSpace

HALF = 128  # level from which a mask's pixel is white


class Redraw:
    """Some of B pictures begin at a picture (the middle of it, at the model's size), some of these inside a mask.

    All are decoded. Raises ValueError naming a mask that is none, or that fits no start.
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
        try:
            return self._processor.collate([self._processor.prepare(picture, train=False)])[0][0]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _mask(self, mask: Image.Image, start: Image.Image | None, name: str) -> Tensor:
        """bool `[1, H, W]`, True where it is white."""
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

    def __len__(self) -> int:
        return len(self._start)

    def kinds(self) -> Iterator[tuple[tuple[bool, bool], list[int]]]:
        """Whether they have a start and a mask, and the rows that are so: at least one."""
        kinds = [(one is not None, mask is not None) for one, mask in zip(self._start, self._masks, strict=True)]
        for kind in ((False, False), (True, False), (True, True)):
            rows = [row for row, found in enumerate(kinds) if found == kind]
            if rows:
                yield kind, rows

    def groups(self) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Rows of those without a start, with one, and with a mask too; and of these `start` and `redraw`.

        `start`: latents `[b, C, h, w]`; `redraw`: bool `[b, 1, h, w]`, True wherever any pixel of it is.
        """
        for kind, rows in self.kinds():
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
        device = next(itertools.chain(self.latents.parameters(), self.latents.buffers()), pixels).device
        with torch.inference_mode():
            return self.latents.encode(pixels[None].to(device)).cpu()

    def kept(self, row: int, picture: Tensor) -> Tensor:
        """A drawn picture, uint8 `[3, H, W]`, with the very pixels of its start wherever its mask is not white."""
        start, mask = self._start[row], self._masks[row]
        return picture if start is None or mask is None else torch.where(mask, picture, start)


def fingerprint(picture: Image.Image) -> str:
    """SHA-256 in hex of a picture's size and RGB pixels, on white: whether two files hold the same picture."""
    import hashlib

    pixels = np.asarray(rgb(picture))
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
