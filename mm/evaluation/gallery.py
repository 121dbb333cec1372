"""The pictures that a report shows: drawings beside what they should be, and held-out pictures with guessed names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from mm.evaluation.images import grid
from mm.evaluation.run import SKIN
from mm.evaluation.samples import evenly, read_samples

if TYPE_CHECKING:
    from mm.evaluation.inference import Inference

PROMPTS = (  # of OpenMoji's training split; what is not in the shards is replaced
    *("red apple", "blue heart", "cat face", "dog face", "sun with face", "snowman", "rocket", "fire"),
    *("strawberry", "pizza", "soccer ball", "house", "cactus", "penguin", "rainbow", "Christmas tree"),
)
HELD_OUT = 16  # further prompts, of held-out samples
EXAMPLES = 18  # held-out pictures shown with the names they were given


@dataclass
class Drawing:
    """A picture drawn from a prompt, beside the one that belongs to it."""

    prompt: str
    picture: Image.Image
    reference: Image.Image | None
    held_out: bool


@dataclass
class Guess:
    """A held-out picture with its name and the names that the model found likeliest, best first."""

    picture: Image.Image
    truth: str
    names: list[str]


@dataclass
class Gallery:
    """The pictures of a report."""

    drawings: list[Drawing] = field(default_factory=list)
    guesses: list[Guess] = field(default_factory=list)


def make_gallery(
    inference: Inference,
    train: list[str],
    held_out: list[str],
    records: Sequence[dict[str, Any]],
    *,
    combinations: int = 0,
    progress: bool = False,
) -> Gallery:
    """Draws 16 prompts of the `train` shards and 16 of the `held_out` ones, seeds 0 to 31; nothing is picked by result.

    Of the latter `combinations` are people in skin tones that they were never seen in, the others anything else.
    `records`: the `samples` of an `evaluate` result with the zero_shot task, of which some become examples.
    """
    processor = inference.processor("image")
    known, unseen = (read_samples(files, processor) for files in (train, held_out))
    place_of = {caption: place for place, caption in enumerate(known.captions)}
    there = [place_of[prompt] for prompt in PROMPTS if prompt in place_of]
    others = [place for place in evenly(list(range(len(known.captions))), 2 * len(PROMPTS)) if place not in there]
    plain = [place for place, caption in enumerate(unseen.captions) if SKIN not in caption]
    chosen = [(known, place) for place in [*there, *others][: len(PROMPTS)]]
    toned = [place for place, caption in enumerate(unseen.captions) if SKIN in caption]
    chosen += [(unseen, place) for place in evenly(toned, combinations) + evenly(plain, HELD_OUT - combinations)]
    prompts = [samples.captions[place] for samples, place in chosen]
    drawn = processor.render(inference.generate(prompts, progress=progress))
    drawings = [
        Drawing(prompt, picture, processor.render(samples.images[place][None])[0], samples is unseen)
        for prompt, picture, (samples, place) in zip(prompts, drawn, chosen, strict=True)
    ]
    where = {key: place for place, key in enumerate(unseen.keys)}
    guesses = [
        Guess(processor.render(unseen.images[where[record["key"]]][None])[0], record["caption"], record["all_names"])
        for record in (records[number] for number in evenly(list(range(len(records))), EXAMPLES))
    ]
    return Gallery(drawings, guesses)


def sheet(drawings: Sequence[Drawing], columns: int = 8, size: int = 96) -> Image.Image:
    """One picture of all: each drawing large, its reference small beside it, the prompt below."""
    cells, words, small = [], [], size * 3 // 8
    for drawing in drawings:
        cell = Image.new("RGB", (size + small + 6, size), "white")
        cell.paste(drawing.picture.resize((size, size), Image.Resampling.NEAREST), (0, 0))
        if drawing.reference is not None:
            cell.paste(drawing.reference.resize((small, small), Image.Resampling.BICUBIC), (size + 6, size - small))
        cells.append(cell)
        words.append(("held out: " if drawing.held_out else "") + drawing.prompt)
    rows = [slice(start, start + columns) for start in range(0, len(cells), columns)]
    return grid([cells[row] for row in rows], gap=12, captions=[words[row] for row in rows])
