"""Corruptions are what their paper says, each stronger than the one before, and the same wherever a picture stands."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mm.data.index import ShardIndex
from mm.data.reader import Reader
from mm.evaluation import filters
from mm.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corrupted, random

EVERY = pytest.mark.parametrize("name", CORRUPTIONS)


def scene(size: int, seed: int) -> np.ndarray:
    """Clouds with rectangles on them: smooth parts, edges and corners, as photographs have."""
    rng = np.random.default_rng(seed)
    picture = np.stack([filters.clouds((size, size), 1.6, rng) for _ in range(3)], axis=-1)
    for _ in range(8):
        top, left = rng.integers(0, size, 2)
        side = int(rng.integers(2, max(3, size // 3)))
        picture[top : top + side, left : left + side] = rng.random(3)
    return np.rint(picture * 255).astype(np.uint8)


def worse(picture: np.ndarray, name: str, severity: int, key: str = "key") -> np.ndarray:
    return corrupt(picture, name, severity, random(key, name, 0))


def errors(pictures: list[np.ndarray], name: str, edges: bool = False) -> np.ndarray:
    """Mean squared error by severity, of pixels or of the differences between neighbours."""

    def change(number: int, picture: np.ndarray, severity: int) -> float:
        difference = worse(picture, name, severity, str(number)).astype(float) - picture
        return float(((np.diff(difference, axis=1) if edges else difference) ** 2).mean())

    return np.array([np.mean([change(n, p, severity) for n, p in enumerate(pictures)]) for severity in SEVERITIES])


@EVERY
@pytest.mark.parametrize("size", [32, 112])
def test_each_severity_changes_pictures_more_than_the_one_before(name: str, size: int) -> None:
    found = errors([scene(size, seed) for seed in range(4)], name, edges=name == "fog")
    grows = np.diff(found) / found[:-1]
    if name == "snow":  # in the paper's numbers, 2 and 3 are about as strong
        assert abs(grows[1]) < 0.05
        grows = np.delete(grows, 1)
    assert found[0] > 0.5 and (grows > 0.01).all(), found


def test_emoji_are_changed_more_by_each_severity_too(openmoji_shards: Path) -> None:
    reader = Reader(ShardIndex([str(openmoji_shards / "val-000000.tar")]))
    images = [reader.read(number).image for number in range(8)]
    pictures = [image.crop((0, 0, *image.size), image.size) for image in images if image is not None]
    for name in set(CORRUPTIONS) - {"snow", "fog"}:
        assert (np.diff(errors(pictures, name)) > 0).all(), name


@pytest.mark.parametrize(
    "name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "elastic_transform"]
)
def test_what_the_paper_counts_in_pixels_means_the_same_at_any_size_of_picture(name: str) -> None:
    large = [scene(224, seed) for seed in range(2)]
    small = [np.asarray(Image.fromarray(picture).resize((112, 112), Image.Resampling.BOX)) for picture in large]
    here, there = (
        np.mean([((worse(p, name, 3, str(n)).astype(float) - p) ** 2).mean() for n, p in enumerate(pictures)])
        for pictures in (small, large)
    )
    assert 0.65 < here / there < 1.5, (here, there)


@EVERY
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (17, 5), (31, 64)])
def test_any_size_stays_a_picture_of_that_size_and_the_original_is_left_alone(
    name: str, shape: tuple[int, int]
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    before = picture.copy()
    for severity in SEVERITIES:
        found = worse(picture, name, severity)
        assert found.dtype == np.uint8 and found.shape == picture.shape
    assert np.array_equal(picture, before)
    for flat in (0, 255):
        assert worse(np.full((*shape, 3), flat, np.uint8), name, 3).shape == picture.shape


@EVERY
def test_a_sample_is_corrupted_alike_alone_and_in_a_batch_and_unlike_others(name: str) -> None:
    keys = [f"k{number}" for number in range(5)]
    pictures = torch.from_numpy(np.stack([scene(24, 1)] * 5)).permute(0, 3, 1, 2)
    together = corrupted(pictures, keys, name, 3, seed=7)
    assert together.shape == pictures.shape and together.dtype == torch.uint8
    for number in (0, 3):
        assert torch.equal(
            corrupted(pictures[number : number + 1], keys[number : number + 1], name, 3, seed=7)[0], together[number]
        )
    assert torch.equal(corrupted(pictures.flip(0), keys[::-1], name, 3, seed=7).flip(0), together)
    draws = "noise" in name or name in ("glass_blur", "motion_blur", "snow", "fog", "elastic_transform")
    assert (len(together.unique(dim=0)) > 1) == draws
    assert torch.equal(corrupted(pictures, keys, name, 3, seed=8), together) != draws


def test_noise_has_the_papers_size() -> None:
    grey = np.full((256, 256, 3), 128, np.uint8)
    share = 128 / 255
    for severity, deviation, photons, hit in zip(
        (1, 2, 3), (0.08, 0.12, 0.18), (60, 25, 12), (0.03, 0.06, 0.09), strict=True
    ):
        noisy = worse(grey, "gaussian_noise", severity) / 255 - share
        assert abs(noisy.mean()) < 0.002 and noisy.std() == pytest.approx(deviation, rel=0.02)
        shot = worse(grey, "shot_noise", severity) / 255
        assert shot.mean() == pytest.approx(share, abs=0.005)
        assert shot.std() == pytest.approx((share / photons) ** 0.5, rel=0.06)  # clipped at white
        impulse = worse(grey, "impulse_noise", severity)
        assert (impulse == 0).mean() == pytest.approx(hit / 2, rel=0.05)
        assert (impulse == 255).mean() == pytest.approx(hit / 2, rel=0.05)
        assert np.isin(impulse, (0, 128, 255)).all()


def test_colours_change_as_hsv_says() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    picture[0, 0] = 0  # black has no hue
    for name, function in (
        ("brightness", lambda h, s, v: (h, s, min(v + 0.2, 1))),
        ("saturate", lambda h, s, v: (h, s * 0.5, v)),
    ):
        expected = [
            [colorsys.hsv_to_rgb(*function(*colorsys.rgb_to_hsv(*(pixel / 255)))) for pixel in row] for row in picture
        ]
        assert np.abs(worse(picture, name, 2) - np.array(expected) * 255).max() <= 0.51


def test_contrast_shrinks_about_the_mean_of_each_channel() -> None:
    picture = scene(40, 2)
    mean = picture.reshape(-1, 3).mean(0)
    assert np.abs(worse(picture, "contrast", 2) - (mean + 0.3 * (picture - mean))).max() <= 0.51


def test_jpeg_and_pixels_are_pillows() -> None:
    picture = scene(50, 3)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=15)
    assert np.array_equal(worse(picture, "jpeg_compression", 3), np.asarray(Image.open(stream)))
    coarse = worse(np.kron(scene(16, 4), np.ones((4, 4, 1), np.uint8)), "pixelate", 5)  # to a quarter: 16 pixels
    assert np.array_equal(coarse, np.kron(scene(16, 4), np.ones((4, 4, 1), np.uint8)))


@pytest.mark.parametrize("radius", [0.3, 1.0, 2.7, 10.0])
def test_kernels_keep_brightness_and_have_the_spread_of_what_they_stand_for(radius: float) -> None:
    place = lambda kernel: np.arange(len(kernel)) - len(kernel) // 2  # noqa: E731
    for kernel, spread in (
        (filters.disk(radius), radius**2 / 4),
        (filters.gaussian(radius), radius**2),
        (filters.motion(radius, 1e9, 0), radius**2 / 3),
    ):
        assert kernel.shape[0] == kernel.shape[1] and len(kernel) % 2 == 1 and (kernel >= 0).all()
        assert kernel.sum() == pytest.approx(1)
        along = (kernel.sum(0) * place(kernel) ** 2).sum()
        between = 0.25 if radius >= 1 else radius  # what sharing a point between two pixels adds, at most
        assert -0.02 * radius**2 < along - spread < between + 0.02 * radius**2
    disk = filters.disk(radius)
    assert np.allclose(disk, disk.T) and np.allclose(disk, disk[::-1])


def test_a_large_disk_is_the_pixels_inside_it() -> None:
    kernel = filters.disk(10)
    reach = len(kernel) // 2
    fine = np.linspace(-reach - 0.5, reach + 0.5, 40 * len(kernel), endpoint=False) + 1 / 80
    inside = (fine[:, None] ** 2 + fine**2 <= 100).reshape(len(kernel), 40, len(kernel), 40).mean((1, 3))
    expected = F.avg_pool2d(torch.from_numpy(inside)[None], 3, 1, 1)[0].numpy() / 100 / np.pi  # a pixel blurrier
    assert np.abs(kernel - expected).max() < 0.25 / 100 / np.pi


def test_blurring_is_a_plain_sum_over_the_kernel() -> None:
    rng = np.random.default_rng(5)
    picture, kernel = rng.random((9, 13, 3)), rng.random((5, 5))
    around = F.pad(torch.from_numpy(picture).permute(2, 0, 1)[:, None], (2, 2, 2, 2), "reflect")
    expected = F.conv2d(around, torch.from_numpy(kernel)[None, None])[:, 0].permute(1, 2, 0).numpy()
    assert np.allclose(filters.blurred(picture, kernel), expected)


def test_moving_and_zooming_sample_between_pixels() -> None:
    ramp = np.add.outer(3.0 * np.arange(8), np.arange(10.0))[..., None]  # linear: exact between pixels
    shifts = np.full((8, 10), 0.25), np.full((8, 10), 0.5)
    assert np.allclose(filters.moved(ramp, *shifts)[:-1, :-1], ramp[:-1, :-1] + 3 * 0.25 + 0.5)
    middle = ramp.mean()
    assert np.allclose(filters.zoomed(ramp, 2.0), middle + (ramp - middle) / 2)
    field = filters.smooth((128, 128), 3, np.random.default_rng(0))
    assert field.std() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: corrupt(p, "fogg", 1, random("", "", 0)), "did you mean fog"),
        (lambda p: corrupt(p, "fog", 0, random("", "", 0)), "severity = 0: must be"),
        (lambda p: corrupt(p, "fog", True, random("", "", 0)), "severity = True"),
        (lambda p: corrupt(p.astype(float), "fog", 1, random("", "", 0)), "must be uint8"),
        (lambda p: corrupt(p[..., 0], "fog", 1, random("", "", 0)), "must be uint8"),
        (lambda p: corrupt(p[:0], "fog", 1, random("", "", 0)), "must be uint8"),
    ],
)
def test_what_cannot_be_corrupted_is_one_line(call: object, says: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=says) as raised:
        call(np.zeros((4, 4, 3), np.uint8))
    assert "\n" not in str(raised.value)
