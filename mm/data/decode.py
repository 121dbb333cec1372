"""Bytes to pictures and captions. Everything that cannot be used raises ValueError with a reason for the ledger."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 50_000_000
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in JPEG, PNG or WebP `data`, header read but pixels not yet decoded.

    Raises ValueError where it is none of these, or has more than `max_pixels`: no decoder runs on it then.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # its message holds a memory address: never twice the same
        raise ValueError("not a JPEG, PNG or WebP image") from error
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged bytes
        raise ValueError(f"not a readable JPEG, PNG or WebP image: {_one_line(error)}") from error
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(f"image of {width}x{height} pixels is over the limit of {max_pixels}")
    return picture


def image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright RGB picture in `data`: EXIF orientation applied, transparency laid on white, 16 bits scaled to 8.

    Raises ValueError where it cannot be decoded or has more than `max_pixels` pixels (checked before decoding).
    """
    picture = open_image(data, max_pixels=max_pixels)
    try:
        picture.load()
        turn = _TURNS.get(_orientation(picture))
        picture = _rgb(picture)
        return picture if turn is None else picture.transpose(turn)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"image cannot be decoded: {_one_line(error)}") from error


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF leaves the pixels whole: show them as stored, as browsers do
        return 1


def _rgb(picture: Image.Image) -> Image.Image:
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


def caption(data: bytes) -> str:
    """The caption in UTF-8 `data`, stripped. Raises ValueError where it is not UTF-8 or holds nothing."""
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"caption is not UTF-8: {error.reason} at byte {error.start}") from error
    if not text:
        raise ValueError("caption is empty")
    return text


def aliases(data: bytes) -> list[str]:
    """The other names in a sample's JSON metadata (list of strings under "aliases"); [] where it has none.

    Raises ValueError where `data` is not JSON.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata is not JSON: {_one_line(error)}") from error
    names = fields.get("aliases") if isinstance(fields, dict) else None
    if not isinstance(names, list):
        return []
    return [name.strip() for name in names if isinstance(name, str) and name.strip()]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
