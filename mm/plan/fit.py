"""Whether a step fits into a GPU, and if not, the first change of settings with which it does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mm.config import ConfigError

if TYPE_CHECKING:
    from mm.config import TrainConfig
    from mm.plan.hardware import Gpu
    from mm.plan.simulate import Step

USABLE = 0.9  # of the memory: the rest is left to driver, communication library, workspaces and fragments
MOST = 8  # times as many micro-batches, and GPUs, are tried

Simulate = Callable[["TrainConfig", int], "Step"]


@dataclass(frozen=True)
class Fix:
    """Settings that were changed, in the order in which they were tried, and the step that they make."""

    changes: dict[str, str]
    gpus: int
    config: TrainConfig
    step: Step
    fits: bool


def fits(step: Step, gpu: Gpu) -> bool:
    """Whether the planned peak is within what can be used of the GPU's memory."""
    return step.peak <= USABLE * gpu.memory * 1e9


def first_fix(
    config: TrainConfig,
    gpus: int,
    gpu: Gpu,
    step: Step,
    simulate: Simulate,
    tell: Callable[[str], None] = lambda _: None,
) -> Fix | None:
    """Changes are made one after another and each is planned; the first plan that fits ends it.

    In this order: activation checkpointing (selective, full), sharding (within machines, over all ranks), gathered
    weights freed after the forward, smaller micro-batches, more GPUs for the same batch. A change that saves nothing
    is taken back; `tell` hears of each, for it takes seconds. None where there is nothing to change; the last plan,
    with `fits` False, where none of them fits.
    """
    best = Fix({}, gpus, config, step, False)
    for change in _changes(config, gpus):
        trial = copy.deepcopy(best.config)
        name, value, ranks = change
        if name != "--gpus":
            section, _, field = name.partition(".")
            setattr(getattr(trial, section), field, value)
        if name == "parallel.activation_checkpointing" and _without_activations(best.step) > USABLE * gpu.memory * 1e9:
            continue  # what is not activations is too much already
        tell(f"does not fit; trying {name} = {value}")
        try:
            found = simulate(trial, ranks)
        except ConfigError:  # a batch that does not come out even, or groups that do not
            continue
        if found.peak < 0.99 * best.step.peak:
            best = Fix(best.changes | {name: str(value)}, ranks, trial, found, fits(found, gpu))
        if best.fits:
            break
    return best if best.changes else None


def _changes(config: TrainConfig, gpus: int) -> Iterator[tuple[str, str | int | bool, int]]:
    """Field, value and number of GPUs of every change that is not in the config yet."""
    parallel = config.parallel
    levels = ["none", "selective", "full"]
    for level in levels[levels.index(parallel.activation_checkpointing) + 1 :]:
        yield "parallel.activation_checkpointing", level, gpus
    strategies = ["ddp", "hybrid", "fsdp"]
    for strategy in strategies[strategies.index(parallel.strategy) + 1 :] if gpus > 1 else []:
        yield "parallel.strategy", strategy, gpus
    if not parallel.reshard:
        yield "parallel.reshard", True, gpus
    accumulate = config.optim.accumulate
    for factor in (2, 4, MOST):
        yield "optim.accumulate", factor * accumulate, gpus
    for factor in (2, 4, MOST):
        yield "--gpus", factor * gpus, factor * gpus


def _without_activations(step: Step) -> int:
    return step.peak - step.memory["activations"] - step.memory["temporary"]
