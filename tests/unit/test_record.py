"""A PNG says how it was drawn, and what it says is believed only where it can be true."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mm.diffusion.sampler import SOLVERS
from mm.evaluation.record import LARGEST, MOST, Record, Sheet, read_sheet, text_chunks

LETTERS = 'abc ÄÖ 日本 🙂\u202e\n\t"\\\x00\x07{}:,'
HASH = "0123456789abcdef" * 4
PLAIN = Record("red heart", 7, 25, 2.0, "euler", (0.0, 1.0), 0.7)
ROW: dict[str, Any] = {"prompt": "red heart", "seed": 7, "steps": 25, "guidance": 2.0, "solver": "euler"}
ROW |= {"interval": [0.0, 1.0], "strength": 0.7, "best_of": 1}
SHEET: dict[str, Any] = {"version": 1, "run": "runs/demo", "model": HASH, "columns": 1, "pictures": [ROW]}
SHEET |= {"captions": False}


def png(info: PngInfo | None = None) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), "teal").save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def said(text: str) -> bytes:
    info = PngInfo()
    info.add_itxt("mm", text)
    return png(info)


def sheet(**changes: Any) -> bytes:
    return said(json.dumps(SHEET | changes))


def row(**changes: Any) -> bytes:
    return sheet(pictures=[ROW | changes])


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    """Right behind the header, in a PNG that is otherwise whole."""
    whole = png()
    check = zlib.crc32(kind + data) if crc is None else crc
    return whole[:33] + struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check) + whole[33:]


def bomb() -> bytes:
    return zlib.compress(b" " * (64 << 20))


def test_what_a_png_says_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rng = random.Random(0)

    def maybe(value: Any) -> Any:
        return rng.choice([None, value])

    def text() -> str:
        return "".join(rng.choices(LETTERS, k=rng.randrange(30)))

    for number in range(60):
        records = tuple(
            Record(
                prompt=maybe(text()),
                seed=rng.choice([0, 2**63 - 1, -(2**63), rng.getrandbits(60)]),
                steps=rng.randrange(1, 10_000),
                guidance=rng.uniform(-1000, 1000),
                solver=rng.choice(SOLVERS),
                interval=(low := rng.random() / 2, low + rng.random() / 2),
                strength=1 - rng.random(),
                negative=maybe(text()),
                best_of=rng.randrange(1, 99),
                score=maybe(rng.uniform(-1, 1)),
                like=maybe(HASH),
                start=maybe(HASH[::-1]),
                mask=maybe(HASH),
                autoguide=maybe(HASH),
            )
            for _ in range(rng.randrange(1, 6))
        )
        wanted = Sheet(text(), HASH, rng.randrange(1, 9), records, rng.random() < 0.5)
        path = tmp_path / f"{number}.png"
        path.write_bytes(png(text_chunks(wanted)))
        assert read_sheet(str(path)) == wanted
        assert records[0].settings.steps == records[0].steps


def test_as_many_pictures_as_may_be_can_be_read_again(tmp_path: Path) -> None:
    records = tuple(replace(PLAIN, seed=seed) for seed in range(MOST))
    path = tmp_path / "many.png"
    path.write_bytes(png(text_chunks(Sheet("run", HASH, 100, records))))
    assert read_sheet(str(path)).pictures == records


def test_a_line_for_people_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(text_chunks(Sheet("run", HASH, 1, (replace(PLAIN, negative="blue"),)))))
    with Image.open(path) as image:
        line = image.info["parameters"]
    assert line == (
        "prompt: red heart, negative: blue, seed: 7, steps: 25, guidance: 2, solver: euler, model: 0123456789ab"
    )


def test_a_folder_with_a_name_that_is_no_unicode_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(text_chunks(Sheet("runs/\udcff", HASH, 1, (PLAIN,)))))
    assert read_sheet(str(path)).run == "runs/?"


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (5, 4)).save(stream, "JPEG")
    return stream.getvalue()


def sized(width: int, height: int) -> bytes:
    whole = png(text_chunks(Sheet("run", HASH, 1, (PLAIN,))))
    header = b"IHDR" + struct.pack(">II", width, height) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "text": lambda: b"red heart",
    "a JPEG": jpeg,
    "the signature alone": lambda: png()[:8],
    "half of the header": lambda: png()[:20],
    "cut in its text": lambda: sheet()[:60],
    "cut in the length of a chunk": lambda: sheet()[:35],
    "no chunk": png,
    "a broken check sum": lambda: chunk(b"iTXt", b"mm\0\0\0\0\0{}", crc=1),
    "a chunk of 4 GB": lambda: png()[:33] + b"\xff\xff\xff\xffiTXtmm\0",
    "a zTXt bomb": lambda: chunk(b"zTXt", b"mm\0\0" + bomb()),
    "an iTXt bomb": lambda: chunk(b"iTXt", b"mm\0\1\0\0\0" + bomb()),
    "zTXt that is no zlib": lambda: chunk(b"zTXt", b"mm\0\0" + b"no zlib"),
    "iTXt that is no UTF-8": lambda: chunk(b"iTXt", b"mm\0\0\0\0\0\xff\xfe{}"),
    "tEXt that is not JSON": lambda: chunk(b"tEXt", b"mm\0red heart"),
    "a header of 10^9 pixels a side": lambda: sized(10**9, 10**9),
    "huge": lambda: said(" " * (LARGEST + 1)),
    "not JSON": lambda: said("red heart"),
    "half of JSON": lambda: said(json.dumps(SHEET)[:-9]),
    "blank": lambda: said(""),
    "deep": lambda: said("[" * 100_000),
    "deep and whole": lambda: said("[" * 5000 + "]" * 5000),
    "a number of 5,000 digits": lambda: said('{"version": ' + "1" * 5000 + "}"),
    "a list": lambda: said("[1]"),
    "a number": lambda: said("1"),
    "null": lambda: said("null"),
    "NaN": lambda: said("NaN"),
    "no version": lambda: said("{}"),
    "version 2": lambda: sheet(version=2),
    "version 1.0": lambda: sheet(version=1.0),
    "version true": lambda: sheet(version=True),
    "version in lines": lambda: sheet(version="1\n2"),
    "an unknown field": lambda: sheet(command="rm"),
    "run 5": lambda: sheet(run=5),
    "no run": lambda: sheet(run=None),
    "run deep": lambda: said(json.dumps(SHEET).replace('"runs/demo"', "[" * 900 + "]" * 900)),
    "run of half a character": lambda: sheet(run="\ud800"),
    "model in short": lambda: sheet(model=HASH[:12]),
    "model with a line": lambda: sheet(model=HASH + "\n"),
    "model in capitals": lambda: sheet(model=HASH.upper()),
    "columns 0": lambda: sheet(columns=0),
    "columns 10^9": lambda: sheet(columns=10**9),
    "columns true": lambda: sheet(columns=True),
    "columns 1.5": lambda: sheet(columns=1.5),
    "captions 1": lambda: sheet(captions=1),
    "no pictures": lambda: sheet(pictures=[]),
    "pictures an object": lambda: sheet(pictures=ROW),
    "too many pictures": lambda: sheet(pictures=[0] * (MOST + 1)),
    "a picture 3": lambda: sheet(pictures=[ROW, 3]),
    "a picture with more": lambda: row(path="/etc/passwd"),
    "a picture without a seed": lambda: row(seed=None),
    "prompt 5": lambda: row(prompt=5),
    "prompt a list": lambda: row(prompt=["red heart"]),
    "prompt of half a character": lambda: row(prompt="a\udc00"),
    "seed 1.0": lambda: row(seed=1.0),
    "seed true": lambda: row(seed=True),
    "seed a text": lambda: row(seed="7"),
    "seed of 65 bits": lambda: row(seed=2**64),
    "steps 0": lambda: row(steps=0),
    "steps 10^9": lambda: row(steps=10**9),
    "steps true": lambda: row(steps=True),
    "guidance NaN": lambda: row(guidance=float("nan")),
    "guidance infinite": lambda: row(guidance=float("-inf")),
    "guidance of 400 digits": lambda: row(guidance=10**400),
    "guidance of 10^6": lambda: row(guidance=1e6),
    "guidance true": lambda: row(guidance=True),
    "guidance a text": lambda: row(guidance="2"),
    "solver rk4": lambda: row(solver="rk4"),
    "solver of 10^6 letters": lambda: row(solver="x" * 10**6),
    "solver a list": lambda: row(solver=["euler"]),
    "interval a number": lambda: row(interval=0.5),
    "interval of three": lambda: row(interval=[0, 0.5, 1]),
    "interval backwards": lambda: row(interval=[0.9, 0.2]),
    "interval outside": lambda: row(interval=[0, 1.5]),
    "interval of texts": lambda: row(interval=["0", "1"]),
    "strength 0": lambda: row(strength=0),
    "strength 2": lambda: row(strength=2),
    "strength NaN": lambda: row(strength=float("nan")),
    "negative 5": lambda: row(negative=5),
    "best_of 0": lambda: row(best_of=0),
    "best_of 10^9": lambda: row(best_of=10**9),
    "best_of null": lambda: row(best_of=None),
    "score infinite": lambda: row(score=float("inf")),
    "score a text": lambda: row(score="best"),
    "like no hash": lambda: row(like="g" * 64),
    "start a path": lambda: row(start="../start.png"),
    "mask 5": lambda: row(mask=5),
    "autoguide a folder": lambda: row(autoguide="runs/demo"),
}


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_sheet(str(path))
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < len(str(path)) + 300
    return line


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_true_is_refused_in_one_line_with_the_files_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.png"
    path.write_bytes(HOSTILE[name]())
    refused(path)


def test_the_sheet_that_those_cases_spoil_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.png"
    path.write_bytes(sheet())
    assert read_sheet(str(path)) == Sheet("runs/demo", HASH, 1, (PLAIN,))


def test_damaged_bytes_give_a_sheet_or_one_line(tmp_path: Path) -> None:
    whole, rng, path, read = png(text_chunks(Sheet("run", HASH, 1, (PLAIN,)))), random.Random(0), tmp_path / "a.png", 0
    for _ in range(400):
        data = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(1, 4) if data else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_sheet(str(path))
            read += 1
        except ValueError:
            refused(path)
    assert read < 200


def test_a_file_that_is_not_there_says_so_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_sheet(str(tmp_path / "none.png"))
