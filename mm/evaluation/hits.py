"""What a search found: rows with their keys and captions, and their pictures, read from the shards they came from."""

from __future__ import annotations

import os
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mm.data import sidecar
from mm.data.index import ShardIndex
from mm.data.reader import Reader
from mm.evaluation.images import grid
from mm.evaluation.vectors import VectorIndex

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

CELL = 128  # pixels a side of a picture on a contact sheet
ACROSS = 6  # hits beside each other on one


@dataclass
class Hit:
    """A row that was found for a query."""

    row: int
    score: float  # cosine
    key: str
    shard: str
    captions: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"score": self.score, "row": self.row, "key": self.key, "shard": self.shard, "captions": self.captions}


def hits(index: VectorIndex, rows: Tensor, scores: Tensor, least: float = -2.0) -> list[list[Hit]]:
    """For each query the rows `[Q, k]` that score at least `least`."""
    return [
        [
            Hit(row, round(score, 6), index.key(row), index.shard(row), index.captions(row))
            for row, score in zip(places, numbers, strict=True)
            if score >= least
        ]
        for places, numbers in zip(rows.tolist(), scores.tolist(), strict=True)
    ]


def pictures(
    index: VectorIndex, found: Iterable[Hit], moved: Sequence[str] = ()
) -> tuple[dict[int, Image.Image], list[str]]:
    """The picture of each hit by its row, and the shards that changed since they were indexed.

    `moved`: where shards are now that lay elsewhere then; each takes the place of the one with its file name. Raises
    ValueError of one line for a shard that is gone or no longer holds the sample.
    """
    now = {os.path.basename(path): path for path in moved}
    wanted: dict[str, list[Hit]] = defaultdict(list)
    for hit in found:
        wanted[hit.shard].append(hit)
    facts = {shard.path: shard for shard in index.about.shards}
    images, changed = {}, []
    for shard, some in wanted.items():
        path = now.get(os.path.basename(shard), shard)
        try:
            size, version = sidecar.facts(path)
        except OSError as error:
            raise ValueError(f"{path}: the shard is not there any more; --shards says where shards are now") from error
        if size != facts[shard].bytes or (path == shard and version != facts[shard].version):
            changed.append(path)
        opened = ShardIndex([path], parts=())
        reader, keys = Reader(opened, cache_bytes=0), {hit.key for hit in some}
        places = {key: number for number, key in enumerate(opened.keys) if key in keys}
        for hit in some:
            if hit.key not in places:
                raise ValueError(f"{path}: holds no sample {hit.key!r} any more; mm index again")
            images[hit.row] = _picture(reader, places[hit.key])
    return images, changed


def _picture(reader: Reader, number: int) -> Image.Image:
    from PIL import Image

    from mm.data import decode

    return Image.fromarray(decode.picture(reader.parts(number, ("image",))["image"]).pixels())


def contact_sheet(
    queries: Sequence[tuple[str, Image.Image | None]], found: Sequence[Sequence[Hit]], images: dict[int, Image.Image]
) -> Image.Image:
    """Each query, as a picture or as words, followed by its hits with their scores and captions."""
    rows: list[list[Image.Image | None]] = []
    words: list[list[str]] = []
    for (query, picture), some in zip(queries, found, strict=True):
        cells = [(_card(query), "") if picture is None else (fitted(picture), f"query: {os.path.basename(query)}")]
        cells += [(fitted(images[hit.row]), f"{hit.score:.2f} {(hit.captions or [hit.key])[0]}") for hit in some]
        for start in range(0, len(cells), ACROSS):
            line = cells[start : start + ACROSS]
            blank = ACROSS - len(line)
            rows.append([cell[0] for cell in line] + [None] * blank)
            words.append([cell[1] for cell in line] + [""] * blank)
    return grid(rows, gap=8, captions=words)


def _card(text: str) -> Image.Image:
    """Words in a square, as many as fit."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("RGB", (CELL, CELL), "#f1efe9")
    lines = textwrap.wrap(text, 15)[:6] or [""]
    font = ImageFont.load_default(14)
    ImageDraw.Draw(sheet).multiline_text((10, 10), "\n".join(lines), font=font, fill="#1d1c1a", spacing=5)
    return sheet


def fitted(picture: Image.Image, size: int = CELL) -> Image.Image:
    """The whole picture in a white square, enlarged or shrunk to it; of a much smaller one the pixels stay square."""
    from PIL import Image

    picture = picture.convert("RGB")
    scale = size / max(picture.size)
    shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    sheet = Image.new("RGB", (size, size), "white")
    sheet.paste(picture.resize(shape, how), ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return sheet
