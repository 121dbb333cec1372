"""SoViT-400m/16 and a text tower of its shape, sigmoid loss, pictures in their own aspect ratio.

    sbatch --nodes 64 tools/slurm/train.sbatch configs/siglip_so400m_naflex.py

Data: DataComp-1B as its download tool (img2dataset) writes it, tars of jpg, txt and json with the width and height of
each picture, which `mm shards index` enters into the sidecars: batches are grouped by aspect ratio.
Recipe: SigLIP 2's (arXiv 2502.14786): batch 32k, 40 billion samples, 20,000 steps of warm-up, cosine, learning rate
1e-3, weight decay 1e-4, gradients clipped at 1, captions of 64 tokens; betas (0.9, 0.95) and the logit's scale of 10
and bias of -10 to begin with are SigLIP's (arXiv 2303.15343).
What differs from SigLIP 2: the mean over patches where it has an attention head (MAP) of 15 M parameters; q and k are
normalised; a vocabulary of 32,000 fitted to the captions, where it has Gemma's 256,000; padding is not attended to; the
sigmoid loss alone, without its decoder, self-distillation and masked prediction; English data. What differs from its
NaFlex: seven shapes of at most 256 patches from 1:2 to 2:1 instead of any shape, one budget of patches instead of
several, and from the first step instead of adapted at the end.

Costs, as `mm plan configs/siglip_so400m_naflex.py --gpus 512 --gpu h100` says: 29 GB of 80 a GPU, 1.98 days,
24,382 GPU-hours. A plan, not a measurement: it assumes 40 % of the peak rate, captions as long as the context, eager
blocks, and data workers that bring 456 samples/s a GPU.
"""

from __future__ import annotations

from mm.config import (
    CheckpointConfig,
    ContrastiveConfig,
    DataConfig,
    ObjectivesConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mm.models.presets import so400m


def config() -> TrainConfig:
    model = so400m()
    model.image.crop_scale, model.image.color_jitter = 1.0, 0.0
    return TrainConfig(
        run=RunConfig(dir="runs/siglip_so400m_naflex", steps=1_220_704, log_every=50),
        data=DataConfig(
            train="shards/datacomp_1b/*.tar", caption="txt", batch_size=32_768, workers=12, buckets="aspect", shapes=7
        ),
        model=model,
        objectives=ObjectivesConfig(
            contrastive=ContrastiveConfig(kind="sigmoid", init_scale=10.0, init_bias=-10.0, max_scale=1000.0),
            diffusion=None,
        ),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4, warmup=20_000, final=0.0, ema=0.9999),
        parallel=ParallelConfig(strategy="hybrid", shard=8),
        checkpoint=CheckpointConfig(every=2000, minutes=15.0, keep=3, keep_every=50_000),
    )
