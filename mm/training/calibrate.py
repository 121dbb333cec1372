"""What a run measures before it begins: the FLOPs of a step, and how many steps fit into a time budget."""

from __future__ import annotations

import itertools
import time
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from mm.distributed.device import autocast
from mm.objectives.step import watched
from mm.training.progress import say

if TYPE_CHECKING:
    from mm.config import TrainConfig
    from mm.data.loader import Loader
    from mm.objectives.step import TrainStep
    from mm.training.trainer import Trainer
    from mm.types import Batch

CALIBRATION_STEPS = 5
DIAGNOSED = 64  # samples whose gradients are compared
FEW = 8  # samples whose FLOPs stand for those of a batch that may not fit
RESERVE = 0.02  # share of a time budget kept for checkpoints and the last evaluation


def count_flops(step: TrainStep, loader: Loader, config: TrainConfig, device: torch.device) -> tuple[int, bool]:
    """FLOPs of one step's forward and backward in this process, counted by torch over a real batch.

    Also whether some parameter got no gradient. Of one micro-batch or a few samples, times their number: what is
    computed a second time is not work that a step needs. Leaves no gradient behind.
    """
    batch = next(iter(loader)).to(device)
    part = batch.split(len(batch) // config.optim.accumulate)[0]
    if config.parallel.strategy != "ddp" or config.parallel.activation_checkpointing != "none":
        part = part.split(FEW)[0]  # more may fit only once it is sharded, or computed twice
    with watched(step), FlopCounterMode(display=False) as counter:
        step.backward(part, 1, lambda: autocast(config.parallel, device))
    unused = any(p.grad is None for p in step.parameters() if p.requires_grad)
    step.zero_grad()
    return counter.get_total_flops() * len(batch) // len(part), unused


def warm_up(trainer: Trainer) -> None:
    """One step's gradients, dropped: DDP lays out its buckets after the first, and sums in another order since.

    Without it the first step after a resume would not be bit for bit the one that it repeats.
    """
    batch = next(iter(trainer.loader)).to(trainer.device)
    parallel = trainer.parallel
    trainer.step_module.backward(
        batch, trainer.config.optim.accumulate, trainer.autocast, parallel.forward, parallel.sync
    )
    trainer.step_module.zero_grad()


def steps_within(trainer: Trainer, budget: float, started: float) -> int:
    """How many steps fit into what is left of `budget` seconds, from timing a few that change nothing."""
    seconds = []
    start = time.perf_counter()
    for batch in itertools.islice(trainer.loader, CALIBRATION_STEPS + 1):
        with watched(trainer.step_module):
            trainer.iterate(batch.to(trainer.device), factor=0.0)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    each = median(seconds[1:])  # the first one compiles
    if trainer.config.run.diagnose_every:
        diagnose(trainer, batch)
        each += (time.perf_counter() - start) / trainer.config.run.diagnose_every
    trainer.optimizers.reset()
    left = budget * (1 - RESERVE) - (time.perf_counter() - started)
    steps = max(1, int(left / each))
    rest = f"the {left:.0f} s that are left" if left > 0 else "no time is left"
    say(f"{each:.2f} s a step: {steps} step{'' if steps == 1 else 's'}, {rest} of {budget:.0f}")
    return steps


def diagnose(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Norms and cosines of the objectives' gradients on the encoders, over the first samples of a batch.

    Eager: it walks one graph several times, which compiled code does not allow.
    """
    with torch.compiler.set_stance("force_eager"), trainer.autocast():
        return trainer.step_module.diagnose(batch.split(DIAGNOSED)[0])
