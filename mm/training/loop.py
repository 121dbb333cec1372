"""The training loop: one function from a config to a finished run folder. To resume, call it again.

Every random draw is a function of (seed, sample key, epoch), and the learning rate of the step, so that a run that was
stopped anywhere and started again ends with the same weights, bit for bit. Many processes do what one would: before
each step they agree whether to make it, and after it they know the same numbers.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mm.adapters.text import tokenizer_from_json
from mm.config import TrainConfig
from mm.data.buckets import aspect_shapes
from mm.data.loader import Loader
from mm.data.order import chain
from mm.data.sources import Access, check, corpus
from mm.distributed.device import pick_device
from mm.distributed.parallelize import parallelize
from mm.distributed.world import World
from mm.objectives.step import TrainStep, build_step
from mm.rules import divides
from mm.training import run_folder
from mm.training.agreement import Agreed, Agreement, Feed
from mm.training.calibrate import count_flops, diagnose, steps_within, warm_up
from mm.training.checkpoint import preflight
from mm.training.faults import fault
from mm.training.health import Diverged
from mm.training.metrics import gpu_memory, matrix_rate
from mm.training.preemption import Interrupted, Stop
from mm.training.progress import Progress, say
from mm.training.trainer import Callback, Trainer
from mm.training.watchdog import Watchdog
from mm.training.writer import Writer, unfinished
from mm.types import Batch

__all__ = ["Callback", "Diverged", "Stopped", "Trainer", "run"]


class Stopped(RuntimeError):
    """A signal ended the run early; everything up to its last step is saved."""

    def __init__(self, step: int, number: int):
        super().__init__(f"stopped by signal {number} after step {step}; start again to go on")
        self.step, self.signal, self.exit_code = step, number, 128 + number


def run(
    config: TrainConfig,
    callbacks: Callable[[TrainConfig], Sequence[Callback]] | None = None,
    budget: float = 0.0,
    world: World | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train `config.run.steps` steps in `config.run.dir`, from its newest checkpoint if it has one.

    `callbacks(config)` makes the evaluations to run on the way. With `budget` seconds, a new run first measures a few
    steps and sets `run.steps` to what fits, compilation included; a run that is resumed keeps its steps. `world`: the
    processes that train together; `tell` says what a person must see of any. Returns a summary. Raises ConfigError for
    a folder of another run, Diverged, SaveFailed, and Stopped when a signal ends it.
    """
    started, world = time.perf_counter(), world or World()
    folder = Path(config.run.dir)
    divides(config, world.size)
    check(config.data.train, config.data.caption, config.data.weights)  # refused before the folder is made
    made = callbacks(config) if callbacks else ()
    with run_folder.locked(folder, world), Stop().listening() as stop, contextlib.ExitStack() as held:
        saved = world.lead(lambda: run_folder.saved_config(folder))
        if budget and saved is not None:
            config.run.steps = saved.run.steps
            say(f"{folder}: a run of {saved.run.steps} steps, which it keeps")
        try:
            with stop.interrupting():
                trainer = _prepare(config, made, world)
                if budget and saved is None:
                    config.run.steps = world.share(steps_within(trainer, budget, started))
                    trainer.optimizers.steps = config.run.steps
        except Interrupted:  # nothing has been trained
            raise Stopped(0, stop.signal or 0) from None
        world.lead(lambda: run_folder.claim(folder, config))
        dog = held.enter_context(Watchdog(folder, world, config.health.stall_seconds, tell=tell))
        trainer.watch = dog.at
        trainer.restore()
        if trainer.step >= config.run.steps:
            if world.lead(lambda: unfinished(folder, trainer.step)):
                _finish(trainer, stop)
            _say(world, f"{folder}: finished at step {trainer.step}")
            return {"step": trainer.step, "seconds": 0.0}
        if trainer.step:
            _say(world, f"resuming after step {trainer.step}")
        needed = world.total([trainer.bytes()])[0]
        world.lead(lambda: preflight(folder, needed, config.checkpoint.keep))
        _loop(trainer, stop)
        return {"step": trainer.step, "seconds": time.perf_counter() - started}


def _prepare(config: TrainConfig, callbacks: Sequence[Callback], world: World) -> Trainer:
    """Everything that is the same for a new run and for one that is resumed."""
    folder, data = Path(config.run.dir), config.data
    if world.lead(lambda: run_folder.saved_config(folder)) is not None:
        world.lead(lambda: run_folder.claim(folder, config))  # refuse another run's folder before anything is built
    device = pick_device(config.parallel)
    access = Access(data.fetch_gb, data.stall_seconds)
    made = world.lead(
        lambda: run_folder.tokenizer_of(folder, config, lambda: corpus(data.train, data.caption, access)).to_json()
    )
    tokenizer = tokenizer_from_json(made)
    torch.manual_seed(config.run.seed)
    step_module = build_step(config, tokenizer).to(device)
    loader = world.in_turn(lambda: _loader(config, step_module, world, device))
    flops, unused = count_flops(step_module, loader, config, device)
    parallel = parallelize(step_module, config.parallel, world, device, unused)
    trainer = Trainer(config, parallel, loader, device, world, callbacks, flops=flops)
    trainer.peak = matrix_rate(device, torch.float32 if config.parallel.precision == "fp32" else torch.bfloat16)
    parameters = sum(p.numel() for p in step_module.parameters())
    _say(
        world,
        f"{parameters / 1e6:.1f} M parameters, {tokenizer.vocab_size} text tokens, {loader.samples} samples, "
        f"{flops * world.size / 1e9:.0f} GFLOP a step; this machine: {trainer.peak / 1e9:.0f} GFLOP/s "
        f"in {config.parallel.precision} matrix products on {device.type}",
    )
    for line in parallel.said:
        _say(world, line)
    if parallel.wrapper is not None:
        warm_up(trainer)
    return trainer


