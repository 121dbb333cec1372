"""The model that is to come with mm, `mm.load("openmoji")`: both objectives on OpenMoji at 64 px, on two CPU cores.

    mm shards openmoji shards/openmoji
    mm train configs/openmoji.py --data.train "shards/openmoji/train-*.tar" --data.val "shards/openmoji/dev-*.tar"
    mm release runs/openmoji OUT

The sizes of `tiny`, but for pictures of 64 px: the vision encoder sees patches of 16, and costs what it costs at 32 px
with patches of 8; the denoiser draws patches of 8. Aliases stand in for names at times.
Planned for two and a half hours. Stopped and started again with the same command, it goes on where it
was. On a GPU the same command trains there.
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
    model.image.size, model.image.patch = 64, 16
    model.image.crop_scale, model.image.color_jitter = 0.9, 0.05
    return TrainConfig(
        run=RunConfig(dir="runs/openmoji", steps=3000, log_every=5, sample_every=300, eval_every=300),
        data=DataConfig(batch_size=384, caption="txt=0.8,json.aliases=0.2"),
        model=model,
        objectives=ObjectivesConfig(
            contrastive=ContrastiveConfig(init_scale=10.0),
            diffusion=DiffusionConfig(share=0.5),
        ),
        optim=OptimConfig(name="muon", lr=1e-3, muon_steps=3, warmup=40),
        checkpoint=CheckpointConfig(every=50, keep=2),
    )
