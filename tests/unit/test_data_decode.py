from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.data import decode


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    grey = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    colour_key = Image.new("RGB", (4, 4), (1, 2, 3))
    assert decode.image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert decode.image(encoded(clear, "WEBP", lossless=True)).getpixel((0, 0)) == (255, 255, 255)
    assert decode.image(encoded(grey)).getpixel((0, 0)) == (127, 127, 127)
    assert decode.image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert decode.image(encoded(colour_key, transparency=(1, 2, 3))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("picture", "pixel"),
    [
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 257 * 77, dtype=np.uint16)), (77, 77, 77)),
        (Image.new("P", (4, 4), 0), (0, 0, 0)),
    ],
)
def test_every_png_mode_becomes_rgb(picture: Image.Image, pixel: tuple[int, int, int]) -> None:
    got = decode.image(encoded(picture))
    assert (got.mode, got.getpixel((0, 0))) == ("RGB", pixel)


def test_cmyk_jpeg_becomes_rgb() -> None:
    got = decode.image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = got.getpixel((4, 4))  # type: ignore[misc]
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_gives_the_upright_picture(orientation: int) -> None:
    picture = Image.fromarray(np.arange(8 * 16, dtype=np.uint8).reshape(8, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: picture,
        6: picture.rotate(-90, expand=True),
        3: picture.rotate(180),
        8: picture.rotate(90, expand=True),
    }
    got = decode.image(encoded(picture, exif=exif))
    assert got.size == ((16, 8) if orientation < 5 else (8, 16))
    if orientation in upright:
        assert got.convert("L").tobytes() == upright[orientation].tobytes()


def test_too_many_pixels_are_refused_before_decoding() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + bytes(4) + b"IDAT"
    )
    with pytest.raises(ValueError, match=r"60000x60000 pixels|DecompressionBomb"):
        decode.image(bomb)
    with pytest.raises(ValueError, match=r"64x64 pixels is over the limit of 4095"):
        decode.image(encoded(Image.new("RGB", (64, 64))), max_pixels=4095)


def test_damaged_images_are_value_errors() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    for form in ("PNG", "JPEG", "WEBP"):
        data = encoded(noise, form)
        for cut in (0, 1, 10, 40, len(data) // 2):
            with pytest.raises(ValueError, match=r"image"):
                decode.image(data[:cut])
    with pytest.raises(ValueError, match=r"not a JPEG, PNG or WebP"):
        decode.image(encoded(noise, "GIF"))
