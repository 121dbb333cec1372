"""What nobody can mean by a drawing is refused in one line that names it, and the model draws on as before."""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mm
from mm.adapters.text import train_tokenizer
from mm.api import LoadedModel
from mm.models.export import save_export
from mm.objectives.step import build_step
from mm.settings import load as load_config

NAN, INF = float("nan"), float("inf")


def loaded(root: Path, folder: Path, size: int = 16, without: str = "") -> LoadedModel:
    config = load_config(root / "configs" / "debug.py")
    config.model.image = dataclasses.replace(config.model.image, size=size, width=32, depth=1)
    if without:
        setattr(config.objectives, without, None)
    torch.manual_seed(0)
    step = build_step(config, train_tokenizer(["red heart", "flag"] * 4, config.model.text.vocab_size))
    with torch.no_grad():
        for parameter in step.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    save_export(folder / "export", step.state_dict(), config, step.model.tokenizer.to_json(), {})
    return mm.load(str(folder), device="cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "": loaded(root, folder / "a"),
        "large": loaded(root, folder / "b", size=32),
        "no diffusion": loaded(root, folder / "c", without="diffusion"),
        "no contrastive": loaded(root, folder / "d", without="contrastive"),
    }


@pytest.fixture(scope="module")
def before(models: dict[str, LoadedModel]) -> bytes:
    return drawn(models[""])


def drawn(model: LoadedModel) -> bytes:
    images = model.generate(
        ["flag", "red heart"], steps=2, start=[PICTURE, None], masks=[WHITE, None], negative=["a", None]
    )
    return b"".join(image.tobytes() for image in images)


PICTURE, WHITE = Image.new("RGB", (20, 24), "teal"), Image.new("L", (20, 24), 255)


