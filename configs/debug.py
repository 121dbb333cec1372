"""The tiniest model, float32, for tests and for finding out whether a machine works at all.

    mm train configs/debug.py --data.train SHARDS

Costs a few seconds on one CPU core. Its losses fall a little in 20 steps and mean nothing.
"""

from __future__ import annotations

from mm.config import (
    CheckpointConfig,
    DataConfig,
    DenoiserConfig,
    ImageConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TextConfig,
    TrainConfig,
)


def config() -> TrainConfig:
    return TrainConfig(
        run=RunConfig(dir="runs/debug", steps=20, log_every=1),
        data=DataConfig(batch_size=16),
        model=ModelConfig(
            embed_dim=32,
            image=ImageConfig(size=32, patch=8, width=64, depth=2, heads=2),
            text=TextConfig(vocab_size=512, context_length=16, width=64, depth=1, heads=2),
            denoiser=DenoiserConfig(patch=8, width=64, depth=2, heads=2),
        ),
        optim=OptimConfig(warmup=5),
        parallel=ParallelConfig(device="cpu", precision="fp32", compile=False),
        checkpoint=CheckpointConfig(every=5, keep=3),
    )
