"""The vision encoder, for pictures that are drawn after other pictures."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor

from mm.adapters.image import ImageAdapter, ImageProcessor
from mm.models.encoder import Encoder
from mm.types import Batch


class MMImageEncoder(ModelMixin, ConfigMixin):
    """`settings`: the image part of the model's config; `encoder_settings`: what its encoder is built with."""

    @register_to_config
    def __init__(self, settings: dict[str, Any], encoder_settings: dict[str, Any]):
        super().__init__()
        config: Any = SimpleNamespace(**settings)
        self.processor = ImageProcessor.from_config(config)
        self.adapter = ImageAdapter(config, self.processor)
        self.encoder = Encoder(**encoder_settings)

    def prepare(self, pictures: Sequence[Image.Image]) -> Tensor:
        """uint8 `[B, 3, H, W]`."""
        return self.processor.collate([self.processor.prepare(picture, train=False) for picture in pictures])[0]

    def forward(self, pixels: Tensor) -> Tensor:
        """Unit-norm vectors `[B, E]` of uint8 pixels `[B, 3, H, W]`."""
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype != torch.float32):
            pooled: Tensor = self.encoder(self.adapter.embed(Batch({"image": pixels}))).pooled
        return pooled
