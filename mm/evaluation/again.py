"""Pictures drawn again from what a PNG says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from mm.evaluation.drawn_files import png, write_grid
from mm.evaluation.images import write_whole
from mm.evaluation.record import Sheet, text_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mm.evaluation.record import Record

Kind = tuple[Any, ...]


def redrawn(
    model: Any, sheet: Sheet, given: Mapping[str, Image.Image], weaker: Any = None, *, progress: bool = False
) -> list[Image.Image]:
    """All pictures of a sheet by a loaded model; `given`: the pictures that were "like", "start" and "mask" then.

    What was the best of several is drawn by its own seed, without the others.
    """
    images: list[Image.Image | None] = [None] * len(sheet.pictures)
    kinds: dict[Kind, list[int]] = {}
    for place, record in enumerate(sheet.pictures):
        kinds.setdefault(_kind(record), []).append(place)
    for places in kinds.values():
        drawn = _drawn(model, [sheet.pictures[place] for place in places], given, weaker, progress)
        for place, picture in zip(places, drawn, strict=True):
            images[place] = picture
    return [picture for picture in images if picture is not None]


def _kind(record: Record) -> Kind:
    """What the pictures of one call have in common."""
    return record.settings, record.like, record.start, record.mask, record.autoguide


def _drawn(
    model: Any, records: Sequence[Record], given: Mapping[str, Image.Image], weaker: Any, progress: bool
) -> list[Image.Image]:
    first, count = records[0], len(records)
    pictures = {"images": (first.like, "like"), "start": (first.start, "start"), "masks": (first.mask, "mask")}
    return model.generate(
        [record.prompt for record in records],
        seeds=[record.seed for record in records],
        steps=first.steps,
        guidance=first.guidance,
        solver=first.solver,
        interval=first.interval,
        strength=first.strength,
        negative=[record.negative for record in records],
        autoguide=weaker if first.autoguide else None,
        progress=progress,
        **{name: [given[key]] * count for name, (used, key) in pictures.items() if used},
    )


def write_again(path: str, sheet: Sheet, images: list[Image.Image], before: str) -> None:
    """The same file as `before`, which a folder's single picture or a grid was written to."""
    with Image.open(before) as image:
        single = len(images) == 1 and image.size == images[0].size  # a grid has a margin
    if single:
        write_whole(path, png(images[0], text_chunks(sheet)))
    else:
        write_grid(path, images, sheet)
