"""CLIP ViT-B/32 on CC12M, contrastive only: the run that others' figures can be compared with.

    torchrun --nproc-per-node 8 -m mm.train configs/vit_b32_cc12m.py --data.train "shards/cc12m/{00000..01242}.tar"
    sbatch --nodes 1 tools/slurm/train.sbatch configs/vit_b32_cc12m.py

Data: CC12M as img2dataset writes it, tars of jpg, txt and json. 10,968,539 pairs, which is what the copy that others
train on has, are 32 epochs in these steps.
Recipe: open_clip's settings for CLIP, AdamW 1e-3, weight decay 0.1, betas (0.9, 0.98), cosine; batch 8,192 with 2,000
steps of warm-up. No run of it has been made here.

Costs, as `mm plan configs/vit_b32_cc12m.py --gpus 8 --gpu h100` says: 42 GB of 80 a GPU, 0.06 days,
11 GPU-hours. A plan, not a measurement: it assumes 40 % of the peak rate, captions as long as the context, eager
blocks, and data workers that bring 8,757 samples/s a GPU.
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
