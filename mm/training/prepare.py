"""What comes before the first step, of a new run or of one that is resumed: tokenizer, model, data, parallelism."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from mm.adaptation import apply
from mm.adapters.text import Tokenizer, tokenizer_from_json
from mm.config import TrainConfig
from mm.data.buckets import aspect_shapes
from mm.data.loader import Loader
from mm.data.sources import Access, corpus
from mm.distributed.device import pick_device
from mm.distributed.parallelize import parallelize
from mm.distributed.world import World
from mm.objectives.step import TrainStep, build_step
from mm.rules import drawn_patch
from mm.training import run_folder
from mm.training.calibrate import count_flops, warm_up
from mm.training.latents import start_latents
from mm.training.metrics import matrix_rate
from mm.training.progress import say
from mm.training.trainer import Callback, Trainer


class Start(Protocol):
    """Weights, and perhaps a tokenizer, that a run begins with."""

    tokenizer: Tokenizer | None
    gone: str  # why it has no weights any more, where it has none

    def fill(self, step: TrainStep) -> list[str]:
        """Put the weights in place; what was done, a line each. Raises ConfigError where they do not fit."""


def prepare(config: TrainConfig, callbacks: Sequence[Callback], world: World, start: Start | None = None) -> Trainer:
    """A trainer before its first step. Raises ConfigError for a folder of another run."""
    folder, data = Path(config.run.dir), config.data
    if world.lead(lambda: run_folder.saved_config(folder)) is not None:
        world.lead(lambda: run_folder.claim(folder, config))  # refuse another run's folder before anything is built
    device = pick_device(config.parallel)
    access = Access(data.fetch_gb, data.stall_seconds)
    tokenizer = tokenizer_from_json(
        world.lead(
            lambda: run_folder.tokenizer_of(
                folder, config, lambda: corpus(data.train, data.caption, access), start.tokenizer if start else None
            ).to_json()
        )
    )
    torch.manual_seed(config.run.seed)
    step_module = build_step(config, tokenizer)
    filled = start.fill(step_module) if start is not None else []
    step_module = step_module.to(device)
    start_latents(step_module.model, config, world)
    apply(step_module, config.adapt)
    loader = world.in_turn(lambda: _loader(config, step_module, world, device))
    flops, unused = count_flops(step_module, loader, config, device)
    parallel = parallelize(step_module, config.parallel, world, device, unused)
    trainer = Trainer(config, parallel, loader, device, world, callbacks, flops=flops)
    trainer.peak = matrix_rate(device, torch.float32 if config.parallel.precision == "fp32" else torch.bfloat16)
    parameters = sum(p.numel() for p in step_module.parameters())
    trained = sum(p.numel() for p in step_module.parameters() if p.requires_grad)
    part = f" ({trained / 1e6:.1f} M trained)" if trained < parameters else ""
    gflop = flops * world.size / 1e9
    lines = [
        f"{parameters / 1e6:.1f} M parameters{part}, {tokenizer.vocab_size} text tokens, {loader.samples} samples, "
        f"{gflop:,.{0 if gflop >= 10 else 2}f} GFLOP a step; this machine: {trainer.peak / 1e9:.0f} GFLOP/s "
        f"in {config.parallel.precision} matrix products on {device.type}",
        *filled,
        *_doubts(config),
        *parallel.said,
    ]
    for line in lines if world.main else []:
        say(line)
    if parallel.wrapper is not None:
        warm_up(trainer)
    return trainer


def _doubts(config: TrainConfig) -> list[str]:
    """What is allowed and hardly ever meant."""
    start = config.start
    return [
        f"adapt.{part} = {mode}: what does not train there is random, as neither start.{part} nor start.model is set"
        for part in ("image", "text", "denoiser")
        if (mode := getattr(config.adapt, part)) != "all" and not (getattr(start, part) or start.model)
    ]


def _loader(config: TrainConfig, step_module: TrainStep, world: World, device: torch.device) -> Loader:
    data = config.data
    processors = step_module.model.processors(train=True)
    if "latents" in processors and config.objectives.align is None:  # nothing else looks at the whole picture
        processors.pop("target", None)
    return Loader(
        data.train,
        processors,
        batch_size=data.batch_size,
        seed=config.run.seed,
        train=True,
        workers=data.workers,
        rank=world.rank,
        world=world.size,
        shuffle_block=data.shuffle_block,
        caption=data.caption,
        weights=data.weights,
        buckets=data.buckets,
        shapes=_shapes(config) if data.buckets == "aspect" else (),
        max_error_rate=data.max_error_rate,
        max_consecutive_errors=data.max_consecutive_errors,
        buffer_mb=data.buffer_mb,
        cache_mb=data.cache_mb,
        fetch_gb=data.fetch_gb,
        stall_seconds=data.stall_seconds,
        ahead=device.type != "cpu",
    )


def _shapes(config: TrainConfig) -> list[tuple[int, int]]:
    """The picture shapes of aspect buckets: sides that both the vision encoder and the denoiser can cut in patches."""
    image = config.model.image
    return aspect_shapes(image.size, math.lcm(image.patch, drawn_patch(config.model)), config.data.shapes)
