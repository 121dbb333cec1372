"""Pictures that are decoded late, in part, and no larger than needed."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mm.adapters.resample import resize
from mm.data import decode
from mm.data.dimensions import Jpeg


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def upright(data: bytes) -> np.ndarray:
    return np.asarray(decode.image(data))


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise whose amplitude falls with frequency as a photograph's does."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
    planes = np.fft.irfft2(phases * frequency**-1.4, s=(height, width))
    planes *= np.array([50, 12, 12])[:, None, None] / planes.std(axis=(1, 2), keepdims=True)
    grey, *colours = planes + 128
    return Image.fromarray(np.stack([grey, *colours], -1).clip(0, 255).astype(np.uint8), "YCbCr").convert("RGB")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


NOISE = noise(75, 100)
ALPHA = Image.merge("RGBA", (*NOISE.split(), NOISE.convert("L")))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"subsampling": "4:1:1"},
        {"progressive": True},
        {"restart_marker_blocks": 3},
        {"keep_rgb": True},
        {"exif": bytes(100)},
    ],
    ids=str,
)
def test_a_jpeg_decodes_as_pillow_decodes_it(options: dict[str, Any]) -> None:
    for mode in ("RGB", "L"):
        data = encoded(NOISE.convert(mode), "JPEG", **options)
        got = decode.picture(data + b"what follows the picture is not read")
        assert got.size == (got.width, got.height) == (100, 75)
        difference = np.abs(got.pixels().astype(int) - upright(data))
        assert difference.max() <= 1  # 0 where both have the same libjpeg


@pytest.mark.parametrize("transform", [0, 2])  # in Adobe's segment: CMYK and YCCK
def test_four_colours_are_inverted_and_made_rgb(transform: int) -> None:
    data = bytearray(encoded(NOISE.convert("CMYK"), "JPEG", quality=95))
    data[data.index(b"Adobe") + 11] = transform
    got = decode.picture(bytes(data)).pixels()
    assert np.array_equal(got, upright(bytes(data)))
    assert np.abs(got.astype(int) - simplejpeg.decode_jpeg(bytes(data))).max() <= 2  # another's arithmetic


@pytest.mark.parametrize(
    ("form", "picture", "options"),
    [
        ("PNG", ALPHA, {}),
        ("PNG", ALPHA.convert("LA"), {}),
        ("PNG", NOISE.convert("L"), {}),
        ("PNG", NOISE.convert("P"), {}),
        ("PNG", NOISE.convert("P"), {"transparency": 3}),
        ("PNG", Image.fromarray(np.arange(7500, dtype=np.uint16).reshape(75, 100) * 8), {}),
        ("WEBP", NOISE, {"quality": 80}),
        ("WEBP", NOISE, {"lossless": True}),
        ("WEBP", ALPHA, {"lossless": True}),
        ("PNG", NOISE, {"save_all": True, "append_images": [ALPHA.convert("RGB").rotate(90)]}),
        ("WEBP", NOISE, {"save_all": True, "append_images": [NOISE.rotate(90)], "lossless": True}),
    ],
)
def test_other_pictures_are_cut_out_of_what_pillow_decodes(
    form: str, picture: Image.Image, options: dict[str, Any]
) -> None:
    data = encoded(picture, form, **options)
    got = decode.picture(data)
    assert got.size == (100, 75)
    assert np.array_equal(got.pixels(), upright(data))
    assert np.array_equal(got.crop((10, 5, 40, 65), (30, 60)), upright(data)[5:65, 10:40])
    if "save_all" in options:
        assert np.array_equal(got.pixels(), np.asarray(NOISE))  # the first of its frames


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_of_a_turned_picture_is_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(NOISE, form, exif=exif)
    whole, got = upright(data), decode.picture(data)
    assert got.size == ((100, 75) if orientation < 5 else (75, 100))
    assert np.array_equal(got.pixels(), whole)
    cut = got.crop((3, 10, 63, 50), (60, 40))
    assert np.array_equal(cut, whole[10:50, 3:63]) and cut.flags.c_contiguous
    assert np.array_equal(got.crop((3, 10, 63, 50), (20, 20)), resize(whole, (3, 10, 63, 50), (20, 20)))
    bicubic = resize(whole, (3, 10, 63, 50), (23, 17)).astype(int)
    assert np.abs(got.crop((3, 10, 63, 50), (23, 17)) - bicubic).max() <= 1  # rounded after the other direction


# dB against Pillow's bicubic of the whole picture: the least of 8 pictures, less 2. What is reduced has been through
# the low frequencies of JPEG's own transform, which is another filter than bicubic; the box lies on whole blocks here.
@pytest.mark.parametrize(("scale", "floor"), [(1, 69), (2, 44), (4, 42), (8, 39.5)])
def test_a_reduced_crop_is_near_pillows(scale: int, floor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_LEAST_SIDE", 40)
    for seed in range(8):
        data = encoded(noise(384, 512, seed), "JPEG", quality=85)
        box, size = (48, 16, 432, 336), (int(300 / scale), int(250 / scale))
        got = decode.picture(data)
        crop = got.crop(box, size)
        assert list(got._kept) == [scale]
        assert psnr(crop, np.asarray(decode.image(data).crop(box).resize(size, Image.Resampling.BICUBIC))) > floor


def test_a_turned_picture_is_reduced_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_LEAST_SIDE", 40)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(noise(208, 304), "JPEG", quality=90, exif=exif)
        whole, got = decode.image(data), decode.picture(data)
        box, size = (20, 12, 180, 188), (35, 40)
        crop = got.crop(box, size)
        assert list(got._kept) == [4] and crop.shape == (40, 35, 3)
        assert psnr(crop, np.asarray(whole.crop(box).resize(size, Image.Resampling.BICUBIC))) > 39


def test_a_picture_is_reduced_only_while_it_stays_large() -> None:
    def scale(width: int, height: int, box: tuple[int, int, int, int], size: tuple[int, int]) -> int:
        return decode._scale(Jpeg(width, height, 1, True), box, size)

    assert scale(500, 375, (0, 0, 375, 375), (32, 32)) == 1
    assert scale(1024, 768, (0, 0, 768, 768), (32, 32)) == 2
    assert scale(1024, 768, (0, 0, 448, 447), (224, 224)) == 1
    assert scale(6000, 4000, (0, 0, 1792, 1792), (224, 224)) == 8


def test_a_crop_is_the_same_whatever_was_asked_before() -> None:
    data = encoded(noise(800, 800), "JPEG")
    crops: list[tuple[decode.Box, tuple[int, int]]] = [
        ((0, 0, 800, 800), (32, 32)),
        ((13.4, 200.6, 333, 500), (224, 224)),
        ((100, 100, 700, 700), (224, 224)),
    ]
    alone = [decode.picture(data).crop(*crop) for crop in crops]
    together = decode.picture(data)
    for order in ([0, 1, 2], [2, 1, 0]):
        for number in order:
            assert np.array_equal(together.crop(*crops[number]), alone[number])


def test_each_scale_is_decoded_once_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    original = simplejpeg.decode_jpeg

    def counted(data: bytes, **options: Any) -> np.ndarray:
        decoded.append(options)
        return original(data, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
    data = encoded(Image.new("RGB", (800, 800)), "JPEG")
    got = decode.picture(data)
    assert got.size == (800, 800) and not decoded and got.nbytes == len(data)
    for _ in range(2):
        got.crop((0, 0, 800, 800), (32, 32))
        got.crop((0, 0, 700, 700), (64, 64))
        assert (len(decoded), got.nbytes) == (1, len(data) + 400 * 400 * 3)
    got.crop((0, 0, 100, 100), (64, 64))
    assert (len(decoded), got.nbytes) == (2, len(data) + 400 * 400 * 3 + 800 * 800 * 3)
    small = decode.picture(encoded(NOISE, "JPEG"))
    small.crop((0, 0, 75, 75), (32, 32))
    assert small.nbytes == 75 * 100 * 3  # its file is not needed any more


def test_a_crop_is_fresh_and_stays_inside() -> None:
    for form in ("JPEG", "PNG"):
        got = decode.picture(encoded(NOISE, form))
        whole = got.pixels().copy()
        got.crop((0, 0, 100, 75), (100, 75))[:] = 0
        assert np.array_equal(got.pixels(), whole)
        assert np.array_equal(got.crop((-5, 70.4, 2.4, 99), (2, 5)), whole[70:75, 0:2])
        assert np.array_equal(got.crop((99.9, 3.2, 100, 3.3), (1, 1)), whole[3:4, 99:100])
    dot = decode.picture(encoded(Image.new("RGB", (7, 1), (255, 0, 0)), "JPEG", subsampling=0))
    assert dot.size == (7, 1) and dot.crop((0, 0, 7, 1), (5, 9)).shape == (9, 5, 3)


@pytest.mark.timeout(60)
def test_bombs_are_refused_before_decoding() -> None:
    def enlarged(jpeg: bytes) -> bytes:
        frame = jpeg.index(b"\xff\xc0")
        return jpeg[: frame + 5] + struct.pack(">HH", 60_000, 60_000) + jpeg[frame + 9 :]

    webp = encoded(ALPHA, "WEBP", lossless=True, exif=bytes(9))
    assert webp[12:16] == b"VP8X"
    for bomb in (
        enlarged(encoded(NOISE, "JPEG")),
        enlarged(encoded(NOISE.convert("CMYK"), "JPEG")),
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0),
        webp[:24] + 2 * (59_999).to_bytes(3, "little") + webp[30:],
    ):
        with pytest.raises(ValueError, match=r"image of 60000x60000 pixels is over the limit of 50000000"):
            decode.picture(bomb)
    with pytest.raises(ValueError, match=r"100x75 pixels is over the limit of 7499"):
        decode.picture(encoded(NOISE, "WEBP"), max_pixels=7499)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("form", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {})]
)
def test_a_cut_file_is_one_line_of_reason_or_a_whole_picture(form: str, options: dict[str, Any]) -> None:
    data = encoded(NOISE, form, **options)
    whole = upright(data) if form != "GIF" else None
    for cut in {*range(0, len(data), len(data) // 150), *range(len(data) - 20, len(data))}:
        try:
            got = decode.picture(data[:cut]).pixels()
        except ValueError as error:
            assert str(error).count("image") and "\n" not in str(error) and " at 0x" not in str(error)
        else:
            assert form == "PNG" and np.array_equal(got, whole)  # what is cut off is its end mark


def test_damage_is_told_and_oddity_is_not() -> None:
    data = bytearray(encoded(NOISE, "JPEG", restart_marker_blocks=3))
    odd = data.copy()
    odd[odd.index(b"JFIF") + 5] = 9  # a revision that nobody knows
    got = decode.picture(bytes(odd))
    assert np.array_equal(got.crop((0, 0, 50, 50), (50, 50)), upright(bytes(data))[:50, :50])
    data[data.index(b"\xff\xd3") + 1] = 0xD4
    with pytest.raises(ValueError, match=r"^image cannot be decoded: .*0xd4 instead of RST3$"):
        decode.picture(bytes(data)).pixels()


def test_colours_sampled_in_an_unusual_way_are_left_to_pillow() -> None:
    data = bytearray(encoded(Image.new("RGB", (48, 48), (128, 128, 128)), "JPEG", subsampling=0))
    start = data.index(b"\xff\xda")
    header = data[: start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")]
    frame = header.index(b"\xff\xc0")
    for component, sampling in enumerate((0x22, 0x12, 0x11)):
        header[frame + 11 + 3 * component] = sampling
    bits = 9 * (4 * "001010" + 2 * "0000" + "0000")  # of each of 9 units: blocks without a coefficient
    bits += "1" * (-len(bits) % 8)
    data = header + int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\xff\xd9"
    with pytest.raises(ValueError, match=r"subsampling"):
        simplejpeg.decode_jpeg(bytes(data))
    got = decode.picture(bytes(data))
    assert got.size == (48, 48) and (got.crop((0, 0, 48, 48), (20, 20)) == 128).all()
