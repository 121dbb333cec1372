"""Small models in other libraries' formats, randomly initialised, so that a swapped bias would show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VISION: dict[str, Any] = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2}


def randomised(model: torch.nn.Module, seed: int = 0, amount: float = 0.05) -> torch.nn.Module:
    """Every parameter moved by noise, and every running statistic."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if "running_" in name:
                buffer.add_(amount * torch.rand(buffer.shape, generator=generator))
    return model.eval()


def tiny_clip(folder: Path, *, seed: int = 0, embed_dim: int = 32, **changes: Any) -> tuple[torch.nn.Module, str]:
    """An open_clip model written to `folder` as open_clip writes it, and its name for `mm.load`.

    `changes`: `vision`, `text` (fields of the towers), and fields of the model itself.
    """
    import open_clip

    vision, text = {**VISION, **changes.pop("vision", {})}, {**TEXT, **changes.pop("text", {})}
    cfg = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    model = randomised(open_clip.create_model(f"local-dir:{folder}", load_weights=False), seed)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return model, f"open_clip:local-dir:{folder}"
