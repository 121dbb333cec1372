"""Pictures compared by their pixels, laid out in a grid, and written whole or not at all."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 16  # pixels a side that pictures are averaged to before they are compared


def shrink(pictures: Tensor) -> Tensor:
    """float32 `[N, 3 * 16 * 16]` in [0, 255] from uint8 `[N, 3, H, W]`."""
    return F.adaptive_avg_pool2d(pictures.float(), SIDE).flatten(1)


def pixel_rank(generated: Tensor, references: Tensor, truth: Tensor) -> Tensor:
    """int64 `[n]`: how many references are nearer to picture i than its own, `references[truth[i]]`; 0 is best.

    Euclidean distance of pixels averaged to 16 x 16; uint8 `generated` `[n, 3, H, W]`, `references` `[N, 3, H, W]`.
    Equal drawings count in their order, so that one that stands ten times cannot be found ten times.
    """
    bank, found = shrink(references), []
    for start in range(0, len(generated), 64):
        # not through a product: equal drawings must get equal distances
        exact = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(shrink(generated[start : start + 64]), bank, compute_mode=exact)  # [b, N]
        index = truth[start : start + 64, None].to(distance.device)
        own = distance.gather(1, index)
        before = torch.arange(len(bank), device=distance.device) < index
        found.append(((distance < own) | ((distance == own) & before)).sum(1))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def within(ranks: Tensor, k: int = 10) -> float:
    """The share of ranks (0 is best) among the `k` best; NaN for none."""
    return float((ranks < k).float().mean())


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    scale: int = 1,
    gap: int = 4,
    captions: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """The pictures on white, `scale` times as large (pixels stay square), with a line of text under each if given.

    Cells are as large as the largest picture; None leaves one empty. Raises ValueError where there is no picture.
    """
    there = [picture for row in rows for picture in row if picture is not None]
    if not there:
        raise ValueError("grid: no pictures to lay out; give at least one")
    width = scale * max(picture.width for picture in there) + gap
    line = max(9, width // 9) if captions else 0
    height = scale * max(picture.height for picture in there) + gap + (line + gap if captions else 0)
    sheet = Image.new("RGB", (max(map(len, rows)) * width + gap, len(rows) * height + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(line) if line else None
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            left, top = c * width + gap, r * height + gap
            if picture is not None:
                large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
                sheet.paste(large, (left, top))
            if captions and font is not None:
                text = _fit(captions[r][c], lambda words: pen.textlength(words, font=font) <= width - gap)
                pen.text((left, top + height - line - 2 * gap), text, font=font, fill="#444444")
    return sheet


def _fit(text: str, fits: object) -> str:
    """The text, or as much of its beginning as fits, with dots."""
    assert callable(fits)
    if fits(text):
        return text
    while text and not fits(text + "…"):
        text = text[:-1].rstrip()
    return text + "…"


def png_bytes(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """A reader of `path` sees the old file or all of the new one. Makes the folder; OSError where it cannot."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it readable by its owner only
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
