"""CLIP ViT-B/32 on CC12M, contrastive only: the run that others' figures can be compared with.

    torchrun --nproc-per-node 8 -m mm.train configs/vit_b32_cc12m.py --data.train "shards/cc12m/{00000..01242}.tar"
    sbatch --nodes 1 tools/slurm/train.sbatch configs/vit_b32_cc12m.py

Data: CC12M as img2dataset writes it, tars of jpg, txt and json; 10,968,539 pairs could be fetched when the public
WebDataset copy of it was made, and with as many this is 32 epochs. With --data.caption "json.long_caption" or a mixture
other captions are used.
Recipe: open_clip's for this pair of model and data: batch 8,192, AdamW 1e-3, weight decay 0.1, betas (0.9, 0.98),
2,000 steps of warm-up, cosine. open_clip reports 25.0 % zero-shot on ImageNet at this batch size.
COST
"""

from __future__ import annotations

from mm.config import (
    CheckpointConfig,
    ContrastiveConfig,
    DataConfig,
    ObjectivesConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from mm.models.presets import vit_b32


def config() -> TrainConfig:
    model = vit_b32()
    model.denoiser = None
    model.image.crop_scale, model.image.color_jitter = 0.9, 0.0
    return TrainConfig(
        run=RunConfig(dir="runs/vit_b32_cc12m", steps=42_846, log_every=10),
        data=DataConfig(train="shards/cc12m/*.tar", caption="txt", batch_size=8192, workers=12),
        model=model,
        objectives=ObjectivesConfig(contrastive=ContrastiveConfig(init_scale=1 / 0.07), diffusion=None),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1, warmup=2000, final=0.0, ema=0.9999),
        checkpoint=CheckpointConfig(every=2000, minutes=15.0, keep=3, keep_every=10_000),
    )
