"""CLIP ViT-L/14 and an MMDiT denoiser of 600 M parameters on DataComp-1B, both objectives, sharded within machines.

    sbatch --nodes 128 tools/slurm/train.sbatch configs/vit_l14_mmdit_600m_datacomp.py

Data: DataComp-1B as its download tool (img2dataset) writes it, tars of jpg, txt and json, 1.4 billion pairs.
Recipe of the encoders: DataComp's for this model and 12.8 billion samples (arXiv 2304.14108, `xlarge` of
scale_configs.py in its repository): batch 90,112, AdamW 1e-3, betas (0.9, 0.95), 10,000 steps of warm-up, cosine;
weight decay 0.2 as CLIP. Of the denoiser: 16 blocks of width 1024, all but the last of which update a text stream of
their own (MMDiT, arXiv 2403.03206); what it predicts and the noise are JiT's (arXiv 2511.13720). Half of a batch is
drawn from. That both recipes go together is untried: a place to start, not a result.
Parallel: weights, gradients and optimizer state shared by the 8 GPUs of a machine, whole copies across machines (FSDP2,
hybrid); products of matrices are kept for the backward pass, the rest is computed again.

Costs, as `mm plan configs/vit_l14_mmdit_600m_datacomp.py --gpus 1024 --gpu h100` says: 30 GB of 80 a GPU, 0.29 days,
7,207 GPU-hours. A plan, not a measurement: it assumes 40 % of the peak rate, captions as long as the context, eager
blocks, and data workers that bring 493 samples/s a GPU.
"""

from __future__ import annotations

from mm.config import (
    CheckpointConfig,
    ContrastiveConfig,
    DataConfig,
    DiffusionConfig,
    ObjectivesConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mm.models.presets import vit_l14


def config() -> TrainConfig:
    model = vit_l14()
    assert model.denoiser is not None
    model.denoiser.depth, model.denoiser.context_depth = 16, 15
    model.image.crop_scale, model.image.color_jitter = 0.9, 0.0
    return TrainConfig(
        run=RunConfig(dir="runs/vit_l14_mmdit_600m_datacomp", steps=142_046, log_every=10, diagnose_every=1000),
        data=DataConfig(train="shards/datacomp_1b/*.tar", caption="txt", batch_size=90_112, workers=12),
        model=model,
        objectives=ObjectivesConfig(
            contrastive=ContrastiveConfig(init_scale=1 / 0.07), diffusion=DiffusionConfig(share=0.5)
        ),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.2, warmup=10_000, final=0.0, ema=0.9999),
        parallel=ParallelConfig(strategy="hybrid", shard=8, activation_checkpointing="selective"),
        checkpoint=CheckpointConfig(every=1000, minutes=15.0, keep=3, keep_every=20_000),
    )
