"""The diffusion objective: predict the clean image, judged by its velocity (JiT, arXiv 2511.13720)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm.diffusion.noise import normal, uniform
from mm.diffusion.schedule import Schedule
from mm.nn.pool import scale_gradient
from mm.objectives.base import Objective
from mm.types import Batch, Encoded, Loss, Tokens

if TYPE_CHECKING:
    from mm.config import DiffusionConfig
    from mm.models.model import Model

NOISE, LEVEL, KEEP = 1, 2, 3  # streams of random numbers
DENOISER = "denoiser"  # where the tapped tokens of the denoiser are left for other objectives


class Diffusion(Objective):
    """Conditioned on the text's tokens and pooled vector and on the image's pooled vector, each hidden independently.

    With `tap` set, the denoiser's image tokens `[B K, N, D]` after that many blocks are left in `encoded["denoiser"]`.
    """

    reads = ("text",)

    def __init__(self, config: DiffusionConfig, tap: int | None = None):
        super().__init__()
        self.weight, self.config, self.tap = config.weight, config, tap
        self.schedule = Schedule.from_config(config)

    def forward(self, model: Model, batch: Batch, encoded: dict[str, Encoded]) -> Loss:
        assert model.denoiser is not None
        config = self.config
        places = drawn(len(batch.seeds), config.share)
        seeds = pick(batch.seeds, places)
        if "latents" in batch.inputs:
            x = pick(batch.inputs["latents"], places).float()
        else:
            x = model.latents.encode(pick(batch.inputs.get("target", batch.inputs["image"]), places))
        noise = normal(seeds, (config.copies, *x.shape[1:]), NOISE).flatten(0, 1)  # [B K, C, H, W]
        sigma = self.schedule.training_sigma(normal(seeds, (config.copies,), LEVEL).flatten())
        draws = uniform(seeds, 2, KEEP)
        keep = {"text": (draws[:, 0] >= config.drop_text).float(), "image": (draws[:, 1] >= config.drop_image).float()}
        condition, pooled = model.condition(self._switched(encoded, places), keep)
        x = x.repeat_interleave(config.copies, 0)
        z = self.schedule.add_noise(x, noise, sigma)
        raw = model.denoiser(z, sigma, condition, pooled, self.tap)
        if self.tap is not None:
            raw, tapped = raw
            encoded[DENOISER] = Encoded(Tokens(tapped), tapped.mean(1))
        distance = torch.linalg.vector_norm((x - raw).flatten(1), dim=1)  # few passes over the pictures, either way
        value = (distance / self.schedule.floored(sigma)).square().sum() / x.numel()
        return Loss(value, {"loss/diffusion": value.detach()})

    def _switched(self, encoded: dict[str, Encoded], places: Tensor | None) -> dict[str, Encoded]:
        """The encodings that are drawn from, with this objective's gradient into each encoder scaled."""
        found = {}
        for name, scale in (("text", self.config.text_grad), ("image", self.config.image_grad)):
            if name in encoded:
                tokens, pooled = encoded[name]
                mask = None if tokens.mask is None else pick(tokens.mask, places)
                tokens = tokens._replace(x=scale_gradient(pick(tokens.x, places), scale), mask=mask)
                found[name] = Encoded(tokens, scale_gradient(pick(pooled, places), scale))
        return found


def velocity_error(schedule: Schedule, x: Tensor, raw: Tensor, sigma: Tensor) -> Tensor:
    """What the predicted velocity is off by, `[B, C, H, W]` float32; the loss above is its mean square.

    `raw` is what the denoiser gave for x at levels sigma `[B]`. Both velocities start from the same z, so their
    difference is that of the two x over sigma.
    """
    return schedule.velocity(x, raw.float(), sigma)


def pick(rows: Tensor, places: Tensor | None) -> Tensor:
    """The rows at some places; all of them for None."""
    return rows if places is None else rows.index_select(0, places.to(rows.device))


@lru_cache(maxsize=8)
def drawn(count: int, share: float) -> Tensor | None:
    """Places of the samples that are drawn from: `share` of `count`, evenly spread, one at least; None for all.

    A slice of a batch has the places of the whole batch that lie in it, wherever `share` of what is before it is whole.
    """
    if share == 1:
        return None
    steps = torch.floor(torch.arange(count + 1, dtype=torch.float64) * share + 1e-9)
    places = steps.diff().nonzero()[:, 0]
    return places if len(places) else torch.zeros(1, dtype=torch.int64)
