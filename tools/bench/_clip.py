"""An open_clip model with seeded random weights, as a file that both sides read."""

from __future__ import annotations

from pathlib import Path

from _common import cache_folder

NAME = "ViT-S-32-alt"


def clip_weights(name: str = NAME) -> Path:
    """Written by open_clip once, and kept in the user's cache."""
    file = cache_folder("bench", f"{name}-random.safetensors")
    if not file.is_file():
        import open_clip
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(0)
        state = open_clip.create_model(name).state_dict()
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, part)
        part.rename(file)
    return file
