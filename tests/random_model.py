"""The tiniest model with random weights, as `mm.load` gives it, and pictures to show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mm
from mm.adapters.text import train_tokenizer
from mm.api import LoadedModel
from mm.config import TrainConfig
from mm.models.export import save_export
from mm.objectives.step import build_step
from mm.settings import load as load_config

WORDS = ["red heart", "blue heart", "cat face", "a dog that runs", "flag", "the sun behind a small cloud", "", "x y z"]


def tiny(root: Path) -> TrainConfig:
    return load_config(root / "configs" / "debug.py")


def save_random(folder: Path, config: TrainConfig) -> Path:
    """A run folder's export; what starts at zero is filled in, or nothing would depend on anything."""
    torch.manual_seed(0)
    step = build_step(config, train_tokenizer(WORDS * 4, config.model.text.vocab_size))
    with torch.no_grad():
        for parameter in step.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    save_export(folder / "export", step.state_dict(), config, step.model.tokenizer.to_json(), {"step": "7"})
    return folder


def load_random(folder: Path, config: TrainConfig) -> LoadedModel:
    return mm.load(str(save_random(folder, config)), device="cpu")


def pictures(count: int, size: int = 40) -> list[Image.Image]:
    pixels = np.random.default_rng(3).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]
