"""mm's model with the weights of one of open_clip's; captions of real lengths; a batch in memory."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import torch
from _clip import save_weights
from torch import Tensor, nn

from mm.adapters.text import ClipTokenizer
from mm.config import DiffusionConfig, TrainConfig
from mm.interop.start import resolve
from mm.objectives.step import TrainStep, build_step
from mm.types import Batch


def same_in_mm(name: str, peer: nn.Module, diffusion: DiffusionConfig | None = None, **parts: object) -> TrainStep:
    """mm's training step with the weights of `peer`; `parts` of the model's config, such as a denoiser."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "clip.safetensors")
        save_weights(peer, file)
        config = TrainConfig()
        config.objectives.diffusion = diffusion
        config.start.model = f"open_clip:{name}@{file}"
        config.model.denoiser = None
        start = resolve(config)
        for part, value in parts.items():
            setattr(config.model, part, value)
        torch.manual_seed(0)
        step = build_step(config, start.tokenizer)
        start.fill(step)
    return step.train()


def captions(count: int) -> list[str]:
    """Names of emoji in CLIP's 80 templates: 13 to 14 of its tokens on average, with the first and the last."""
    import emoji
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    draw = random.Random(0)
    entries = sorted(data["en"] for data in emoji.EMOJI_DATA.values() if data["status"] == 2)
    names = [name.strip(":").replace("_", " ") for name in draw.sample(entries, count)]
    return [draw.choice(OPENAI_IMAGENET_TEMPLATES)(name) for name in names]


def batch_in_memory(texts: list[str], size: int = 224, context: int = 77) -> tuple[Batch, Tensor, Tensor]:
    """mm's batch of noise pictures and `texts`; and for open_clip the normalised pictures and the padded ids."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(texts), 3, size, size), dtype=torch.uint8, generator=generator)
    tokenizer = ClipTokenizer()
    rows = [tokenizer.encode(text)[:context] for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(texts), context, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    normal = (pixels / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    batch = Batch({"image": pixels, "text": ids}, {"text": lengths}, torch.arange(len(texts)), [])
    return batch, normal, ids
