"""The demo: both objectives on OpenMoji, 32 px, on two CPU cores.

    mm demo                                             everything, the steps chosen to fit eight minutes
    mm train configs/demo.py --data.train "SHARDS/train-*.tar"

Costs about eight minutes and under 3 GB. What it reaches, over three seeds: benchmarks/demo.json.
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
from mm.models.presets import tiny


def config() -> TrainConfig:
    model = tiny()
    model.image.crop_scale, model.image.color_jitter = 0.9, 0.05  # more would under-fit in so few epochs
    return TrainConfig(
        run=RunConfig(dir="runs/demo", steps=240, log_every=1, diagnose_every=50),
        data=DataConfig(batch_size=384),
        model=model,
        objectives=ObjectivesConfig(
            contrastive=ContrastiveConfig(init_scale=10.0),
            diffusion=DiffusionConfig(share=0.5),
        ),
        optim=OptimConfig(name="muon", lr=1e-3, muon_steps=3, warmup=40),
        checkpoint=CheckpointConfig(every=100, keep=2),
    )
