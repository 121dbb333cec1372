"""What is given to a classifier and cannot be meant is one clear ValueError; what can be meant, however odd, works."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import load_random, pictures, tiny

from mm.api import LoadedModel
from mm.evaluation import vocabulary
from mm.evaluation.files import open_image

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F")
MODES += ("I;16", "I;16L", "I;16B")
SIZES = ((40, 30), (1, 1), (1, 500), (500, 1))
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO", "TGA", "QOI", "AVIF", "JPEG2000")


@pytest.fixture(scope="module")
def model(root: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_random(tmp_path_factory.mktemp("runs") / "tiny", tiny(root))


def saved(kind: str, size: int = 40) -> bytes:
    stream = io.BytesIO()
    pictures(1, size)[0].save(stream, kind)
    return stream.getvalue()


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """A greyscale PNG that says it is so large."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def one_line(call: Callable[[], object], words: str) -> None:
    with warnings.catch_warnings(record=True) as told, pytest.raises(ValueError, match=words) as caught:
        warnings.simplefilter("always")
        call()
    assert not told, "a warning is a second line"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# -- pictures


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_shape_of_picture_works(model: LoadedModel, mode: str) -> None:
    shares = model.classifier(["cat", "dog"])([Image.new(mode, size) for size in SIZES])
    torch.testing.assert_close(shares.sum(1), torch.ones(len(SIZES)))


def test_16_bits_and_transparency_are_seen_as_they_look(model: LoadedModel) -> None:
    classify = model.classifier(["cat", "dog", "cow"])
    grey = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    clear = Image.fromarray(np.dstack([np.zeros((32, 32, 3), np.uint8), 255 - grey]))  # black, more or less, on white
    three = classify([Image.fromarray(grey), deep, clear])
    assert torch.equal(three[0], three[1]) and torch.equal(three[0], three[2])


@pytest.mark.parametrize("size", [(0, 0), (0, 7), (7, 0)])
@pytest.mark.parametrize("mode", ["RGB", "L", "F", "P"])
def test_a_picture_without_pixels_is_refused(model: LoadedModel, mode: str, size: tuple[int, int]) -> None:
    classify = model.classifier(["cat"])
    images = [*pictures(1), Image.new(mode, size)]
    one_line(lambda: classify(images), rf"image\[1\]: an image of {size[0]}x{size[1]} pixels holds nothing")


@pytest.mark.parametrize("level", [np.nan, np.inf, -np.inf])
def test_levels_that_are_no_numbers_are_refused(model: LoadedModel, level: float) -> None:
    classify = model.classifier(["cat"])
    picture = Image.fromarray(np.full((4, 4), level, np.float32))
    one_line(lambda: classify([picture]), r"image\[0\]: .*not finite")


@pytest.mark.parametrize(
    "image",
    [None, 3, "cat.png", b"\x89PNG", np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4), [], {}, Path("cat.png"), ()],
    ids=lambda image: type(image).__name__,
)
def test_what_is_no_picture_is_refused(model: LoadedModel, image: Any) -> None:
    classify = model.classifier(["cat"])
    one_line(lambda: classify([*pictures(1), image]), r"image\[1\]: an image must be a PIL.Image")
    one_line(lambda: classify.top(image), r"image\[0\]: an image must be a PIL.Image")


@pytest.mark.parametrize("images", [None, 3, "cat.png", b"png", {}, Image.new("RGB", (4, 4)), torch.zeros(1, 3, 4, 4)])
def test_pictures_come_in_a_list(model: LoadedModel, images: Any) -> None:
    classify = model.classifier(["cat"])
    one_line(lambda: classify(images), "image: must be a list of items")


