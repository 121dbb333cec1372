from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm.adapters.image import ImageProcessor, centre_box, random_box
from mm.adapters.resample import resize, rgb
from mm.data import decode

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_an_opened_picture_and_its_bytes_give_the_same() -> None:
    for form, options in (("PNG", {}), ("JPEG", {"quality": 95})):
        data = encoded(PICTURE, form, **options)
        for size in (None, (20, 31)):
            for train in (False, True):
                processor = ImageProcessor(24, crop_scale=0.3, color_jitter=0.2)
                one, other = (
                    processor.prepare(raw, train=train, rng=np.random.default_rng(5), size=size)["pixels"]
                    for raw in (decode.image(data), decode.picture(data))
                )
                assert one.shape == ((24, 24, 3) if size is None else (31, 20, 3))
                assert np.array_equal(one, other) and one.dtype == np.uint8


def test_any_number_of_threads_gives_the_same(threads: None) -> None:
    large = np.random.default_rng(1).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    made = []
    for count in (1, 2):
        torch.set_num_threads(count)
        made.append([resize(large, (3, 5, 403, 375), size) for size in ((224, 224), (100, 185), (512, 400))])
    for one, other in zip(*made, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1), (2, 3), (17, 900)])
def test_pictures_of_any_shape_are_cut(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (9, 99, 199))
    for processor in (ImageProcessor(32), ImageProcessor(32, crop_scale=0.05)):
        for seed in range(20):
            for train in (False, True):
                made = processor.prepare(picture, train=train, rng=np.random.default_rng(seed), size=(32, 16))
                assert (made["pixels"] == (9, 99, 199)).all() and made["pixels"].shape == (16, 32, 3)


def test_a_crop_of_the_right_size_is_not_resampled() -> None:
    for train in (False, True):
        made = ImageProcessor(60).prepare(PICTURE, train=train, rng=np.random.default_rng(0))["pixels"]
        assert np.array_equal(made, PIXELS[:, 15:75]) and made.flags.c_contiguous and made.flags.owndata


def test_a_whole_multiple_is_the_rounded_mean_of_the_pixels_it_covers() -> None:
    mean = PIXELS.reshape(15, 4, 30, 3, 3).mean(axis=(1, 3))
    assert np.array_equal(resize(PIXELS, (0, 0, 90, 60), (30, 15)), np.floor(mean + 0.5))
    made = ImageProcessor(20).prepare(PICTURE, train=False)["pixels"]
    assert np.array_equal(made, np.floor(PIXELS[:, 15:75].reshape(20, 3, 20, 3, 3).mean(axis=(1, 3)) + 0.5))


def test_other_sizes_are_pillows_bicubic_of_the_part() -> None:
    for box, size in (((0, 0, 90, 60), (44, 37)), ((7, 3, 77, 59), (32, 32)), ((10, 10, 20, 20), (32, 32))):
        expected = np.asarray(PICTURE.crop(box).resize(size, Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(resize(PIXELS, box, size) - expected).max() <= 1


def test_evaluation_takes_the_largest_part_in_the_centre() -> None:
    assert centre_box((90, 60)) == (15, 0, 75, 60)
    assert centre_box((61, 90)) == (0, 14, 61, 75)
    assert centre_box((90, 60), 2.0) == (0, 7, 90, 52)
    assert centre_box((90, 60), 0.5) == (30, 0, 60, 60)


def test_random_boxes_stay_inside_and_keep_their_shape() -> None:
    rng = np.random.default_rng(0)
    for ratio in (1.0, 1.5, 0.5):
        shapes, areas = [], []
        for _ in range(500):
            left, top, right, bottom = random_box((900, 600), ratio, 0.2, rng)
            assert 0 <= left < right <= 900 and 0 <= top < bottom <= 600
            if right - left < 900 and bottom - top < 600:  # not cut to fit
                shapes.append((right - left) / (bottom - top) / ratio)
                areas.append((right - left) * (bottom - top) / 540_000)
        assert 0.74 < min(shapes) < 0.8 and 1.25 < max(shapes) < 1.34
        assert 0.199 < min(areas) < 0.25 and max(areas) > 0.4


def test_a_random_box_takes_four_draws() -> None:
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    random_box((900, 600), 1.0, 0.2, one)
    other.random(4)
    assert one.random() == other.random()


def test_evaluation_never_touches_the_random_stream() -> None:
    rng = np.random.default_rng(3)
    ImageProcessor(24, crop_scale=0.3, color_jitter=0.2).prepare(PICTURE, train=False, rng=rng)
    assert rng.random() == np.random.default_rng(3).random()


def test_opened_pictures_of_every_mode_become_rgb() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 0
    deep = Image.fromarray(np.full((8, 8), 257 * 77, dtype=np.uint16))
    for picture, value in ((clear, 255), (palette, 255), (deep, 77), (Image.new("1", (8, 8), 1), 255)):
        assert (ImageProcessor(4).prepare(picture, train=False)["pixels"] == value).all()
        assert rgb(picture).mode == "RGB"


def test_batches_of_one_shape_collate_and_render_back() -> None:
    processor = ImageProcessor(24)
    items = [processor.prepare(PICTURE.rotate(turn), train=False, size=(20, 30)) for turn in (0, 180)]
    batch, lengths = processor.collate(items)
    assert batch.shape == (2, 3, 30, 20) and batch.dtype == torch.uint8 and lengths is None
    for picture, item in zip(processor.render(batch), items, strict=True):
        assert np.array_equal(np.asarray(picture), item["pixels"])


def test_what_is_no_picture_is_refused() -> None:
    for raw in ("cat.png", b"", None, PIXELS):
        with pytest.raises(ValueError, match=rf"an image must be a PIL.Image or .*, not {type(raw).__name__}"):
            ImageProcessor(24).prepare(raw, train=False)
