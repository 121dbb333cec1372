"""The text encoder: ids to the tokens and the vector that the denoiser is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from mm.adapters.text import TextAdapter
from mm.models.encoder import Encoder
from mm.types import Batch


class MMTextEncoder(ModelMixin, ConfigMixin):
    """`settings`: the text part of the model's config; `encoder_settings`: what its encoder is built with."""

    @register_to_config
    def __init__(self, settings: dict[str, Any], encoder_settings: dict[str, Any], vocab_size: int):
        super().__init__()
        processor: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=vocab_size))
        config: Any = SimpleNamespace(**settings)
        self.adapter = TextAdapter(config, processor)
        self.encoder = Encoder(**encoder_settings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[B, L, D]` after the final norm and unit-norm vectors `[B, E]`, of ids and mask `[B, L]`."""
        batch = Batch({"text": input_ids}, {"text": attention_mask.sum(1)})
        with torch.autocast(input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens, pooled = self.encoder(self.adapter.embed(batch))
        return tokens.x, pooled
