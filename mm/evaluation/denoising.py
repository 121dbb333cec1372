"""The task `denoising`: the training loss of diffusion on held-out pictures, noise level by noise level.

Every picture gets the same noise at every level, drawn from its key, and is denoised with its caption and with
nothing. So two models, or two levels, differ by what they predict and not by what they were given.
Letters: B pictures, S levels, C H W latents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.config import ConfigError
from mm.data.order import sample_seed
from mm.diffusion.noise import normal
from mm.diffusion.schedule import Schedule
from mm.evaluation.job import BATCH, Job
from mm.evaluation.outcome import Metric, Outcome
from mm.evaluation.samples import evenly
from mm.objectives.diffusion import velocity_error
from mm.types import Encoded, Tokens

DEFAULTS: dict[str, Any] = {
    "limit": 200,  # held-out pictures, evenly spaced
    "levels": 16,  # evenly spaced noise levels of the curve
    "quantiles": 16,  # of the levels that training draws, whose mean is the training loss
    "seed": 0,
}
CHUNK = 256  # pictures whose captions are encoded at once: they take more memory than the pictures
MOST = 100  # levels: names have three decimals
NOISE = 13  # stream of random numbers: training and drawing use others
SIDES = ("", "unconditional_")  # with the caption, and with nothing


def denoising(job: Job, settings: dict[str, Any]) -> Outcome:
    """`loss`, `loss@SIGMA`, `unconditional_loss`: mean squared errors of the velocity, and `caption_gain`.

    `loss@0.031` is at that level (1 is pure noise); `loss` is the mean over the levels that training draws, at evenly
    spaced quantiles, with the caption always shown and no image: the training loss hides captions and shows images at
    times, and is not the same number. `caption_gain` is what the caption takes off it. Errors are those of means over
    pictures. `detail` has both curves; records have a picture's own losses. Picture i comes out the same whatever else
    is measured. Raises ConfigError where a setting cannot be used or the model has no denoiser.
    """
    settings = checked({**DEFAULTS, **settings})
    diffusion = job.inference.config.objectives.diffusion
    if diffusion is None or job.inference.model.denoiser is None:
        raise ConfigError("objectives.diffusion = None: this model was trained without it and has nothing to denoise")
    schedule = Schedule.from_config(diffusion)
    even = (torch.arange(settings["levels"], dtype=torch.float64) + 0.5) / settings["levels"]
    trained = training_levels(schedule, settings["quantiles"])
    places = evenly(job.held_out, settings["limit"])
    losses = _losses(job, schedule, places, torch.cat([even, trained]).float(), settings["seed"])  # [2, B, S]
    curve, training = losses[:, :, : len(even)], losses[:, :, len(even) :].mean(2)
    names = [f"loss@{sigma:.3f}" for sigma in even.tolist()]
    columns = {side + "loss": training[row] for row, side in enumerate(SIDES)}
    columns |= {"caption_gain": training[1] - training[0]}
    columns |= {side + name: curve[row, :, at] for row, side in enumerate(SIDES) for at, name in enumerate(names)}
    whole = {name: Metric.mean(values) for name, values in columns.items()}
    # the curve without captions is in the detail only: results are read line by line
    metrics = {name: metric for name, metric in whole.items() if not name.startswith(SIDES[1] + "loss@")}
    records = [
        {"key": job.samples.keys[place]} | {name: float(values[row]) for name, values in columns.items()}
        for row, place in enumerate(places)
    ]
    detail: dict[str, Any] = {"settings": settings, "pictures": len(places), "sigma": even.tolist()}
    for side in SIDES:
        found = [whole[side + name] for name in names]
        detail[side + "curve"] = [metric.value for metric in found]
        detail[side + "errors"] = [metric.error for metric in found]
    detail["training_sigma"] = trained.tolist()
    detail["space"] = list(job.inference.model.latents.shape)
    return Outcome(metrics, records, detail)


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings. Raises ConfigError for what cannot be meant."""
    for name in DEFAULTS:
        low = 0 if name == "seed" else 1
        if type(settings[name]) is not int or settings[name] < low:
            raise ConfigError(f"{name} = {settings[name]!r}: must be a whole number, at least {low}")
    if settings["levels"] > MOST:
        raise ConfigError(f"levels = {settings['levels']}: at most {MOST}, each a name in the results")
    return {name: settings[name] for name in DEFAULTS}


def training_levels(schedule: Schedule, count: int) -> Tensor:
    """float64 `[count]`: levels at the evenly spaced quantiles (i + 1/2) / count of those that training draws."""
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return schedule.training_sigma(torch.special.ndtri(places))


def _losses(job: Job, schedule: Schedule, places: list[int], sigmas: Tensor, seed: int) -> np.ndarray:
    """float64 `[2, B, S]`: with the caption and without."""
    inference, parts = job.inference, []
    model, denoiser = inference.model, inference.model.denoiser
    assert denoiser is not None

    def measure(*part: Tensor) -> tuple[Tensor, ...]:
        images, tokens_x, mask, pooled, shown, numbers = part
        x = model.latents.encode(images)
        noise = torch.cat([normal(number[None], tuple(x.shape[1:]), NOISE) for number in numbers])  # each alone
        encoded = {"text": Encoded(Tokens(tokens_x, mask, max_len=tokens_x.shape[1]), pooled)}
        told, told_pooled = model.condition(encoded, {"text": shown})
        blank, blank_pooled = model.condition(encoded, {"text": torch.zeros_like(shown)})
        both = told._replace(x=torch.cat([told.x, blank.x]), mask=torch.cat([mask, mask]))
        both_pooled, twice = torch.cat([told_pooled, blank_pooled]), torch.cat([x, x])
        found = []
        for sigma in sigmas.to(x.device):
            level = sigma.expand(len(twice))
            z = schedule.add_noise(twice, torch.cat([noise, noise]), level)
            error = velocity_error(schedule, twice, denoiser(z, level, both, both_pooled), level)
            # row by row: where a sum begins must not depend on the rows before it
            found.append(torch.stack([row.double().square().mean() for row in error]))
        return tuple(torch.stack(found, 1).chunk(2))  # two of [B, S]

    for start in range(0, len(places), CHUNK):
        part = places[start : start + CHUNK]
        captions = job.captions(part)
        seeds = torch.tensor([sample_seed(seed, 0, job.samples.keys[place]) for place in part], dtype=torch.int64)
        shown = torch.tensor([float(bool(caption)) for caption in captions])  # as in drawing: "" is no caption
        text = inference.text_condition(captions)
        columns = (job.samples.images[part], *text, shown, seeds)
        moved = tuple(column.to(model.device) for column in columns)
        label = "denoising" if job.progress else ""
        parts.append(torch.stack(inference.run(measure, moved, BATCH["draw"], label)).cpu())
    return torch.cat(parts, 1).numpy()
