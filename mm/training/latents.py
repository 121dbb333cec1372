"""What a run that draws in an autoencoder's latents needs before it starts: its weights, and latents made by it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from mm.adapters.autoencoder_files import latents_weights
from mm.config import ConfigError
from mm.data.latents import made_by
from mm.training.manifest import last_step
from mm.training.progress import say

if TYPE_CHECKING:
    from mm.adapters.autoencoder import AutoencoderSpace
    from mm.config import TrainConfig
    from mm.distributed.world import World
    from mm.models.model import Model


def start_latents(model: Model, config: TrainConfig, world: World) -> None:
    """Loads the autoencoder's weights, unless `start` has, and compares it with the one that made cached latents.

    A run that has a checkpoint has them from there, and their source may be gone. Raises ConfigError where they are not
    to be had or are of another autoencoder, or the shards were made by another.
    """
    latents = config.model.latents
    if latents is None:
        return
    space = cast("AutoencoderSpace", model.latents)
    if not space.loaded:
        resumes = world.lead(lambda: last_step(Path(config.run.dir))) > 0
        try:
            weights = world.in_turn(lambda: latents_weights(latents.source))  # the first one may have to fetch them
        except ConfigError as error:
            if resumes:
                return
            raise ConfigError(f"model.latents.source = {error}") from error
        space.load(weights, latents.source)
    if not latents.cached:
        return
    unsaid = made_by(config.data.train, space.about())
    if unsaid and world.main:
        say(f"model.latents.cached: {len(unsaid)} shards ({unsaid[0]}, ...) do not say which autoencoder made theirs")
