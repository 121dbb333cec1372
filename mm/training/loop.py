"""The training loop: one function from a config to a finished run folder. To resume, call it again.

Every random draw is a function of (seed, sample key, epoch), and the learning rate of the step, so that a run that was
stopped anywhere and started again ends with the same weights, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mm.config import TrainConfig
from mm.data.buckets import aspect_shapes
from mm.data.loader import Loader
from mm.data.order import order_hash
from mm.data.sources import Access, check, corpus
from mm.distributed.parallelize import autocast, compile_blocks, pick_device
from mm.models.export import save_export
from mm.objectives.step import TrainStep, build_step
from mm.training import checkpoint, run_folder
from mm.training.calibrate import count_flops, diagnose, steps_within
from mm.training.ema import Ema
from mm.training.metrics import LedgerFile, MetricsLog, matrix_rate
from mm.training.optim import Optimizers
from mm.training.preemption import Stop
from mm.training.progress import Progress, say
from mm.types import Batch


class Diverged(ValueError):
    """The loss or its gradient is not a number: names the step and the samples."""


class Stopped(RuntimeError):
    """A signal ended the run early; everything up to its last step is saved."""

    def __init__(self, step: int, number: int):
        super().__init__(f"stopped by signal {number} after step {step}; start again to go on")
        self.exit_code = 128 + number


class Callback(Protocol):
    """Called with the averaged weights in place, every `every` steps (0: only after the last)."""

    every: int

    def __call__(self, context: Trainer) -> dict[str, float]: ...


@dataclass
class Trainer:
    """What a run consists of while it runs; callbacks see it."""

    config: TrainConfig
    step_module: TrainStep
    loader: Loader
    device: torch.device
    callbacks: Sequence[Callback] = ()
    step: int = 0  # optimizer steps done
    order: str = ""  # running hash over the keys of the global batches
    flops: int = 0  # of one step, forward and backward
    peak: float = 0.0  # FLOP/s of this machine in the run's precision
    optimizers: Optimizers = field(init=False)
    ema: Ema = field(init=False)

    def __post_init__(self) -> None:
        self.optimizers = Optimizers(self.step_module, self.config.optim, self.config.run.steps)
        self.ema = Ema(self.step_module, self.config.optim.ema)

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def model(self) -> Any:
        return self.step_module.model

    def autocast(self) -> AbstractContextManager:
        """The precision of a forward."""
        return autocast(self.config.parallel, self.device)

    def extras(self) -> dict[str, Tensor]:
        """The objectives' own tensors, named as in an export."""
        return {name: t for name, t in self.step_module.state_dict().items() if name.startswith("objectives.")}

    def iterate(self, batch: Batch, factor: float | None = None) -> tuple[dict[str, Tensor], float]:
        """One optimizer step; with `factor` 0 it costs the same and changes nothing but optimizer state."""
        metrics = self.step_module.backward(batch, self.config.optim.accumulate, self.autocast)
        metrics["grad_norm"] = self.optimizers.clip()
        if not math.isfinite(metrics["loss"].item()) or not math.isfinite(metrics["grad_norm"].item()):
            raise Diverged(
                f"step {self.step + 1}: loss = {metrics['loss'].item()}, grad_norm = {metrics['grad_norm'].item()} is "
                f"not finite; lower optim.lr or look at the samples {', '.join(batch.keys[:8])} ..."
            )
        rate = self.optimizers.step(self.step, factor)
        self.ema.update(self.step, None if factor is None else 0.0)
        if factor is None:
            self.step_module.after_step()
        return metrics, rate

    def save(self) -> None:
        """Write the export of the averaged weights, then commit a checkpoint: a kill in between only repeats both."""
        note = {"format": "mm", "step": str(self.step)}
        save_export(self.run_dir / "export", self.ema.export(), self.config, self.model.tokenizer.to_json(), note)
        tensors = {f"model/{name}": tensor for name, tensor in self.step_module.state_dict().items()}
        tensors |= {f"ema/{name}": tensor for name, tensor in self.ema.state().items()}
        tensors |= {f"optim/{name}": tensor for name, tensor in self.optimizers.state().items()}
        checkpoint.save(self.run_dir, self.step, tensors, {"order": self.order}, self.config.checkpoint.keep)

    def restore(self) -> None:
        """Continue from the newest good checkpoint, if there is one."""
        found = checkpoint.load(self.run_dir)
        if found is None:
            return
        tensors, scalars = found
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optim": {}}
        for path, tensor in tensors.items():
            part, _, name = path.partition("/")
            parts[part][name] = tensor
        self.step_module.load_state_dict(parts["model"])
        self.ema.load(parts["ema"])
        self.optimizers.load(parts["optim"])
        self.step, self.order = scalars["step"], scalars["order"]

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps, or only at the end, happens now."""
        return self.step == self.config.run.steps or (every > 0 and self.step % every == 0)


def run(
    config: TrainConfig, callbacks: Callable[[TrainConfig], Sequence[Callback]] | None = None, budget: float = 0.0
) -> dict[str, Any]:
    """Train `config.run.steps` steps in `config.run.dir`, from its newest checkpoint if it has one.

    `callbacks(config)` makes the evaluations to run on the way. With `budget` seconds, a new run first measures a few
    steps and sets `run.steps` to what fits, compilation included; a run that is resumed keeps its steps. Returns a
    summary. Raises ConfigError for a folder of another run, Diverged, and Stopped when a signal ends it.
    """
    started = time.perf_counter()
    folder = Path(config.run.dir)
    check(config.data.train, config.data.caption, config.data.weights)  # refused before the folder is made
    made = callbacks(config) if callbacks else ()
    with run_folder.locked(folder), Stop().listening() as stop:
        saved = run_folder.saved_config(folder)
        if budget and saved is not None:
            config.run.steps = saved.run.steps
            say(f"{folder}: a run of {saved.run.steps} steps, which it keeps")
        trainer = _prepare(config, made)
        if budget and saved is None:
            config.run.steps = trainer.optimizers.steps = steps_within(trainer, budget, started)
        run_folder.claim(folder, config)
        trainer.restore()
        if trainer.step >= config.run.steps:
            say(f"{folder}: finished at step {trainer.step}")
            return {"step": trainer.step, "seconds": 0.0}
        if trainer.step:
            say(f"resuming after step {trainer.step}")
        trainer.loader.start = trainer.step
        _loop(trainer, stop)
        return {"step": trainer.step, "seconds": time.perf_counter() - started}


def _prepare(config: TrainConfig, callbacks: Sequence[Callback]) -> Trainer:
    """Everything that is the same for a new run and for one that is resumed."""
    folder, data = Path(config.run.dir), config.data
    if run_folder.saved_config(folder) is not None:
        run_folder.claim(folder, config)  # refuse another run's folder before anything is built
    device = pick_device(config.parallel)
    access = Access(data.fetch_gb, data.stall_seconds)
    tokenizer = run_folder.tokenizer_of(folder, config, lambda: corpus(data.train, data.caption, access))
    torch.manual_seed(config.run.seed)
    step_module = build_step(config, tokenizer).to(device)
    loader = Loader(
        data.train,
        step_module.model.processors(train=True),
        batch_size=data.batch_size,
        seed=config.run.seed,
        train=True,
        workers=data.workers,
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
    trainer = Trainer(config, step_module, loader, device, callbacks)
    trainer.peak = matrix_rate(device, torch.float32 if config.parallel.precision == "fp32" else torch.bfloat16)
    trainer.flops = count_flops(trainer)
    parameters = sum(p.numel() for p in step_module.parameters())
    say(
        f"{parameters / 1e6:.1f} M parameters, {tokenizer.vocab_size} text tokens, {loader.samples} samples, "
        f"{trainer.flops / 1e9:.0f} GFLOP a step; this machine: {trainer.peak / 1e9:.0f} GFLOP/s "
        f"in {config.parallel.precision} matrix products on {device.type}"
    )
    if config.parallel.compile:
        say(compile_blocks(step_module, device))
    return trainer


def _shapes(config: TrainConfig) -> list[tuple[int, int]]:
    """The picture shapes of aspect buckets: sides that both the vision encoder and the denoiser can cut in patches."""
    image, denoiser = config.model.image, config.model.denoiser
    return aspect_shapes(image.size, math.lcm(image.patch, denoiser.patch if denoiser else 1), config.data.shapes)


def _loop(trainer: Trainer, stop: Stop) -> None:
    config = trainer.config
    log = MetricsLog(trainer.run_dir, trainer.step, config.run.tensorboard)
    ledger = LedgerFile(trainer.run_dir)
    try:
        with Progress(trainer.step, config.run.steps) as progress:
            batches = iter(trainer.loader)
            while trainer.step < config.run.steps:
                record = _advance(trainer, batches)
                _tell(ledger.write(trainer.loader.ledger), len(trainer.loader.ledger))
                stopping = bool(stop) and trainer.step < config.run.steps
                found: dict[str, float] = {}
                for callback in trainer.callbacks:
                    if trainer.due(callback.every) and not stopping:
                        with trainer.ema.applied():
                            found |= callback(trainer)
                if found or trainer.step % config.run.log_every == 0 or trainer.step == config.run.steps:
                    log.write(record | found)
                progress.update(record)
                if found:
                    say("  ".join(f"{name} {value:.3f}" for name, value in found.items()))
                if trainer.due(config.checkpoint.every) or stopping:
                    trainer.save()
                if stopping:
                    raise Stopped(trainer.step, stop.signal or 0)
    finally:
        log.close()
        ledger.write(trainer.loader.ledger)


def _tell(added: list[Any], known: int) -> None:
    """A line on the screen where a shard is damaged or lost, and one for the first samples that cannot be used."""
    for entry in [entry for entry in added if not entry.key][:5]:
        say(f"{entry.shard}: {entry.reason}")
    if added and known == len(added):
        say(f"{known} entries in ledger.jsonl: what cannot be used is replaced, and counted as unusable")


def _advance(trainer: Trainer, batches: Iterator[Batch]) -> dict[str, Any]:
    """One step on the next batch, and its line for the metrics."""
    config, start = trainer.config, time.perf_counter()
    batch = next(batches)
    wait = time.perf_counter() - start
    batch = batch.to(trainer.device)
    every = config.run.diagnose_every
    diagnosis = diagnose(trainer, batch) if every and trainer.step % every == 0 else {}
    metrics, rate = trainer.iterate(batch)
    trainer.step += 1
    trainer.order = order_hash(trainer.order, batch.keys)
    seconds = time.perf_counter() - start
    return {
        "step": trainer.step,
        "samples": trainer.step * config.data.batch_size,
        "epoch": trainer.step * config.data.batch_size / trainer.loader.samples,
        **{name: value.item() for name, value in metrics.items()},
        **diagnosis,
        "lr": rate,
        "seconds": seconds,
        "samples_per_second": config.data.batch_size / seconds,
        "mfu": trainer.flops / seconds / trainer.peak,
        "data_wait": wait,
        "unusable": len(trainer.loader.ledger),
        "order": trainer.order,
    }