def test_no_pictures_have_no_probabilities(model: LoadedModel) -> None:
    assert model.classifier(["cat", "dog"])([]).shape == (0, 2)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_file_that_is_cut_is_refused_or_whole(model: LoadedModel, tmp_path: Path, kind: str, share: float) -> None:
    whole = saved(kind)
    path = tmp_path / "cut.png"
    path.write_bytes(whole[: int(share * len(whole))])
    one_line(lambda: open_image(str(path)), "cut.png: (not an image|a damaged image)")
    if share >= 0.5 and kind in ("PNG", "JPEG"):  # opened lazily by the caller: the damage shows only later
        classify = model.classifier(["cat"])
        with Image.open(path) as image:
            one_line(lambda: classify([image]), r"image\[0\]: image cannot be decoded")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_with_wrong_bytes_is_refused_or_shown(model: LoadedModel, tmp_path: Path, kind: str) -> None:
    """Any other exception, or a warning, fails."""
    whole, rng = saved(kind), random.Random(kind)
    classify, path, shown = model.classifier(["cat", "dog"]), tmp_path / "odd.png", []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(40):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 3, 20))):
                data[rng.randrange(min(len(data), rng.choice((30, 200, 10**6))))] = rng.randrange(256)
            path.write_bytes(data)
            try:
                shown.append(open_image(str(path)))
            except ValueError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert not told
    assert classify(shown[:8]).isfinite().all()


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not an image"),
    "text": (b"not a picture at all\n" * 20, "not an image"),
    "html": (b"<html><body>404</body></html>", "not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "pdf": (b"%PDF-1.7\n1 0 obj\n", "not an image"),
    "eps": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
        "not an image",
    ),  # would start a program
    "zip": (b"PK\x03\x04" + bytes(100), "not an image"),
    "zeros": (bytes(1000), "not an image"),
    "signature": (b"\x89PNG\r\n\x1a\n", "(not an image|damaged)"),
    "jpeg start": (b"\xff\xd8\xff", "(not an image|damaged)"),
    "bomb": (png_of(60_000, 60_000), "over the limit"),
    "wide bomb": (png_of(2**31 - 1, 1), "over the limit|damaged|not an image"),
    "no pixels": (png_of(0, 0), "(not an image|damaged|holds nothing)"),
    "no rows": (png_of(8, 8), "damaged"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_picture_is_refused(tmp_path: Path, name: str) -> None:
    data, words = BAD_FILES[name]
    (tmp_path / "x.png").write_bytes(data)
    one_line(lambda: open_image(str(tmp_path / "x.png")), words)


# -- words and numbers

HALF = "\ud83d"  # of a surrogate pair


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], "nothing to choose from"),
        ((), "nothing to choose from"),
        ("", "for one label write"),
        ("cat", r"for one label write \['cat'\]"),
        ("imagnet", "did you mean imagenet"),
        ("x" * 10_000, "must be a list or the name of a set"),
        (b"cat", "must be a list of texts, not bytes"),
        (None, "must be a list of texts, not NoneType"),
        (3, "must be a list of texts, not int"),
        ({"cat": 1}, "must be a list of texts, not dict"),
        ({"cat"}, "must be a list of texts, not set"),
        (iter(["cat"]), "must be a list of texts"),
        ([""], r"labels\[0\] = '': is blank"),
        (["cat", " \t\n"], r"labels\[1\] = .* is blank"),
        (["cat", None], r"labels\[1\] = None: must be a str"),
        (["cat", 3], r"labels\[1\] = 3: must be a str"),
        (["cat", b"dog"], r"labels\[1\] = b'dog': must be a str"),
        (["cat", ["dog"]], r"labels\[1\] = \['dog'\]: must be a str"),
        (["cat", float("nan")], r"labels\[1\] = nan: must be a str"),
        (["cat", HALF], r"labels\[1\] = .*not Unicode text"),
        (["cat", "dog", "cat"], r"labels\[2\] = 'cat': is labels\[0\] again"),
        (["cat", "cat "], r"labels\[1\] = 'cat ': is labels\[0\] again"),
        (["x" * 10_001], r"labels\[0\]: 10,001 characters are over the limit"),
        (["x" * 10_000, "x" * 10_000], r"labels\[1\] = .* again"),
        (np.array([1, 2]), r"labels\[0\] = .*must be a str"),
        (torch.zeros(3), r"labels\[0\] = .*must be a str"),
        (["cat"] * 1_000_001, "1,000,001 are over the limit of 1,000,000"),
    ],
)
def test_labels_that_cannot_be_meant(model: LoadedModel, labels: Any, words: str) -> None:
    one_line(lambda: model.classifier(labels), words)


