"""What ranks send each other in a step, and how long a step takes by the roofline of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mm.plan.hardware import GPUS_PER_MACHINE

if TYPE_CHECKING:
    from mm.config import TrainConfig
    from mm.plan.hardware import Gpu
    from mm.plan.simulate import Step

# Float32 numbers read and written an updated parameter: clipping reads the gradient for its norm and scales it (3),
# AdamW reads parameter, gradient and two moments and writes all but the gradient (7), the average takes 3.
STATE_PASSES = 13


@dataclass(frozen=True)
class Collective:
    """Bytes that one rank sends in a step, over which wire, and whether computing goes on meanwhile."""

    what: str
    size: int
    machine: bool  # within a machine; otherwise over the network
    hidden: bool

    def seconds(self, gpu: Gpu) -> float:
        """By bandwidth alone: latencies, which grow with the number of ranks, are not in it."""
        return self.size / 1e9 / (gpu.link if self.machine else gpu.network)


def collectives(config: TrainConfig, step: Step) -> list[Collective]:
    """Every collective of one step, as rings send it: (n - 1) / n of the whole a rank, twice for an all-reduce."""
    layout, found = step.layout, []

    def add(what: str, whole: float, ranks: int, inside: bool, hidden: bool = True, passes: int = 1) -> None:
        if ranks > 1 and whole:
            found.append(Collective(what, round(passes * whole * (ranks - 1) / ranks), inside, hidden))

    inside = layout.shard <= GPUS_PER_MACHINE
    add("all-gather parameters", step.traffic.get("all_gather", 0), layout.shard, inside)
    add("reduce-scatter gradients", step.traffic.get("reduce_scatter", 0), layout.shard, inside)
    small = layout.gpus <= GPUS_PER_MACHINE
    add("all-reduce gradients", 4 * step.trained / layout.shard, layout.copies, small, passes=2)
    if config.objectives.contrastive is not None:  # float32 vectors of both modalities; before the loss, nothing to do
        embeddings = 2 * 4 * config.model.embed_dim * config.data.batch_size
        add("all-gather embeddings", embeddings, layout.gpus, small, hidden=False)
        if config.objectives.contrastive.kind == "softmax":  # the log-sum-exp of columns, its maximum first
            add("all-reduce log-sum-exp", 2 * 4 * config.data.batch_size, layout.gpus, small, hidden=False, passes=2)
    return found


@dataclass(frozen=True)
class Time:
    """Seconds of a step's parts. Traffic that is hidden costs what computing does not cover."""

    compute: float
    update: float
    hidden: float
    exposed: float

    @property
    def step(self) -> float:
        return max(self.compute, self.hidden) + self.exposed + self.update


def step_time(config: TrainConfig, step: Step, gpu: Gpu, efficiency: float) -> Time:
    """Computing at `efficiency` of the peak rate, the update at the memory's bandwidth, traffic at the wire's."""
    peak = gpu.fp32 if config.parallel.precision == "fp32" else gpu.bf16
    flops = step.forward + step.backward + step.recompute
    sent = collectives(config, step)
    return Time(
        compute=flops / (peak * 1e12 * efficiency),
        update=STATE_PASSES * 4 * step.local / (gpu.bandwidth * 1e9),
        hidden=sum(c.seconds(gpu) for c in sent if c.hidden),
        exposed=sum(c.seconds(gpu) for c in sent if not c.hidden),
    )
