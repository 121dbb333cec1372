"""A toy modality: four numbers, a token each."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import nn

from mm import config as settings
from mm.adapters.base import Adapter, Processor
from mm.adapters.text import train_tokenizer
from mm.config import ModalityConfig, TrainConfig
from mm.objectives.step import TrainStep, build_step
from mm.types import Batch, Tokens
from runs import ROOT

CAPTIONS = ["red heart", "blue heart", "cat face", "dog", "flag of France", "book", "green book", "smiling cat"]


class Numbers(Processor):
    source = "numbers.txt"

    def collate(self, items: Any) -> tuple[torch.Tensor, None]:
        return torch.from_numpy(np.stack([item["x"] for item in items])), None


class Line(Adapter):
    def __init__(self, config: ModalityConfig):
        super().__init__(config.name, Numbers())
        self.proj = nn.Linear(1, json.loads(config.options).get("width", config.width))

    def embed(self, batch: Batch) -> Tokens:
        x = self.proj(batch.inputs[self.name][..., None])
        return Tokens(x, max_len=x.shape[1])


LINE = ModalityConfig(name="line", adapter="modality_line:Line", width=32, depth=1, heads=2)


def tiny(pairs: str = "all", *modalities: ModalityConfig, kind: Any = "softmax") -> TrainConfig:
    config = settings.load(ROOT / "configs/debug.py")
    config.model.modalities = modalities
    assert config.objectives.contrastive
    config.objectives.contrastive.pairs, config.objectives.contrastive.kind = pairs, kind
    return config


def build(config: TrainConfig) -> TrainStep:
    torch.manual_seed(0)
    return build_step(config, train_tokenizer(CAPTIONS, 400))


def make_batch(step: TrainStep) -> Batch:
    generator = torch.Generator().manual_seed(1)
    text = step.model.processors(train=False)["text"]
    ids, lengths = text.collate([text.prepare(caption, train=False) for caption in CAPTIONS])
    assert lengths is not None
    image = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    inputs = {"image": image, "text": ids, "target": image, "line": torch.randn(8, 4, generator=generator)}
    return Batch(inputs, {"text": lengths}, torch.arange(8), [str(i) for i in range(8)])
