"""Drawn pictures as files: a grid in one PNG, or a folder of them that can be gone on with."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mm.evaluation.generation import candidate_seeds
from mm.evaluation.images import grid, png_bytes, write_whole
from mm.evaluation.record import Record, Sheet, read_sheet, text_chunks

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

SMALLEST_CELL = 96  # pixels: smaller pictures are shown enlarged in a grid
CHUNK = 32  # pictures drawn before they are written
CONTACT_SHEET, LIST = "contact-sheet.png", "prompts.jsonl"


def png(picture: Image.Image, info: PngInfo) -> bytes:
    """The same bytes for the same picture and chunks."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True, pnginfo=info)
    return stream.getvalue()


def layout(pictures: Sequence[Image.Image | None], columns: int, captions: Sequence[str] | None) -> Image.Image:
    """Rows of so many pictures, small ones enlarged, with captions under them where they are given."""
    starts = range(0, len(pictures), columns)
    there = next(picture for picture in pictures if picture is not None)
    words = None if captions is None else [captions[start : start + columns] for start in starts]
    rows = [pictures[start : start + columns] for start in starts]
    return grid(rows, scale=max(1, SMALLEST_CELL // there.width), captions=words)


def write_grid(path: str | Path, pictures: Sequence[Image.Image], sheet: Sheet) -> None:
    """One PNG that says how all of it was drawn."""
    captions = [record.prompt or "" for record in sheet.pictures] if sheet.captions else None
    write_whole(path, png(layout(pictures, sheet.columns, captions), text_chunks(sheet)))


def name(number: int, record: Record) -> str:
    """`0003-red-heart-7.png`: its place, what of the prompt a file name may hold, and its first seed."""
    slug = re.sub(r"[^a-z0-9]+", "-", (record.prompt or "no prompt").lower()).strip("-")[:40] or "prompt"
    return f"{number:04d}-{slug}-{record.seed}.png"


def write_folder(
    folder: Path,
    wanted: Sequence[Record],
    draw: Callable[[Sequence[int]], Sequence[Image.Image]],
    *,
    run: str,
    model: str,
    columns: int,
    force: bool = False,
) -> int:
    """Draws what is not there yet, each picture a PNG of its own, a contact sheet and a list; returns how many.

    `wanted[i]`: what picture i is to be, before the best of several is chosen; `draw(places)` draws some. A file that
    was drawn so by the model of that hash is kept. Raises ValueError where another one is in the way, unless `force`.
    """
    paths = [folder / name(number, record) for number, record in enumerate(wanted)]
    left = []
    for number, (path, record) in enumerate(zip(paths, wanted, strict=True)):
        if not path.exists() or force:
            left.append(number)
        elif not _same(path, record, model):
            raise ValueError(f"{path}: was drawn otherwise; choose another folder, or --force to replace it")
    for start in range(0, len(left), CHUNK):
        places = left[start : start + CHUNK]
        for place, picture in zip(places, draw(places), strict=True):
            sheet = Sheet(run, model, 1, (picture.info["mm"],))
            write_whole(paths[place], png(picture, text_chunks(sheet)))
    records = [read_sheet(str(path)).pictures[0] for path in paths]
    rows = [
        {"file": path.name, "prompt": record.prompt, "seed": record.seed, "score": record.score}
        for path, record in zip(paths, records, strict=True)
    ]
    write_whole(folder / LIST, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    pictures = [_opened(path) for path in paths]
    write_whole(
        folder / CONTACT_SHEET, png_bytes(layout(pictures, columns, [record.prompt or "" for record in records]))
    )
    return len(left)


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _same(path: Path, wanted: Record, model: str) -> bool:
    """Whether a file was drawn as it is wanted; of several candidates any may have been the best."""
    try:
        sheet = read_sheet(str(path))
    except ValueError:
        return False
    record = sheet.pictures[0]
    if sheet.model != model or record.seed not in candidate_seeds(wanted.seed, wanted.best_of):
        return False
    return replace(record, seed=wanted.seed, score=None) == wanted
