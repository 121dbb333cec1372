"""Latent spaces from diffusers: the config of one for a run, its weights, and an encoder of pictures for shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mm.adapters.autoencoder_files import latents_config, latents_weights

if TYPE_CHECKING:
    import numpy as np

__all__ = ["encoder", "latents_config", "latents_weights"]


def encoder(source: str | os.PathLike[str], size: int) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """uint8 `[B, 3, size, size]` to float16 latents `[B, C, h, w]`, on a GPU where there is one; and what they are of.

    Raises ConfigError where `source` is no autoencoder in diffusers' format, or `size` cannot be divided by its factor.
    """
    import torch

    from mm.adapters.autoencoder import AutoencoderSpace

    config = latents_config(source)
    space = AutoencoderSpace(config, size)
    space.load(latents_weights(source), config.source)
    about = space.about()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    space.to(device)

    def encode(pixels: np.ndarray) -> np.ndarray:
        return space.encode(torch.from_numpy(pixels).to(device)).half().cpu().numpy()

    return encode, about
