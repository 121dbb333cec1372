"""`model.generate`: pictures that know how they were drawn, and the best of several candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from mm.config import ConfigError
from mm.diffusion.noise import hash64
from mm.evaluation import given
from mm.evaluation.drawing import Callback, draw
from mm.evaluation.record import MOST, Record
from mm.evaluation.redraw import fingerprint
from mm.evaluation.sampling import Settings
from mm.models.fingerprint import model_hash

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mm.evaluation.inference import Inference

T = TypeVar("T")

CANDIDATE = 4  # stream of candidates' seeds

Pictures = Sequence["Image.Image | None"] | None


def generate(
    inference: Inference,
    prompts: Sequence[str | None],
    *,
    seeds: Sequence[int] | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    images: Pictures = None,
    negative: str | Sequence[str | None] | None = None,
    autoguide: Inference | None = None,
    start: Pictures = None,
    masks: Pictures = None,
    best_of: int = 1,
    callback: Callback | None = None,
    progress: bool = False,
) -> list[Image.Image]:
    """`draw`, rendered; each picture's `info["mm"]` is its `Record`.

    With `best_of` n, each prompt is drawn with n seeds, of which the first is its own, and the picture is kept that has
    the highest cosine with the prompt by the model's own encoders; the first of equal ones. Raises ValueError as `draw`
    does, and where there is no prompt to compare with.
    """
    if not given.whole(best_of) or not 1 <= best_of <= MOST:
        raise ValueError(f"best_of = {given.shown(best_of)}: must be a whole number from 1 to {MOST:,}")
    prompts, best_of = given.texts("prompts", prompts), int(best_of)
    count = len(prompts)
    if best_of > 1:
        _check_comparable(inference, prompts)
    numbers, negatives = given.seeds(seeds, count), given.negatives(negative, count)
    lists = {"images": images, "start": start, "masks": masks}
    each = {name: given.pictures(name, some, count) for name, some in lists.items()}
    candidates = [seed for number in numbers for seed in candidate_seeds(number, best_of)]
    pixels = draw(
        inference,
        _repeated(prompts, best_of),
        seeds=candidates,
        settings=settings,
        images=_repeated(each["images"], best_of) if any(each["images"]) else None,
        negative=_repeated(negatives, best_of),
        autoguide=autoguide,
        start=_repeated(each["start"], best_of),
        masks=_repeated(each["masks"], best_of),
        callback=callback,
        progress=progress,
    )
    scores: list[float | None] = [None] * count
    if best_of > 1:
        kept, scores = _best(inference, pixels, prompts, best_of)
        pixels, numbers = pixels[kept], [candidates[place] for place in kept]
    weaker = None if autoguide is None else model_hash(autoguide)
    pictures = inference.processor("image").render(pixels)
    for place, picture in enumerate(pictures):
        hashes = [None if one is None else fingerprint(one) for one in (some[place] for some in each.values())]
        picture.info["mm"] = Record(
            prompt=prompts[place],
            seed=numbers[place],
            steps=settings.steps,
            guidance=settings.guidance,
            solver=settings.solver,
            interval=settings.interval,
            strength=settings.strength,
            negative=negatives[place],
            best_of=best_of,
            score=scores[place],
            like=hashes[0],
            start=hashes[1],
            mask=hashes[2],
            autoguide=weaker,
        )
    return pictures


def _repeated(rows: Sequence[T], times: int) -> list[T]:
    return [row for row in rows for _ in range(times)]


def candidate_seeds(seed: int, count: int) -> list[int]:
    """`count` seeds, the first of which is `seed` itself: int64, by hash, whatever else is drawn."""
    others = hash64(torch.tensor([seed], dtype=torch.int64), count - 1, CANDIDATE)[0].tolist() if count > 1 else []
    return [seed, *others]


def _check_comparable(inference: Inference, prompts: Sequence[str | None]) -> None:
    if inference.config.objectives.contrastive is None:
        raise ConfigError("best_of: objectives.contrastive = None: this model cannot compare pictures with a prompt")
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"best_of: prompts[{place}] = {prompt!r}: there is nothing to compare with; give a prompt")


def _best(
    inference: Inference, pixels: Tensor, prompts: Sequence[str | None], best_of: int
) -> tuple[list[int], list[float | None]]:
    """Places of the best candidate of each prompt, and their cosines."""
    pictures = inference.embed("image", (pixels,)).unflatten(0, (len(prompts), best_of))  # [P, n, E]
    texts = inference.encode("text", list(prompts))
    cosines = torch.stack([(mine * text).sum(-1) for mine, text in zip(pictures, texts, strict=True)])  # row by row
    first = cosines.argmax(1).tolist()
    return [row * best_of + place for row, place in enumerate(first)], cosines.amax(1).tolist()
