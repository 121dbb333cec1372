from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mm.data.dimensions import dimensions, jpeg

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG": ("JPEG", {}),
    "progressive JPEG": ("JPEG", {"progressive": True}),
    "JPEG with a profile": ("JPEG", {"icc_profile": bytes(70_000), "comment": b"c" * 300}),
    "PNG": ("PNG", {}),
    "WebP": ("WEBP", {}),
    "lossless WebP": ("WEBP", {"lossless": True}),
}


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def exif(orientation: int, order: str = "<") -> bytes:
    entries = [(0x010F, 2, 4, b"mm\0\0"), (0x0112, 3, 1, struct.pack(f"{order}HH", orientation, 0))]
    ifd = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries)
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    return b"Exif\0\0" + start + struct.pack(f"{order}H", len(entries)) + ifd + bytes(4)


def upright(data: bytes) -> tuple[int, int]:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size


@pytest.mark.parametrize("name", FORMS)
def test_dimensions_are_those_that_pillow_finds(name: str) -> None:
    form, options = FORMS[name]
    for mode in ("RGB", "L", "CMYK") if form == "JPEG" else ("RGB", "RGBA"):
        data = encoded(PICTURE.convert(mode), form, **options)
        assert dimensions(data) == upright(data) == (50, 30)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_turned_picture_has_its_sides_swapped(form: str, orientation: int, order: str) -> None:
    data = encoded(PICTURE, form, exif=exif(orientation, order))
    assert dimensions(data) == upright(data) == ((30, 50) if 5 <= orientation <= 8 else (50, 30))


@pytest.mark.parametrize(("told", "size"), [('="6"', (30, 50)), (">8<", (30, 50)), ('="1"', (50, 30)), ("", (50, 30))])
def test_orientation_in_xmp_counts_where_exif_has_none(told: str, size: tuple[int, int]) -> None:
    xmp = f"<x tiff:Orientation{told}/>".encode()
    data = encoded(PICTURE, "JPEG", xmp=xmp)
    assert dimensions(data) == upright(data) == size
    data = encoded(PICTURE, "JPEG", xmp=xmp, exif=exif(1))
    assert dimensions(data) == upright(data) == (50, 30)


def test_a_thumbnail_is_not_taken_for_the_picture() -> None:
    thumbnail = encoded(PICTURE.resize((16, 12)), "JPEG")
    data = encoded(PICTURE, "JPEG", exif=exif(6) + thumbnail)
    assert data.index(b"\xff\xc0") < data.index(thumbnail) + len(thumbnail)  # the first frame is the thumbnail's
    assert dimensions(data) == (30, 50)


def test_the_first_bytes_are_enough() -> None:
    for form, size in (("JPEG", 1024), ("PNG", 33), ("WEBP", 30)):
        assert dimensions(encoded(PICTURE, form)[:size]) == (50, 30)
    turned = encoded(PICTURE, "WEBP", exif=exif(6))
    assert dimensions(turned) == (30, 50)
    assert dimensions(turned[:-40]) is None  # EXIF lies behind the pixels: nobody can know
    assert dimensions(encoded(PICTURE.crop((0, 0, 20, 20)), "WEBP", exif=exif(6))[:-40]) == (20, 20)
    large = encoded(PICTURE, "JPEG", icc_profile=bytes(70_000))
    assert dimensions(large[:65536]) is None and dimensions(large) == (50, 30)


def test_fill_bytes_between_segments_are_skipped() -> None:
    data = encoded(PICTURE, "JPEG")
    frame = data.index(b"\xff\xc0")
    assert dimensions(data[:frame] + b"\xff\xff\xff" + data[frame:]) == (50, 30)


def test_only_jpegs_that_any_decoder_reads_at_any_scale_are_plain() -> None:
    def plain(data: bytes) -> bool:
        header = jpeg(data)
        assert header is not None
        return header.plain

    data = encoded(PICTURE, "JPEG")
    frame = data.index(b"\xff\xc0")
    assert plain(data) and plain(encoded(PICTURE.convert("L"), "JPEG", progressive=True))
    assert not plain(encoded(PICTURE.convert("CMYK"), "JPEG"))
    assert not plain(data[: frame + 4] + b"\x0c" + data[frame + 5 :])  # 12 bits
    assert not plain(data[: frame + 1] + b"\xc9" + data[frame + 2 :])  # arithmetic coding


@pytest.mark.parametrize("name", FORMS)
def test_no_cut_raises_or_gives_another_size(name: str) -> None:
    form, options = FORMS[name]
    data = encoded(PICTURE, form, **options)
    assert {dimensions(data[:cut]) for cut in range(min(len(data), 1500))} <= {None, (50, 30)}


def test_what_is_no_picture_has_no_dimensions() -> None:
    for data in (b"", b"\xff\xd8", b"GIF89a" + bytes(60), b"%PDF-1.4", bytes(100), encoded(PICTURE, "GIF")):
        assert dimensions(data) is None
    assert dimensions(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 0, 7)) is None


STARTS = [
    b"",
    b"\xff\xd8",
    b"\xff\xd8\xff\xe1\0\x30Exif\0\0MM\0*",
    b"\xff\xd8\xff\xe1\0\x30Exif\0\0II*\0\x08\0\0\0\xff\xff",
    b"\xff\xd8\xff\xe1\xff\xffhttp://ns.adobe.com/xap/1.0/\0",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x09\0\0\0\x09\x08\x02\0\0\0\0\0\0\0\0\0\0\x10eXIf",
    *(b"RIFF\0\0\0\0WEBP" + kind for kind in (b"VP8 ", b"VP8L", b"VP8X\x0a\0\0\0\xff")),
]


@pytest.mark.timeout(60)
@settings(max_examples=1500, deadline=1000)
@given(st.sampled_from(STARTS), st.binary(max_size=120))
def test_no_bytes_raise(start: bytes, rest: bytes) -> None:
    found = dimensions(start + rest)
    assert found is None or min(found) > 0