def _loader(config: TrainConfig, step_module: TrainStep, world: World, device: torch.device) -> Loader:
    data = config.data
    return Loader(
        data.train,
        step_module.model.processors(train=True),
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
    image, denoiser = config.model.image, config.model.denoiser
    return aspect_shapes(image.size, math.lcm(image.patch, denoiser.patch if denoiser else 1), config.data.shapes)


def _loop(trainer: Trainer, stop: Stop) -> None:
    """Steps until the last one or a signal; then everything is saved."""
    config, world = trainer.config, trainer.world
    if trainer.step == 0 and "rewind" in (config.health.nonfinite, config.health.spike):
        trainer.save(wait=True)  # somewhere to go back to
    feed, agreement = Feed(trainer.loader, stop), Agreement(world, config.checkpoint.minutes)
    signal = batches = 0
    with Writer(trainer) as writer, Progress(trainer.step, config.run.steps, world.main) as progress:
        while trainer.step < config.run.steps:
            start = time.perf_counter()
            trainer.watch("data", trainer.step)
            batch = feed.take(trainer.step)
            trainer.watch("agree", trainer.step)
            agreed = agreement.before(feed, batch, stop)
            writer.note(agreement.entries)
            if agreed.stop or batch is None:
                signal = agreed.stop
                break
            trainer.watch("compile" if batches == 0 else "step", trainer.step)
            batches += 1
            record = _advance(trainer, batch.to(trainer.device), agreed, start)
            if record is None:
                writer.back()
                continue
            progress.update(record)
            if trainer.step == config.run.steps:
                break
            writer.write(record | _evaluate(trainer, stop))
            if agreed.save or trainer.due(config.checkpoint.every):
                trainer.watch("save", trainer.step)
                trainer.save()
                agreement.saved = time.monotonic()
            if problem := trainer.checkpoints.poll():
                _say(world, problem)
        trainer.watch("save", trainer.step)
        trainer.save(wait=True)
    if signal:
        raise Stopped(trainer.step, signal)
    _finish(trainer, stop)


def _finish(trainer: Trainer, stop: Stop) -> None:
    """The last step's evaluation and its line, once its checkpoint is safe: a kill in between only repeats this."""
    with Writer(trainer, before_last=True) as writer:
        writer.write(trainer.record | _evaluate(trainer, stop))
        if trainer.world.any(bool(stop)):
            raise Stopped(trainer.step, stop.signal or 0)


def _evaluate(trainer: Trainer, stop: Stop) -> dict[str, float]:
    """What the callbacks that are due find, each process having done its part; nothing where a signal came."""
    due = [callback for callback in trainer.callbacks if trainer.due(callback.every)]
    if not due:
        return {}
    found: dict[str, float] = {}
    with trainer.averaged():
        for callback in due:
            trainer.watch("evaluate", trainer.step)
            part = None
            with contextlib.suppress(Interrupted), stop.interrupting():
                fault("evaluate", trainer.step)
                part = callback.part(trainer)
            parts = trainer.world.gather(part)
            if any(part is None for part in parts):
                return {}
            found |= callback.whole(trainer, parts)
    if found:
        _say(trainer.world, "  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return found


def _advance(trainer: Trainer, batch: Batch, agreed: Agreed, start: float) -> dict[str, Any] | None:
    """One step on the next batch, and its line for the metrics; None where the run went back to a checkpoint."""
    config = trainer.config
    every = config.run.diagnose_every
    diagnosis = diagnose(trainer, batch) if every and trainer.step % every == 0 else {}
    left_out = trainer.step in trainer.health.left_out
    metrics = {"left_out": 1.0} if left_out else trainer.iterate(batch)
    if metrics is None:
        return None
    trainer.step += 1
    trainer.order = chain(trainer.order, agreed.sums)
    seconds = time.perf_counter() - start
    trainer.record = {
        "step": trainer.step,
        "samples": trainer.step * config.data.batch_size,
        "epoch": trainer.step * config.data.batch_size / trainer.loader.samples,
        **metrics,
        **diagnosis,
        "seconds": seconds,
        "samples_per_second": config.data.batch_size / seconds,
        "mfu": 0.0 if left_out else trainer.flops / seconds / trainer.peak,
        **agreed.metrics,
        **gpu_memory(trainer.device),
        "order": trainer.order,
    }
    return trainer.record


def _say(world: World, line: str) -> None:
    if world.main:
        say(line)
