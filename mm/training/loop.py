"""The training loop: one function from a config to a finished run folder. To resume, call it again.

Every random draw is a function of (seed, sample key, epoch), and the learning rate of the step, so that a run that was
stopped anywhere and started again ends with the same weights, bit for bit. Many processes do what one would: before
each step they agree whether to make it, and after it they know the same numbers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mm.config import ConfigError, TrainConfig
from mm.data.order import chain
from mm.data.sources import check
from mm.distributed.world import World
from mm.rules import divides
from mm.training import run_folder
from mm.training.agreement import Agreed, Agreement, Feed
from mm.training.calibrate import diagnose, steps_within
from mm.training.checkpoint import preflight
from mm.training.faults import fault
from mm.training.health import Diverged
from mm.training.manifest import last_step
from mm.training.metrics import gpu_memory
from mm.training.preemption import Interrupted, Stop
from mm.training.prepare import Start, prepare
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
    stop: Stop | None = None,
    start: Start | None = None,
) -> dict[str, Any]:
    """Train `config.run.steps` steps in `config.run.dir`, from its newest checkpoint if it has one.

    `callbacks(config)` makes the evaluations to run on the way. With `budget` seconds, a new run first measures a few
    steps and sets `run.steps` to what fits, compilation included; a run that is resumed keeps its steps. `world`: the
    processes that train together. `tell` says what a person must see of any of them, and `stop` listens to signals
    already. `start`: weights that a new run begins with. Returns a summary. Raises ConfigError for a folder of another
    run, Diverged, SaveFailed, and Stopped when a signal ends it.
    """
    started, world = time.perf_counter(), world or World()
    folder = Path(config.run.dir)
    divides(config, world.size)
    check(config.data.train, config.data.caption, config.data.weights)  # refused before the folder is made
    made = callbacks(config) if callbacks else ()
    with run_folder.locked(folder, world), contextlib.ExitStack() as held:
        stop = stop or held.enter_context(Stop().listening())
        dog = held.enter_context(Watchdog(folder, world, config.health.stall_seconds, tell=tell))
        saved = world.lead(lambda: run_folder.saved_config(folder))
        if budget and saved is not None:
            config.run.steps = saved.run.steps
            say(f"{folder}: a run of {saved.run.steps} steps, which it keeps")
        try:
            # many are not interrupted here, where one may have no signal: they agree to stop before the first step
            with stop.interrupting() if world.size == 1 else contextlib.nullcontext():
                trainer = prepare(config, made, world, start)
                if budget and saved is None:
                    config.run.steps = world.share(steps_within(trainer, budget, started))
                    trainer.optimizers.steps = config.run.steps
        except Interrupted:  # nothing has been trained since the last checkpoint
            raise Stopped(last_step(folder), stop.signal or 0) from None
        world.lead(lambda: run_folder.claim(folder, config))
        trainer.watch = dog.at
        if not trainer.restore() and start is not None and start.gone:
            raise ConfigError(f"{folder}: no checkpoint of it is whole, and its start is not there: {start.gone}")
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
            try:
                agreed = agreement.before(feed, batch, stop)
            except Exception:
                if agreement.failed:  # for want of data, and all processes stand at the same step
                    trainer.save(wait=True)
                raise
            writer.note(agreement.entries)
            if agreed.stop or batch is None:
                signal = agreed.stop
                break
            trainer.watch("compile" if batches == 0 else "step", trainer.step)
            batches += 1
            try:
                record = _advance(trainer, batch.to(trainer.device), agreed, start)
            except Diverged:
                trainer.checkpoints.finish()
                raise
            if record is None:
                writer.back()
                continue
            progress.update(record)
            if trainer.step == config.run.steps:
                break
            writer.write(record | (_evaluate(trainer, stop) or {}))
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
    found = _evaluate(trainer, stop)
    if found is None:
        raise Stopped(trainer.step, int(trainer.world.most([stop.signal or 0])[0]))
    with Writer(trainer, before_last=True) as writer:
        writer.write(trainer.record | found)


def _evaluate(trainer: Trainer, stop: Stop) -> dict[str, float] | None:
    """What the callbacks that are due find, each process having done its part; None where a signal came."""
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
                return None
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