@pytest.mark.parametrize(
    ("templates", "words"),
    [
        ([], "templates = \\[\\]: give at least one"),
        ("", "for one template write"),
        ("a {}", r"for one template write \['a {}'\]"),
        ("opanai", "did you mean openai"),
        (None, "must be a list of texts, not NoneType"),
        (7, "must be a list of texts, not int"),
        (b"a {}", "must be a list of texts, not bytes"),
        ({"a {}": 1}, "must be a list of texts, not dict"),
        (["a photo"], r"templates\[0\] = 'a photo': has no {}"),
        (["{}", "{0}"], r"templates\[1\] = '\{0\}': has no \{\}"),
        (["{}", "{ }"], r"templates\[1\]"),
        (["{}", ""], r"templates\[1\]"),
        (["{}", None], r"templates\[1\] = 'NoneType'"),
        (["{}", b"{}"], r"templates\[1\]"),
        ([lambda label: label], r"templates\[0\] = 'function'"),
        (["{}" + HALF], "not Unicode text"),
        (["{}" + "x" * 10_000], "characters are over the limit"),
        (["{}"] * 10_001, "10,001 are over the limit of 10,000"),
    ],
)
def test_templates_that_cannot_be_meant(model: LoadedModel, templates: Any, words: str) -> None:
    one_line(lambda: model.classifier(["cat"], templates), words)


@pytest.mark.parametrize(
    "labels", [["{}"], ["%s {0} {x}"], ["🐈\u200d⬛", "e\u0301"], ["a\x00b"], ["x" * 9999], [r"\n", "\n1"]]
)
def test_odd_labels_work(model: LoadedModel, labels: list[str]) -> None:
    shares = model.classifier(labels, ["{} {{}} {}", "%d {}"])(pictures(1))
    assert shares.isfinite().all() and float(shares.sum()) == pytest.approx(1)


@pytest.mark.parametrize("temperature", [0, -1, 0.0, float("nan"), float("inf"), -float("inf"), "1", True, [1.0]])
def test_temperatures_that_cannot_be_meant(model: LoadedModel, temperature: Any) -> None:
    one_line(lambda: model.classifier(["cat"], temperature=temperature), "temperature = .*must be a number above 0")


@pytest.mark.parametrize("k", [0, -1, 1.5, float("nan"), None, "5", True])
def test_counts_that_cannot_be_meant(model: LoadedModel, k: Any) -> None:
    classify = model.classifier(["cat"])
    one_line(lambda: classify.top(pictures(1)[0], k), "k = .*must be at least 1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "difusion"}, "did you mean diffusion"),
        ({"mode": None}, "mode = None"),
        ({"cache": 3}, "cache = 3: must be True, False or a folder"),
        ({"cache": ""}, "cache = ''"),
        ({"template": "a {}"}, "template = 'a {}': no option of mode contrastive"),
        ({"steps": 3}, "steps = 3: no option of mode contrastive"),
    ],
)
def test_options_that_cannot_be_meant(model: LoadedModel, options: dict[str, Any], words: str) -> None:
    one_line(lambda: model.classifier(["cat"], **options), words)


def test_nothing_is_encoded_for_what_is_refused(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.inference, "encode", None)
    monkeypatch.setattr(vocabulary, "MOST_LABELS", 3)
    for labels, options in ((["a", "b", "c", "d"], {}), (["a"], {"temperature": 0}), (["a"], {"cache": 3})):
        with pytest.raises(ValueError):
            model.classifier(labels, **options)  # type: ignore[arg-type]
