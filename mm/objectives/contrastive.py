"""The contrastive objective: InfoNCE or sigmoid over the samples of a batch, for each pair of modalities."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """The mean over `pairs` of modalities of the loss between their pooled vectors.

    Owns the logit scale (as its log) and, for the sigmoid loss, the logit bias: one for all pairs, so that a similarity
    means the same between any two modalities.
    """

    reads = ()
    pairwise = True

    def __init__(self, config: ContrastiveConfig, pairs: Sequence[tuple[str, str]] = (("image", "text"),)):
        super().__init__()
        self.weight, self.kind, self.pairs = config.weight, config.kind, list(pairs)
        self.max_log_scale = math.log(config.max_scale)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(config.init_scale)))
        self.logit_bias = nn.Parameter(torch.full((1,), config.init_bias)) if config.kind == "sigmoid" else None

    def forward(self, model: Model, batch: Batch, encoded: dict[str, Encoded]) -> Loss:
        scale = self.logit_scale.exp()
        values = {
            f"loss/contrastive/{one}-{other}": contrastive_loss(
                encoded[one].pooled, encoded[other].pooled, scale, self.logit_bias, self.kind, self.group
            )
            for one, other in self.pairs
        }
        metrics = {"logit_scale": scale.detach()[0]}
        if len(values) == 1:
            (value,) = values.values()
        else:
            value = torch.stack(list(values.values())).mean()
            metrics |= {name: part.detach() for name, part in values.items()}
        return Loss(value, {"loss/contrastive": value.detach(), **metrics})

    @torch.no_grad()
    def after_step(self, model: Model) -> None:
        self.logit_scale.clamp_(max=self.max_log_scale)  # here: a clamp in the forward would stop its gradient for good
