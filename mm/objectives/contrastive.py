"""The contrastive objective: InfoNCE or sigmoid over the pairs of a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from mm.objectives.base import Objective
from mm.types import Batch, Encoded, Loss
from mm_kernels import contrastive_loss

if TYPE_CHECKING:
    from mm.config import ContrastiveConfig
    from mm.models.model import Model


class Contrastive(Objective):
    """Owns the logit scale (as its log) and, for the sigmoid loss, the logit bias."""

    pairwise = True

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.weight, self.kind = config.weight, config.kind
        self.max_log_scale = math.log(config.max_scale)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(config.init_scale)))
        self.logit_bias = nn.Parameter(torch.full((1,), config.init_bias)) if config.kind == "sigmoid" else None

    def forward(self, model: Model, batch: Batch, encoded: dict[str, Encoded]) -> Loss:
        image, text = encoded["image"].pooled, encoded["text"].pooled
        scale = self.logit_scale.exp()
        value = contrastive_loss(image, text, scale, self.logit_bias, self.kind, self.group)
        return Loss(value, {"loss/contrastive": value.detach(), "logit_scale": scale.detach()[0]})

    @torch.no_grad()
    def after_step(self, model: Model) -> None:
        self.logit_scale.clamp_(max=self.max_log_scale)  # here: a clamp in the forward would stop its gradient for good
