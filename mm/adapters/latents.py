"""What diffusion noises: pixels, or an autoencoder's latents (mm/adapters/autoencoder.py), fresh or from shards."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mm.adapters.base import Processor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mm.config import ModelConfig

MEMBER = "latents.npy"  # of a sample in a shard
_HEADER = 1024  # bytes that an .npy file's own header may take


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
        return (pixels / 127.5).sub_(1.0)

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def latent_space(config: ModelConfig) -> LatentSpace:
    """The space that a model draws in. Raises ConfigError where `model.latents` describes no autoencoder."""
    if config.latents is None:
        return PixelSpace(config.image.size)
    from mm.adapters.autoencoder import AutoencoderSpace

    return AutoencoderSpace(config.latents, config.image.size)


class LatentsProcessor(Processor):
    """The member `latents.npy` that `mm shards latents` wrote: float16 of one `shape` (C, H, W), nothing else.

    The header is checked before anything is allocated, and an array of objects, which would be pickled, has no place.
    """

    source = MEMBER

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = shape

    def prepare(
        self, raw: Any, *, train: bool = False, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """`latents`: float16 `[C, H, W]`. Raises ValueError where `raw` is anything else, or no number is in it."""
        if not isinstance(raw, bytes):
            raise ValueError(f"{MEMBER}: must be the bytes of an .npy file, not {type(raw).__name__}")
        count = math.prod(self.shape)
        file = io.BytesIO(raw[:_HEADER])
        try:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version}")
            shape, fortran, kind = np.lib.format.read_array_header_1_0(file)
        except ValueError as error:
            raise ValueError(f"{MEMBER}: no .npy file of version 1.0 ({_first_line(error)})") from error
        if shape != self.shape or kind != np.float16 or fortran:
            raise ValueError(
                f"{MEMBER}: {kind} {list(shape)}, but model.latents and model.image.size need float16 "
                f"{list(self.shape)}; write them again with mm shards latents"
            )
        if len(raw) != file.tell() + 2 * count:
            raise ValueError(f"{MEMBER}: {len(raw)} bytes instead of {file.tell() + 2 * count}: it was cut or added to")
        latents = np.frombuffer(raw, np.float16, count, file.tell()).reshape(shape)
        if not np.isfinite(latents).all():
            raise ValueError(f"{MEMBER}: holds what is no finite number")
        return {"latents": latents}

    def collate(self, items: Sequence[dict[str, np.ndarray]]) -> tuple[Tensor, None]:
        """float16 `[B, C, H, W]`."""
        return torch.from_numpy(np.stack([item["latents"] for item in items])), None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
