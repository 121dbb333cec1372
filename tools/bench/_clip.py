"""An open_clip model with seeded random weights, in memory and as a file that both sides read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from _common import cache_folder

if TYPE_CHECKING:
    from torch import nn

NAME = "ViT-S-32-alt"


def open_clip_model(name: str) -> nn.Module:
    """Freshly initialised from seed 0, in training mode."""
    import open_clip
    import torch

    torch.manual_seed(0)
    return open_clip.create_model(name).train()


def save_weights(model: nn.Module, file: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)


def clip_weights(name: str = NAME) -> Path:
    """Written by open_clip once, and kept in the user's cache."""
    file = cache_folder("bench", f"{name}-random.safetensors")
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        save_weights(open_clip_model(name), part)
        part.rename(file)
    return file
