"""A small set of pictures with captions, so that the suite needs no data: shapes of a colour on a ground."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "white": (240, 240, 240)}
SHAPES = ("circle", "square", "triangle", "cross")
SHARDS = 2


def samples(count: int, seed: int = 0) -> list[tuple[str, dict[str, bytes]]]:
    """Key and parts (png, txt) of each; equal arguments give equal bytes."""
    from PIL import Image, ImageDraw

    random, found = np.random.default_rng(seed), []
    for number in range(count):
        name = list(COLOURS)[random.integers(len(COLOURS))]
        shape = SHAPES[random.integers(len(SHAPES))]
        (x, y), radius = random.integers(10, 22, 2).tolist(), int(random.integers(5, 10))
        picture = Image.new("RGB", (32, 32), tuple(random.integers(0, 90, 3).tolist()))
        draw = ImageDraw.Draw(picture)
        left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
        if shape == "circle":
            draw.ellipse((left, top, right, bottom), COLOURS[name])
        elif shape == "square":
            draw.rectangle((left, top, right, bottom), COLOURS[name])
        elif shape == "triangle":
            draw.polygon(((x, top), (left, bottom), (right, bottom)), COLOURS[name])
        else:
            draw.line((left, y, right, y), COLOURS[name], 4)
            draw.line((x, top, x, bottom), COLOURS[name], 4)
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        caption = f"a {name} {shape} number {number}"
        found.append((f"sample-{number:05d}", {"png": stream.getvalue(), "txt": caption.encode()}))
    return found


def shards(out: Path, count: int) -> Path:
    """`out` with `train-*.tar` of `count` samples and a `val-*.tar` of eight, indexed."""
    from mm.data.pack import ShardWriter

    with ShardWriter(out, -(-count // SHARDS)) as writer:
        for split, part in (("train", samples(count)), ("val", samples(8, seed=1))):
            for key, parts in part:
                writer.add(split, key, parts)
        writer.finish({"source": "mm chaos"})
    return out
