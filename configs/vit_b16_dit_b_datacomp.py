"""CLIP ViT-B/16 and a denoiser of DiT-B's shape on DataComp-1B, both objectives on one pair of encoders.

    sbatch --nodes 32 tools/slurm/train.sbatch configs/vit_b16_dit_b_datacomp.py

Data: DataComp-1B as its download tool (img2dataset) writes it, tars of jpg, txt and json, 1.4 billion pairs.
Recipe of the encoders: DataComp's for 12.8 billion samples (arXiv 2304.14108, `xlarge` of scale_configs.py in its
repository): batch 90,112, AdamW 1e-3, betas (0.9, 0.95), 10,000 steps of warm-up, cosine; weight decay 0.2 as CLIP.
Of the denoiser: JiT's (arXiv 2511.13720): the clean picture predicted, patches through a bottleneck of 128, logit-
normal noise levels (0.8, 0.8), text hidden with probability 0.1, weights averaged at 0.9999; 12 blocks of width 768 as
DiT-B (arXiv 2212.09748), which read the text without a stream of its own. Half of a batch is drawn from. That both
recipes go together is untried: a place to start, not a result.

Costs, as `mm plan configs/vit_b16_dit_b_datacomp.py --gpus 256 --gpu h100` says: 56 GB of 80 a GPU, 0.29 days,
1,752 GPU-hours. A plan, not a measurement: it assumes 40 % of the peak rate, captions as long as the context, eager
blocks, and data workers that bring 2,029 samples/s a GPU.
"""

from __future__ import annotations

from mm.config import (
    CheckpointConfig,
    ContrastiveConfig,
    DataConfig,
    DiffusionConfig,
    ObjectivesConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from mm.models.presets import vit_b16


def config() -> TrainConfig:
    model = vit_b16()
    assert model.denoiser is not None
    model.denoiser.context_depth = 0
    model.image.crop_scale, model.image.color_jitter = 0.9, 0.0
    return TrainConfig(
        run=RunConfig(dir="runs/vit_b16_dit_b_datacomp", steps=142_046, log_every=10, diagnose_every=1000),
        data=DataConfig(train="shards/datacomp_1b/*.tar", caption="txt", batch_size=90_112, workers=12),
        model=model,
        objectives=ObjectivesConfig(
            contrastive=ContrastiveConfig(init_scale=1 / 0.07), diffusion=DiffusionConfig(share=0.5)
        ),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.2, warmup=10_000, final=0.0, ema=0.9999),
        checkpoint=CheckpointConfig(every=2000, minutes=15.0, keep=3, keep_every=20_000),
    )
