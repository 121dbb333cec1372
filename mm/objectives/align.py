"""Representation alignment: a denoiser block learns to hold what the vision encoder sees in the clean image.

REPA (arXiv 2410.06940) with the convolutional projector and the spatial normalisation of iREPA (arXiv 2512.10794).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.nn.sharded import own_part
from mm.objectives.base import Objective
from mm.objectives.diffusion import DENOISER, drawn, pick
from mm.types import Batch, Encoded, Loss

if TYPE_CHECKING:
    from mm.config import AlignConfig, DiffusionConfig
    from mm.models.model import Model


class Align(Objective):
    """Owns the projector and the teacher, an average of the vision encoder's weights that gets no gradient."""

    steps: Tensor
    reads = ()  # the teacher encodes for itself

    def __init__(self, config: AlignConfig, model: Model, diffusion: DiffusionConfig):
        super().__init__()
        assert model.denoiser is not None
        self.weight, self.config, self.share = config.weight, config, diffusion.share
        self.project = nn.Conv2d(model.denoiser.width, model.width("image"), 3, padding=1)
        self.changed(model)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def changed(self, model: Model) -> None:
        """The teacher begins as what the model now has."""
        self.teacher = nn.ModuleList([copy.deepcopy(model.adapters["image"]), copy.deepcopy(model.encoders["image"])])
        self.teacher.requires_grad_(False)

    def forward(self, model: Model, batch: Batch, encoded: dict[str, Encoded]) -> Loss:
        assert model.denoiser is not None
        x = encoded[DENOISER].tokens.x  # [B K, N, D]
        shown = batch.inputs.get("target", batch.inputs["image"])
        seen = {"image": pick(shown, drawn(len(shown), self.share))}
        with torch.no_grad():
            adapter, encoder = self.teacher
            tokens = encoder(adapter.embed(Batch(seen))).tokens  # type: ignore[operator]
            wanted = tokens.x if tokens.positions is None else tokens.x[:, -len(tokens.positions) :]  # without cls
        rows = model.latents.shape[1] // model.denoiser.config.patch
        ours = self.project(x.transpose(1, 2).unflatten(2, (rows, -1)))  # [B K, D_vision, rows, columns]
        theirs = _normalise(_as_grid(wanted), self.config.gamma)
        if theirs.shape[-2:] != ours.shape[-2:]:
            theirs = F.interpolate(theirs, size=ours.shape[-2:], mode="bilinear", antialias=True)
        theirs = theirs.repeat_interleave(len(ours) // len(theirs), 0)
        value = 1 - F.cosine_similarity(ours.float(), theirs, dim=1).mean()
        return Loss(value * self._ramp(), {"loss/align": value.detach()})

    def _ramp(self) -> Tensor:
        """From 0 to 1 over the warm-up, and 0 once stopped, as a tensor so that nothing recompiles."""
        ramp = ((self.steps[0] + 1) / max(1, self.config.warmup)).clamp(max=1.0)
        return ramp if not self.config.stop else ramp * (self.steps[0] < self.config.stop)

    @torch.no_grad()
    def after_step(self, model: Model) -> None:
        self.steps += 1
        student: list[Tensor] = [*model.adapters["image"].parameters(), *model.encoders["image"].parameters()]
        mine = [own_part(p) for p in self.teacher.parameters()]
        torch._foreach_lerp_(mine, [own_part(p) for p in student], 1 - self.config.decay)


def _as_grid(tokens: Tensor) -> Tensor:
    """`[B, N, D]` of a square image to float32 `[B, D, side, side]`."""
    side = int(tokens.shape[1] ** 0.5)
    return tokens.float().transpose(1, 2).unflatten(2, (side, side))


def _normalise(grid: Tensor, gamma: float) -> Tensor:
    """Less `gamma` of the mean token, over the spread within the image: what is left says where things are."""
    centred = grid - gamma * grid.mean((2, 3), keepdim=True)
    return centred / (centred.std((2, 3), keepdim=True, correction=0) + 1e-6)
