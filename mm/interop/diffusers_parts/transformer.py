"""The denoiser: it predicts the clean picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from mm.models.denoiser import Denoiser
from mm.types import Tokens


class MMDenoiser(ModelMixin, ConfigMixin):
    """`settings`: the denoiser's part of the model's config; `shape` (C, H, W) of what it draws."""

    _no_split_modules: ClassVar[list[str]] = ["JointBlock"]

    @register_to_config
    def __init__(self, settings: dict[str, Any], shape: list[int], context_width: int, pooled_width: int):
        super().__init__()
        config: Any = SimpleNamespace(**settings)
        channels, height, width = shape
        self.denoiser = Denoiser(config, (channels, height, width), context_width, pooled_width)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The predicted picture, float32 `[B, C, H, W]`, from a noisy one, its noise level `[B]` in [0, 1], text tokens
        `[B, L, D]` with their mask `[B, L]`, and pooled text and image vectors `[B, 2 E]`.
        """
        tokens = Tokens(encoder_hidden_states, encoder_attention_mask, max_len=encoder_hidden_states.shape[1])
        with torch.autocast(hidden_states.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out: Tensor = self.denoiser(hidden_states, timestep, tokens, pooled_projections)
        return out.float()
