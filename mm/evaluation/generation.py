"""`model.generate`: pictures that know how they were drawn, and the best of several candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mm.config import ConfigError
from mm.diffusion.noise import hash64
from mm.evaluation.drawing import Callback, Settings, check_seeds, draw
from mm.evaluation.record import MOST, Record
from mm.evaluation.redraw import fingerprint
from mm.models.fingerprint import model_hash

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mm.evaluation.inference import Inference

CANDIDATE = 4  # stream of candidates' seeds

Given = Sequence["Image.Image | None"] | None


def generate(
    inference: Inference,
    prompts: Sequence[str | None],
    *,
    seeds: Sequence[int] | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    images: Given = None,
    negative: str | Sequence[str | None] | None = None,
    autoguide: Inference | None = None,
    start: Given = None,
    masks: Given = None,
    best_of: int = 1,
    callback: Callback | None = None,
    progress: bool = False,
) -> list[Image.Image]:
    """`draw`, rendered; each picture's `info["mm"]` is its `Record`.

    With `best_of` n, each prompt is drawn with n seeds, of which the first is its own, and the picture is kept that has
    the highest cosine with the prompt by the model's own encoders; the first of equal ones. Raises ValueError as `draw`
    does, and where there is no prompt to compare with.
    """
    if not isinstance(best_of, int) or isinstance(best_of, bool) or not 1 <= best_of <= MOST:
        raise ValueError(f"best_of = {best_of}: must be a whole number from 1 to {MOST}")
    if best_of > 1 and not isinstance(prompts, str):
        _check_comparable(inference, prompts)
    numbers = check_seeds(range(len(prompts)) if seeds is None else seeds)
    each: list[Sequence[object] | None] = [images, start, masks]
    negatives = None if negative is None else [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    for given in (*each, negatives, numbers):
        if given is not None and len(given) != len(prompts):
            best_of = 1  # refused below, with its name
    many = [[row for row in given for _ in range(best_of)] if given is not None else None for given in each]
    candidates = [seed for number in numbers for seed in candidate_seeds(number, best_of)]
    pixels = draw(
        inference,
        prompts if best_of == 1 else [prompt for prompt in prompts for _ in range(best_of)],
        seeds=candidates,
        settings=settings,
        images=many[0],  # type: ignore[arg-type]
        negative=None if negatives is None else [words for words in negatives for _ in range(best_of)],
        autoguide=autoguide,
        start=many[1],  # type: ignore[arg-type]
        masks=many[2],  # type: ignore[arg-type]
        callback=callback,
        progress=progress,
    )
    scores: list[float | None] = [None] * len(prompts)
    if best_of > 1:
        kept, scores = _best(inference, pixels, prompts, best_of)
        pixels, numbers = pixels[kept], [candidates[place] for place in kept]
    weaker = None if autoguide is None else model_hash(autoguide)
    pictures = inference.processor("image").render(pixels)
    for place, picture in enumerate(pictures):
        hashes = [_hash(given, place) for given in (images, start, masks)]
        picture.info["mm"] = Record(
            prompt=prompts[place],
            seed=numbers[place],
            steps=settings.steps,
            guidance=float(settings.guidance),
            solver=settings.solver,
            interval=settings.interval,
            strength=float(settings.strength),
            negative=None if negatives is None else negatives[place],
            best_of=best_of,
            score=scores[place],
            like=hashes[0],
            start=hashes[1],
            mask=hashes[2],
            autoguide=weaker,
        )
    return pictures


def _hash(given: Given, place: int) -> str | None:
    picture = None if given is None else given[place]
    return None if picture is None else fingerprint(picture)


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
