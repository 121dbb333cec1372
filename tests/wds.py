"""Data sets in CLIP_benchmark's webdataset layout, and models that have a fixed answer for each picture and text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tars import END, member


def picture(number: int) -> bytes:
    """Four fields of colour, so that a model of random weights sees pictures that differ."""
    fields = np.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    pixels = fields.repeat(16, axis=0).repeat(16, axis=1)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_split(folder: Path, texts: Sequence[str], extension: str, per_shard: int = 20) -> None:
    """Sample i is picture i with a member of that extension."""
    folder.mkdir(parents=True)
    starts = range(0, len(texts), per_shard)
    for number, start in enumerate(starts):
        data = b""
        for place, text in enumerate(texts[start : start + per_shard], start):
            data += member(f"s{place:07d}.{extension}", text.encode()) + member(f"s{place:07d}.png", picture(place))
        (folder / f"{number}.tar").write_bytes(data + END)
    (folder / "nshards.txt").write_text(f"{len(starts)}\n")


def classification(folder: Path, labels: Sequence[int], names: Sequence[str], templates: Sequence[str]) -> Path:
    write_split(folder / "test", [str(label) for label in labels], "cls")
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    return folder


def retrieval(folder: Path, captions: Sequence[Sequence[str]]) -> Path:
    write_split(folder / "test", ["\n".join(lines) for lines in captions], "txt")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder
