"""A plan: everything that is known of a run before it is started, as numbers and as one screen of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

from mm.plan.fit import USABLE, Fix, first_fix, fits
from mm.plan.hardware import GPUS_PER_MACHINE, gpu
from mm.plan.simulate import simulate
from mm.plan.traffic import Collective, Time, collectives, step_time

if TYPE_CHECKING:
    from mm.config import TrainConfig
    from mm.plan.hardware import Gpu
    from mm.plan.simulate import Step

EFFICIENCY = 0.4  # of the peak rate while computing: an assumption, the one number here that nothing gives
MOVES = {
    "parallel.activation_checkpointing": "--parallel.activation-checkpointing {}",
    "parallel.strategy": "--parallel.strategy {}",
    "parallel.reshard": "--parallel.reshard {}",
    "optim.accumulate": "--optim.accumulate {}",
    "--gpus": "--gpus {}",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A config on so many GPUs of a kind."""

    config: TrainConfig
    gpus: int
    name: str
    samples: int
    efficiency: float
    step: Step
    time: Time
    sent: list[Collective]
    fix: Fix | None  # where the step does not fit

    @property
    def gpu(self) -> Gpu:
        return gpu(self.name)

    @property
    def fits(self) -> bool:
        return fits(self.step, self.gpu)

    @property
    def steps(self) -> int:
        return ceil(self.samples / self.config.data.batch_size)

    @property
    def hours(self) -> float:
        return self.steps * self.time.step / 3600


def plan(
    config: TrainConfig,
    gpus: int = 8,
    name: str = "h100",
    samples: float | None = None,
    efficiency: float = EFFICIENCY,
    caption_tokens: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Plan:
    """What `config` takes on `gpus` GPUs called `name`, to `samples` samples (by default those of `run.steps`).

    Raises ConfigError for an unknown GPU, and for a batch or a sharding that does not come out even.
    """
    card = gpu(name)
    run = partial(simulate, caption_tokens=caption_tokens)
    step = run(config, gpus)
    return Plan(
        config=config,
        gpus=gpus,
        name=name,
        samples=round(samples or config.run.steps * config.data.batch_size),
        efficiency=efficiency,
        step=step,
        time=step_time(config, step, card, efficiency),
        sent=collectives(config, step),
        fix=None if fits(step, card) else first_fix(config, gpus, card, step, run, tell),
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan in JSON's types: bytes, FLOPs, seconds."""
    step, samples = plan.step, plan.step.micro_batch * plan.step.micro_batches
    fix = plan.fix
    return {
        "gpus": plan.gpus,
        "gpu": {"name": plan.name, **asdict(plan.gpu)},
        "assumed": {"efficiency": plan.efficiency, "usable_memory": USABLE, "caption_tokens": step.caption_tokens},
        "parameters": {**step.parameters, "trained": step.trained, "trained_on_rank": step.local},
        "ranks_of_a_copy": step.layout.shard,
        "copies": step.layout.copies,
        "micro_batch": step.micro_batch,
        "micro_batches": step.micro_batches,
        "flops_a_sample": {name: getattr(step, name) / samples for name in ("forward", "backward", "recompute")},
        "memory": {**step.memory, "peak": step.peak, "usable": round(USABLE * plan.gpu.memory * 1e9)},
        "sent": [asdict(one) | {"seconds": one.seconds(plan.gpu)} for one in plan.sent],
        "seconds": {**asdict(plan.time), "step": plan.time.step},
        "samples": plan.samples,
        "steps": plan.steps,
        "days": plan.hours / 24,
        "gpu_hours": plan.hours * plan.gpus,
        "fits": plan.fits,
        "fix": None if fix is None else {"changes": fix.changes, "memory": fix.step.memory, "fits": fix.fits},
    }


def as_text(plan: Plan) -> str:
    """The plan on one screen."""
    step, card, parallel = plan.step, plan.gpu, plan.config.parallel
    samples = step.micro_batch * step.micro_batches
    rate = card.fp32 if parallel.precision == "fp32" else card.bf16
    flops = [getattr(step, name) / samples for name in ("forward", "backward", "recompute")]
    context = plan.config.model.text.context_length
    full = ": the whole context, an upper bound" if step.caption_tokens == context else ""
    copies = "every rank holds a copy"
    if step.layout.shard > 1:
        copies = f"{step.layout.shard:,} ranks hold a copy, {step.layout.copies:,} of them"
    usable = USABLE * card.memory
    lines = [
        f"{plan.gpus:,} x {plan.name}: {card.memory:g} GB at {card.bandwidth:,} GB/s, {rate:,} TFLOP/s in "
        f"{parallel.precision.removesuffix('_params')}; {GPUS_PER_MACHINE} a machine, {card.link} GB/s inside, "
        f"{card.network} GB/s between",
        "",
        _row("parameters", _millions(step.parameters) + f"; {step.trained / 1e6:,.1f} M trained"),
        _row(
            "parallel",
            f"{parallel.strategy}: {copies}; {parallel.precision}, activation checkpointing "
            f"{parallel.activation_checkpointing}",
        ),
        _row(
            "batch",
            f"{plan.config.data.batch_size:,} = {plan.gpus:,} ranks x {_times(step.micro_batches)}"
            f"{step.micro_batch:,}; captions of {step.caption_tokens} tokens{full}",
        ),
        _row(
            "FLOPs a sample",
            f"{sum(flops[:2]) / 1e9:,.1f} G: forward {flops[0] / 1e9:,.1f}, backward "
            f"{flops[1] / 1e9:,.1f}; computed again {flops[2] / 1e9:,.1f}",
        ),
        "",
        "memory a rank at its highest, GB (eager; torch.compile keeps less)",
        *(f"  {kind:<24}{size / 1e9:>9.2f}" for kind, size in step.memory.items() if size),
        f"  {'together':<24}{step.peak / 1e9:>9.2f}   {'fits' if plan.fits else 'does not fit'} in {usable:.1f}: "
        f"{100 * USABLE:.0f} % of {card.memory:g}, the rest is left to driver, NCCL and fragments",
    ]
    if not plan.fits:
        lines.append(_verdict(plan))
    lines += ["", "sent a rank and step" + ("" if plan.sent else ": nothing")]
    for one in plan.sent:
        where = "in a machine" if one.machine else "over the network"
        lines.append(f"  {one.what:<24}{one.size / 1e9:>9.3f} GB {where:<17}{1e3 * one.seconds(card):>8.1f} ms")
    time, rate_of_data = plan.time, plan.config.data.batch_size / plan.time.step
    lines += [
        "",
        _row(
            "step",
            f"{1e3 * time.step:,.1f} ms: computing {1e3 * time.compute:,.1f} at {100 * plan.efficiency:g} % of "
            f"the peak (assumed: --efficiency), beside it traffic of {1e3 * time.hidden:,.1f};",
        ),
        _row(
            "",
            f"not beside it {1e3 * time.exposed:,.1f}, update {1e3 * time.update:,.1f}; no latencies, no waiting "
            f"for data; {rate_of_data:,.0f} samples/s, {rate_of_data / plan.gpus:,.0f} a GPU",
        ),
        _row(
            "run",
            f"{plan.samples:,} samples in {plan.steps:,} steps: {plan.hours / 24:,.2f} days, "
            f"{plan.hours * plan.gpus:,.0f} GPU-hours",
        ),
        _row("", "a plan from data sheets and shapes, not a measurement"),
    ]
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    """What is too large, and the first change with which it is not."""
    step, fix = plan.step, plan.fix
    most = max(step.memory, key=lambda kind: step.memory[kind])
    wrong = f"does not fit: {most} {step.memory[most] / 1e9:.1f} of {step.peak / 1e9:.1f} GB"
    if fix is None:
        return f"{wrong}; nothing is left to change: take a larger GPU or a smaller model"
    flags = " ".join(MOVES[name].format(value) for name, value in fix.changes.items())
    found = f"{flags} -> {fix.step.peak / 1e9:.1f} GB"
    return f"{wrong}; set {found}" if fix.fits else f"{wrong}; even with {found}: take a larger GPU or a smaller model"


def _times(micro_batches: int) -> str:
    return f"{micro_batches} micro-batches x " if micro_batches > 1 else ""


def _row(name: str, text: str) -> str:
    return f"{name:<16}{text}"


def _millions(parts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in parts.items() if count >= 50_000)
    return f"{sum(parts.values()) / 1e6:,.1f} M: {shown}"
