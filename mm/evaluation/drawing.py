"""Pictures out of noise: from text, after a picture's content, on from a picture, or inside a mask.

Letters: B pictures, E embedding, C H W picture or latents, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm.config import ConfigError
from mm.diffusion.guidance import guided, within
from mm.diffusion.noise import normal
from mm.diffusion.sampler import Predict, sample
from mm.diffusion.schedule import Schedule
from mm.evaluation import given
from mm.evaluation.redraw import Redraw
from mm.evaluation.sampling import Settings
from mm.types import Encoded, Tokens

if TYPE_CHECKING:
    from PIL import Image

    from mm.evaluation.inference import Inference, Items

NOISE = 0  # stream of a picture's first noise; training uses others

Preview = Callable[[], "list[Image.Image | None]"]
Callback = Callable[[int, int, Preview], None]  # steps done of the whole call, steps in all, the pictures as they are


def draw(
    inference: Inference,
    prompts: Sequence[str | None],
    *,
    seeds: Sequence[int] | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    images: Sequence[Image.Image | None] | None = None,
    negative: str | Sequence[str | None] | None = None,
    autoguide: Inference | None = None,
    start: Sequence[Image.Image | None] | None = None,
    masks: Sequence[Image.Image | None] | None = None,
    micro_batch: int | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """uint8 `[B, 3, H, W]`: picture i from prompt i, seed i, and what the vision encoder sees of images[i].

    A prompt or image of None (or "") hides that condition. `seeds` are 0 ... B - 1 by default. Guidance leads away from
    what is drawn without conditions; with `negative` (one text for all, or one each) away from that text; with
    `autoguide`, a weaker model of the same space, away from what that one draws of the same prompt. `start[i]` is the
    picture that i begins at, noised to the level `settings.strength`; of it all stays but what is white in `masks[i]`.
    `callback` is called after each step. Raises ValueError where lengths differ or an item cannot be used, ConfigError
    where the model was trained without diffusion.
    """
    schedule = _schedule(inference)
    prompts = given.texts("prompts", prompts)
    count = len(prompts)
    numbers = given.seeds(seeds, count)
    negatives = given.negatives(negative, count)
    like = None if images is None else given.pictures("images", images, count)
    starts, holes = given.pictures("start", start, count), given.pictures("masks", masks, count)
    if callback is not None and not callable(callback):
        raise ValueError(f"callback: must be a function, not {type(callback).__name__}; or None")
    if autoguide is not None:
        _check_weaker(inference, autoguide, schedule, any(negatives))
    if any(negatives) and settings.guidance == 1:
        raise ValueError("negative: guidance = 1 leads away from nothing; give a guidance above 1")
    side = inference.config.model.image.size
    redraw = Redraw(inference.model.latents, side, starts, holes)
    if not count:
        return torch.zeros((0, 3, side, side), dtype=torch.uint8)
    columns = {"number": torch.tensor(numbers, dtype=torch.int64), **_conditions(inference, prompts, like)}
    if any(negatives):
        found = _conditions(inference, negatives, None)
        columns |= {f"negative {name}": column for name, column in found.items()}
    if autoguide is not None:
        found = _conditions(autoguide, prompts, like)
        columns |= {f"weaker {name}": column for name, column in found.items()}
    job = _Job(inference, autoguide, settings, schedule, redraw, micro_batch, callback, progress)
    with job.bar:
        for rows, more in redraw.groups():  # those that begin alike; a micro-batch is filled with its own kind
            job.draw(rows, {name: column[rows] for name, column in columns.items()} | more)
    return torch.stack([picture for picture in job.pictures if picture is not None])


class _Job:
    """One call of `draw`: what has been drawn so far, and who is told."""

    def __init__(
        self,
        inference: Inference,
        autoguide: Inference | None,
        settings: Settings,
        schedule: Schedule,
        redraw: Redraw,
        micro_batch: int | None,
        callback: Callback | None,
        progress: bool,
    ) -> None:
        from tqdm import tqdm

        self.inference, self.autoguide, self.settings, self.schedule = inference, autoguide, settings, schedule
        self.redraw, self.size = redraw, micro_batch or inference.size("draw")
        self.pictures: list[Tensor | None] = [None] * len(redraw)  # uint8 [3, H, W]
        parts = sum(-(-len(rows) // self.size) for _, rows in redraw.kinds())
        self.callback, self._done, self._all = callback, 0, settings.steps * parts
        self._now: tuple[list[int], Tensor] | None = None  # rows in the making, and what is predicted of them
        total = len(redraw) * settings.steps
        self.bar = tqdm(total=total, desc="drawing", unit="step", disable=None if progress else True, leave=False)

    def draw(self, rows: list[int], columns: dict[str, Tensor]) -> None:
        names, left = list(columns), list(rows)

        def part(*values: Tensor) -> Items:
            now = [left.pop(0) for _ in range(min(self.size, len(left)))]
            pixels = self._sampled(dict(zip(names, values, strict=True)), now)
            for row, picture in zip(now, pixels, strict=False):
                self.pictures[row] = self.redraw.kept(row, picture.cpu())
            return (pixels[:, 0, 0, 0],)

        device = self.inference.model.device
        self.inference.run(part, tuple(column.to(device) for column in columns.values()), self.size)

    def _sampled(self, columns: dict[str, Tensor], rows: list[int]) -> Tensor:
        latents, settings = self.inference.model.latents, self.settings
        # each alone: always alike
        noise = torch.cat([normal(number[None], latents.shape, NOISE) for number in columns["number"]])
        start = columns.get("start")

        def told(_: int, x: Tensor) -> None:
            self._done += 1
            self.bar.update(len(rows))
            if self.callback is not None:
                self._now = (rows, x)
                self.callback(self._done, self._all, self._preview)

        x = sample(
            self._predict(columns),
            noise,
            self.schedule,
            settings.steps,
            settings.solver,
            told,
            start=start,
            strength=1.0 if start is None else settings.strength,
            redraw=columns.get("redraw"),
        )
        self._now = None
        return latents.decode(x)

    def _preview(self) -> list[Image.Image | None]:
        """Each picture: finished, as it is predicted at this step, or None where it has not begun."""
        found, render = list(self.pictures), self.inference.processor("image").render
        if self._now is not None:
            rows, x = self._now
            for row, picture in zip(rows, self.inference.model.latents.decode(x).cpu(), strict=False):
                found[row] = self.redraw.kept(row, picture)
        return [None if picture is None else render(picture[None])[0] for picture in found]

    def _predict(self, columns: dict[str, Tensor]) -> Predict:
        """The prediction of x that the settings ask for."""
        settings = self.settings
        levels = self.schedule.sampling_sigmas(settings.steps, settings.strength if "start" in columns else 1.0)
        tokens, pooled = _told(self.inference, columns)
        only = _network(self.inference, tokens, pooled, levels)
        if settings.guidance == 1.0:
            return only
        if self.autoguide is not None:
            weaker = {name[7:]: column for name, column in columns.items() if name.startswith("weaker ")}
            other = _network(self.autoguide, *_told(self.autoguide, weaker), levels)

            def against(z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
                return only(z, sigma), other(z, sigma)

            return within(settings.interval, guided(against, settings.guidance), only)
        blank, blank_pooled = _told(self.inference, _hidden(columns))
        # each picture's other row goes through the same forward
        masks = torch.cat([_mask(tokens), _mask(blank)])
        both_tokens = tokens._replace(x=torch.cat([tokens.x, blank.x]), mask=masks)
        pair = _network(self.inference, both_tokens, torch.cat([pooled, blank_pooled]), levels)

        def both(z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            shown, hidden = pair(torch.cat([z, z]), torch.cat([sigma, sigma])).chunk(2)
            return shown, hidden

        return within(settings.interval, guided(both, settings.guidance), only)


def _network(inference: Inference, tokens: Tokens, pooled: Tensor, levels: Tensor) -> Predict:
    """The denoiser under these conditions, at any of those noise levels."""
    prepared, denoiser = inference.prepared(), inference.model.denoiser
    if prepared is not None:
        return prepared.tell(tokens, pooled, levels)
    assert denoiser is not None

    def predict(z: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(z, sigma, tokens, pooled).float()

    return predict


def _mask(tokens: Tokens) -> Tensor:
    assert tokens.mask is not None
    return tokens.mask


def _hidden(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The conditions that guidance leads away from: none, or in rows that have a negative text that one."""
    nothing = torch.zeros_like(columns["told"])
    hidden = {**columns, "told": nothing, "shown": nothing}
    if "negative told" in columns:
        given = columns["negative told"].bool()
        for name in ("tokens", "mask", "text", "told"):
            column = hidden[name]
            rows = given.view(-1, *[1] * (column.ndim - 1))
            hidden[name] = torch.where(rows, columns[f"negative {name}"], column)
    return hidden


