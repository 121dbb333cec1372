"""The demo: both objectives on OpenMoji, 32 px, on two CPU cores.

    mm demo                                             everything, the steps chosen to fit eight minutes
    mm train configs/demo.py --data.train "SHARDS/train-*.tar"

Costs about eight minutes and 2 GB. What it reaches, over three seeds: benchmarks/demo.json.
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
    return TrainConfig(
        run=RunConfig(dir="runs/demo", steps=340, log_every=1, diagnose_every=50),
        data=DataConfig(batch_size=128),
        model=model,
        objectives=ObjectivesConfig(
            contrastive=ContrastiveConfig(init_scale=25.0),
            diffusion=DiffusionConfig(),
        ),
        optim=OptimConfig(name="muon", lr=2e-3, muon_steps=3, warmup=40),
        checkpoint=CheckpointConfig(every=100, keep=2),
    )