def stored(picture: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def cut(kind: str = "PNG", picture: Image.Image | None = None) -> Image.Image:
    """Its header is whole: Pillow notices only when the pixels are read."""
    data = stored(picture or noise(), kind)
    return Image.open(io.BytesIO(data[: len(data) // 2]))


def closed() -> Image.Image:
    with Image.open(io.BytesIO(stored(noise()))) as picture:
        return picture


def bomb() -> Image.Image:
    """A small file of 64 million pixels, which Pillow opens."""
    data = stored(Image.new("RGB", (1, 1)))
    header = b"IHDR" + struct.pack(">II", 8000, 8000) + data[24:29]
    return Image.open(io.BytesIO(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]))


def one(**options: Any) -> Callable[[LoadedModel], object]:
    return lambda model: model.generate(["flag"], **{"steps": 1, **options})


def prompts(value: Any, **options: Any) -> Callable[[LoadedModel], object]:
    return lambda model: model.generate(value, steps=1, **options)


def late(name: str, make: Callable[[], Image.Image], **options: Any) -> Callable[[LoadedModel], object]:
    """Opened when it is called: a file is read only once."""
    return lambda model: model.generate(["flag"], steps=1, **{**options, name: [make()]})


def each(name: str, values: list[Any], words: str = "") -> list[tuple[Callable[[LoadedModel], object], str]]:
    return [(one(**{name: value}), words or f"{name}") for value in values]


def one_picture(name: str) -> list[tuple[Callable[[LoadedModel], object], str]]:
    """That cannot be one, nor a list of them."""
    lists = each(name, ["flag.png", PICTURE, 5, b"x", {0: PICTURE}, {1}, iter([PICTURE]), []], f"^{name}: ")
    lists += each(name, [[PICTURE, PICTURE], [None, None]], f"^{name}: 2 given for 1 prompts")
    items = ["flag.png", 5, b"x", [PICTURE], np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), True]
    lists += each(name, [[item] for item in items], rf"^{name}\[0\]: an image must be a PIL.Image")
    lists += [
        (late(name, lambda: Image.new("RGB", (0, 0))), rf"^{name}\[0\]: 0x0 pixels"),
        (late(name, lambda: Image.new("1", (9000, 9000))), "9000x9000 pixels; must be 1 to 50,000,000"),
        (late(name, bomb), "8000x8000 pixels; must be 1 to 50,000,000"),
        (late(name, cut), rf"^{name}\[0\]: a damaged image \(.*truncated"),
        (late(name, lambda: cut("JPEG")), rf"^{name}\[0\]: a damaged image"),
        (late(name, lambda: cut("GIF")), rf"^{name}\[0\]: a damaged image"),
        (late(name, lambda: cut("TIFF")), rf"^{name}\[0\]: a damaged image"),
        (late(name, closed), rf"^{name}\[0\]: a damaged image"),
        (late(name, lambda: Image.fromarray(np.full((8, 8), NAN, np.float32))), "not all of its pixels are finite"),
        (late(name, lambda: Image.fromarray(np.full((8, 8), INF, np.float32))), "not all of its pixels are finite"),
    ]
    return lists


def on(mask: Any) -> Callable[[LoadedModel], object]:
    return one(start=[PICTURE], masks=[mask])


REFUSED: list[tuple[Callable[[LoadedModel], object], str]] = [
    # prompts
    *((prompts(value), "^prompts: must be a list") for value in (None, 3, b"flag", {"flag": 1}, {"flag"}, iter(["a"]))),
    (prompts("flag"), r"^prompts = 'flag': must be a list; write \['flag'\]"),
    (prompts(Image.new("L", (1, 1))), "^prompts: must be a list"),
    *((prompts(["a", value]), r"^prompts\[1\]: must be a text or None") for value in (3, b"x", ["a"], True, 2.5, NAN)),
    (prompts(["\ud800"]), r"^prompts\[0\] = '\\ud800': holds half of a character"),
    # lists
    *each("seeds", [[], [0, 1], range(3)], "^seeds: . given for 1 prompts"),
    *each("seeds", ["0", "abc", 5, b"a", {0: 0}, {1}, torch.tensor(5), iter([1])], "^seeds: must be a list"),
    *each("seeds", [[1.0], ["1"], [None], [True], [[1]], [NAN], [1j], np.ones(1)], r"^seeds\[0\] = .*must be an int"),
    *each("seeds", [torch.tensor([1.5]), torch.tensor([True]), np.array([[1]]), np.array([True])], r"^seeds\[0\] = "),
    *each("seeds", [[2**63], [-(2**63) - 1], [10**400], [10**5000]], "63 bits"),
    *one_picture("images"),
    *one_picture("start"),
    # numbers
    *each("guidance", ["2", None, NAN, INF, -INF, True, [2.0], 1 + 2j, 1e308, 10**400, b"2"], "^guidance = .*number"),
    *each("guidance", [torch.ones(3, 3), np.ones((3, 3)), 1e6], "^guidance = "),
    *each("steps", [0, -1, 2.5, True, 10**9, "5", None, NAN, INF, [3], 10**400, torch.ones(3, 3)], "^steps = .*whole"),
    *each("strength", [0, -0.5, 1.0001, NAN, INF, True, "0.7", None, [0.7], 10**400], "^strength = .*above 0"),
    *each("interval", [0.5, None, "ab", "01", (0.2,), (0, 0.5, 1), ("0", "1"), {0: 1}, {0, 1}, True], "two noise"),
    *each("interval", [(NAN, 1), (0, INF), (True, False), (None, 1), (0, 10**400), torch.ones(2, 2)], "two noise"),
    *each("interval", [(0.9, 0.2), (-0.1, 1), (0, 1.1), (0.5, 0.5), (2, 3)], "0 <= low < high <= 1"),
    *each("solver", ["rk4", None, 5, b"euler", 1.5, "", "eu\nler", "x" * 10**5, np.ones((2, 2))], "^solver = .*'heun'"),
    *each("solver", ["Euler", "euller"], "did you mean euler"),
    *each("solver", ["dpmpp2m", "dpmpp-2m"], "did you mean dpmpp_2m"),
    *each("best_of", [0, -1, 2.5, True, 10**9, "4", None, NAN, [2], 10**400, torch.ones(2, 2)], "^best_of = .*whole"),
    (prompts([None], best_of=2), r"best_of: prompts\[0\] = None"),
    (prompts(["a", ""], best_of=2), r"best_of: prompts\[1\] = ''"),
    (prompts("flag", best_of=2), "^prompts = 'flag'"),
    (prompts(None, best_of=2), "^prompts: must be a list"),
    (one(best_of=2, seeds=[1, 2]), "^seeds: 2 given for 1 prompts"),
    (one(best_of=2, start=[PICTURE] * 2), "^start: 2 given for 1 prompts"),
    (one(best_of=2, negative=["a", "b"]), "^negative: 2 given for 1 prompts"),
    # masks
    (one(masks=[WHITE]), r"masks\[0\]: there is no start picture"),
    (one(start=[None], masks=[WHITE]), r"masks\[0\]: there is no start picture"),
    (on(Image.new("L", (24, 20), 255)), "24x20 pixels, its start picture has 20x24"),
    (on(Image.new("L", (20, 24), 0)), "nothing in it is white"),
    (on(Image.new("L", (20, 24), 127)), "nothing in it is white"),
    *((on(Image.new(mode, (20, 24))), f"mode {mode}; must be 1 or L") for mode in ("RGB", "RGBA", "P", "F", "I", "LA")),
    *((on(value), r"masks\[0\]: an image must be") for value in ("mask.png", 5, True, np.ones((24, 20), bool))),
    (one(start=[PICTURE], masks=WHITE), "^masks: must be a list"),
    (one(start=[PICTURE], masks=[]), "^masks: 0 given for 1 prompts"),
    (late("masks", lambda: cut(picture=noise().convert("L")), start=[noise()]), r"masks\[0\]: a damaged image"),
    (late("masks", bomb, start=[PICTURE]), r"masks\[0\]: 8000x8000 pixels"),
    # what guidance leads away from
    *each("negative", [5, True, b"blue", {"blue": 1}, {"blue"}, iter(["blue"]), 2.5], "^negative: must be a list"),
    *each("negative", [[], ["a", "b"]], "^negative: . given for 1 prompts"),
    *each("negative", [[5], [b"a"], [["a"]], [True]], r"^negative\[0\]: must be a text or None"),
    *each("negative", ["a\udcff", ["a\udcff"]], "half of a character"),
    *each("autoguide", ["runs/demo", 5, True, {}, torch.nn.Identity()], "^autoguide: must be a loaded model"),
    # the rest
    *each("callback", [5, "print", []], "^callback: must be a function"),
]


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_what_cannot_be_meant_is_refused_in_one_line(models: dict[str, LoadedModel], before: bytes, place: int) -> None:
    call, words = REFUSED[place]
    with pytest.raises(ValueError, match=words) as caught:
        call(models[""])
    line = str(caught.value)
    assert "\n" not in line and len(line) < 300
    if place % 20 == 0:
        assert drawn(models[""]) == before


def test_after_all_of_them_the_model_draws_as_before(models: dict[str, LoadedModel], before: bytes) -> None:
    for call, _ in REFUSED[::7]:
        with pytest.raises(ValueError):
            call(models[""])
    assert drawn(models[""]) == before


def test_there_are_hundreds() -> None:
    assert len(REFUSED) >= 200


@pytest.mark.parametrize(
    ("kind", "call", "words"),
    [
        ("", lambda of: {"autoguide": of["large"]}, r"autoguide: draws \[3, 32, 32\].* the model \[3, 16, 16\]"),
        ("", lambda of: {"autoguide": of["no diffusion"]}, "cannot draw"),
        ("", lambda of: {"autoguide": of[""], "negative": "blue"}, "autoguide, negative: .*give one"),
        ("", lambda of: {"autoguide": of[""], "negative": ["blue"]}, "autoguide, negative: .*give one"),
        ("", lambda of: {"autoguide": of[""].inference}, "autoguide: must be a loaded model, not Inference"),
        ("no diffusion", lambda of: {}, "cannot draw"),
        ("no contrastive", lambda of: {"best_of": 2}, "cannot compare pictures with a prompt"),
    ],
)
def test_a_model_that_cannot_says_so(
    models: dict[str, LoadedModel], kind: str, call: Callable[[dict[str, LoadedModel]], dict[str, Any]], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        models[kind].generate(["flag"], steps=1, **call(models))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"])
def test_a_picture_of_any_mode_can_be_begun_at(models: dict[str, LoadedModel], mode: str) -> None:
    picture = Image.new(mode, (9, 5))
    (image,) = models[""].generate(["flag"], steps=1, start=[picture], images=[picture])
    assert image.size == (16, 16)


def test_numbers_of_numpy_are_numbers(models: dict[str, LoadedModel]) -> None:
    (plain,) = models[""].generate(["flag"], seeds=[3], steps=2, guidance=3.0, best_of=2)
    (other,) = models[""].generate(
        np.array(["flag"]),  # type: ignore[arg-type]
        seeds=np.array([3]),  # type: ignore[arg-type]
        steps=np.int64(2),  # type: ignore[arg-type]
        guidance=np.float32(3),  # type: ignore[arg-type]
        best_of=np.int32(2),  # type: ignore[arg-type]
        interval=[0, 1],  # type: ignore[arg-type]
    )
    assert plain.tobytes() == other.tobytes() and plain.info["mm"] == other.info["mm"]
    assert type(other.info["mm"].steps) is int and type(other.info["mm"].guidance) is float