def _told(inference: Inference, columns: dict[str, Tensor]) -> tuple[Tokens, Tensor]:
    """The denoiser's conditions of some rows."""
    tokens, text = columns["tokens"], columns["text"]
    encoded = {
        "text": Encoded(Tokens(tokens, columns["mask"], max_len=tokens.shape[1]), text),
        "image": Encoded(Tokens(tokens), columns["image"]),
    }
    return inference.model.condition(encoded, {"text": columns["told"], "image": columns["shown"]})


def _conditions(
    inference: Inference, prompts: Sequence[str | None], images: Sequence[Image.Image | None] | None
) -> dict[str, Tensor]:
    """Text tokens, mask, pooled text, pooled image, and what to show of either."""
    texts = ["" if prompt is None else prompt for prompt in prompts]
    tokens, mask, text = inference.text_condition(texts)
    image, shown = torch.zeros_like(text), torch.zeros(len(texts))
    if images is not None:
        there = [place for place, picture in enumerate(images) if picture is not None]
        image[there] = inference.encode("image", [images[place] for place in there]).to(image.device)
        shown[there] = 1.0
    told = torch.tensor([float(bool(words)) for words in texts])
    return {"tokens": tokens, "mask": mask, "text": text, "image": image, "told": told, "shown": shown}


def _schedule(inference: Inference) -> Schedule:
    diffusion = inference.config.objectives.diffusion
    if inference.model.denoiser is None or diffusion is None:
        raise ConfigError("objectives.diffusion = None: this model was trained without it and cannot draw")
    return Schedule.from_config(diffusion)


def _check_weaker(inference: Inference, weaker: Inference, schedule: Schedule, negative: bool) -> None:
    """Raises ValueError where a model cannot stand in for the prediction without conditions."""
    if negative:
        raise ValueError("autoguide, negative: guidance leads away from one of them; give one")
    theirs = _schedule(weaker)
    ours_shape, shape = inference.model.latents.shape, weaker.model.latents.shape
    if shape != ours_shape or theirs.noise_scale != schedule.noise_scale:
        raise ValueError(
            f"autoguide: draws {list(shape)} with noise of {theirs.noise_scale:g}, the model {list(ours_shape)} with "
            f"noise of {schedule.noise_scale:g}; give an earlier or smaller model of the same kind"
        )
