"""What diffusion noises: pixels here, other latent spaces through the same class."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LatentSpace(nn.Module):
    """A space of shape (C, H, W) whose values are about zero-mean and of unit scale."""

    shape: tuple[int, int, int]

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents `[B, C, H, W]` float32 from uint8 pixels `[B, 3, H, W]`."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 pixels from latents."""
        raise NotImplementedError


class PixelSpace(LatentSpace):
    """Pixels scaled to [-1, 1]."""

    def __init__(self, size: int):
        super().__init__()
        self.shape = (3, size, size)

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels.float() / 127.5 - 1.0

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
