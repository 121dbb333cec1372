"""What a run consists of while it runs: the step, its data, optimizers, averages, and how far it is."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mm.adaptation import lora
from mm.config import ConfigError, TrainConfig
from mm.data.loader import Loader
from mm.distributed.device import autocast
from mm.distributed.parallelize import Parallel
from mm.distributed.world import World
from mm.models.export import save_export
from mm.objectives.step import TrainStep
from mm.settings import difference, from_dict, to_dict
from mm.training.checkpoint import Checkpoints, SaveFailed
from mm.training.ema import Ema
from mm.training.faults import fault
from mm.training.health import Health
from mm.training.optim import Optimizers
from mm.training.progress import say
from mm.types import Batch, Loss

_FAULTS = {"nan": math.nan, "spike": 1e3}  # what a fault of that name multiplies one process' loss with


class Callback(Protocol):
    """Called with the averaged weights in place, every `every` steps (0: only after the last).

    `part` is what one process does by itself, without waiting for others: `context.world` says which it is of how
    many. `whole` is given all parts, by rank, in every process; only the first writes files.
    """

    every: int

    def part(self, context: Trainer) -> Any: ...

    def whole(self, context: Trainer, parts: list[Any]) -> dict[str, float]: ...


@dataclass
class Trainer:
    """The state of a run; callbacks see it."""

    config: TrainConfig
    parallel: Parallel
    loader: Loader
    device: torch.device
    world: World = field(default_factory=World)
    callbacks: Sequence[Callback] = ()
    step: int = 0  # optimizer steps done; also the number of the next global batch
    order: str = ""  # running hash over the keys of the global batches
    record: dict[str, Any] = field(default_factory=dict)  # the last step's line for metrics.jsonl
    watch: Callable[[str, int], None] = lambda phase, step: None  # told what the run is at
    flops: int = 0  # of one step in one process, forward and backward
    peak: float = 0.0  # FLOP/s of one device in the run's precision
    failures: int = 0  # of saves, in a row
    saved: int = -1  # the step of the last checkpoint that was begun
    optimizers: Optimizers = field(init=False)
    ema: Ema = field(init=False)
    health: Health = field(init=False)
    checkpoints: Checkpoints = field(init=False)

    def __post_init__(self) -> None:
        self.optimizers = Optimizers(self.step_module, self.config.optim, self.config.run.steps, self.world)
        self.ema = Ema(self.step_module, self.config.optim.ema)
        self.health = Health(self.config.health)
        self.checkpoints = Checkpoints(self.run_dir, self.config.checkpoint, self.world)

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def step_module(self) -> TrainStep:
        return self.parallel.step

    @property
    def model(self) -> Any:
        return self.step_module.model

    def autocast(self) -> AbstractContextManager:
        """The precision of a forward."""
        return autocast(self.config.parallel, self.device)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the whole averaged weights, in every process."""
        with self.ema.applied(), self.parallel.gathered():
            yield

    def extras(self) -> dict[str, Tensor]:
        """The objectives' own tensors, named as in an export."""
        objectives = self.step_module.objectives  # not state_dict: that would shard them again
        named = itertools.chain(objectives.named_parameters(), objectives.named_buffers())
        return {f"objectives.{name}": tensor.detach() for name, tensor in named}

    def iterate(self, batch: Batch, factor: float | None = None) -> dict[str, float] | None:
        """One optimizer step, unless its numbers are bad; returns the global batch's metrics, the same everywhere.

        None where the trainer went back to its newest checkpoint. With `factor` 0 it costs the same and changes nothing
        but optimizer state. Raises Diverged where the run is to stop.
        """
        forward, spoilt = self.parallel.forward, _FAULTS.get(fault("step", self.step + 1))
        metrics = self.step_module.backward(
            batch,
            self.config.optim.accumulate,
            self.autocast,
            _spoilt(forward, spoilt) if spoilt else forward,
            self.parallel.sync,
        )
        own = metrics["loss"] * spoilt if spoilt else metrics["loss"]
        norm = self.optimizers.clip()
        values = self.means({**metrics, "loss": own}) | {"grad_norm": norm.item()}
        problem, action = self.health.judge(values) if factor is None else ("", "")
        if problem:
            self.optimizers.drop()
            self._mishap(problem, action, batch, math.isfinite(own.item()))
            if action == "rewind":
                return None
            return values | {"lr": 0.0, "left_out": 1.0}
        if factor == 0 and not math.isfinite(values["grad_norm"]):  # zero times no number is none
            self.optimizers.drop()
            return values
        values["lr"] = self.optimizers.step(self.step, factor)
        self.ema.update(self.step, None if factor is None else 0.0)
        if factor is None:
            self.step_module.after_step()
        return values

    def means(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Metrics over the global batch: the means of those over each process' equal part."""
        stacked = torch.stack([value.detach().float().reshape(()) for value in metrics.values()])
        if self.world.size > 1:
            dist.all_reduce(stacked)
            stacked /= self.world.size
        return dict(zip(metrics, stacked.tolist(), strict=True))

    def _mishap(self, problem: str, action: str, batch: Batch, finite: bool) -> None:
        """Tell where the bad step came from; `rewind` leaves the trainer where its newest checkpoint is."""
        number = self.step
        shards = self.loader.shards_of(number)
        mine = [{"key": key, "shard": shards.get(key, ""), "rank": self.world.rank} for key in batch.keys]
        told = self.world.gather((finite, mine))
        samples = [sample for good, part in sorted(told, key=lambda item: item[0]) for sample in part]
        if not all(good for good, _ in told):
            samples = [sample for sample in samples if not told[sample["rank"]][0]]
        self.health.act(self.run_dir, number + 1, problem, action, samples, self.world.main)
        if action == "rewind":
            self.health.left_out.add(number)
            self.restore()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name; sharded tensors as they are."""
        found = {f"model/{name}": tensor for name, tensor in self.step_module.state_dict().items()}
        found |= {f"ema/{name}": tensor for name, tensor in self.ema.average.items()}
        return found | {f"optim/{name}": tensor for name, tensor in self.optimizers.state().items()}

    def bytes(self) -> int:
        """Of a checkpoint, at most: parameters, averages, two moments, and the export; of what is fixed, two."""
        trained = sum(p.numel() * p.element_size() for p in self.step_module.parameters())
        return 5 * trained + 2 * sum(b.numel() * b.element_size() for b in self.step_module.buffers())

    def save(self, wait: bool = False) -> None:
        """Begin a checkpoint of this step, with the export of the averaged weights; `wait` until it is whole."""
        if self._settled(wait) and self.saved == self.step:
            return
        copies = {}
        for name, tensor in self.ema.export():  # gathered one by one: all together may not fit on a device
            if self.world.main:
                copies[name] = tensor.to("cpu", copy=True)
        note = {"format": "mm", "step": str(self.step)}
        tokenizer = self.model.tokenizer.to_json()
        config = from_dict(to_dict(self.config))

        def export() -> None:
            folder, adapt = self.run_dir / "export", config.adapt
            base, factors = lora.split(copies)
            merged = lora.merge(base, factors, adapt.lora_alpha / adapt.lora_rank)
            save_export(folder, merged, config, tokenizer, note)
            if factors:
                own = {name.removeprefix("model."): t for name, t in copies.items() if name.startswith("model.")}
                lora.save(folder / lora.FOLDER, own, adapt, note)

        scalars = {
            "order": self.order,
            "record": finite(self.record),
            "health": self.health.state(),
            "world": self.world.size,
            "strategy": self.config.parallel.strategy,
            "tokenizer": _digest(tokenizer),
            "config": to_dict(self.config),
        }
        self.saved = self.step
        try:
            self.checkpoints.save(self.step, self.tensors(), scalars, export, wait=wait)
        except SaveFailed as error:
            self._failed(error, wait)

    def _settled(self, last: bool = False) -> bool:
        """Wait for the save that is running; whether it worked. One failure is survived, two in a row raise SaveFailed.

        Before the `last` save even that is only told: there may be room by now.
        """
        try:
            self.checkpoints.finish()
        except SaveFailed as error:
            self._failed(error, self.failures > 0 and not last)
            return False
        self.failures = 0
        return True

    def _failed(self, error: SaveFailed, fatal: bool) -> None:
        self.failures += 1
        if fatal:
            raise error
        if self.world.main:
            say(f"{error}; trying again at the next")

    def restore(self) -> bool:
        """Continue from the newest good checkpoint, if there is one.

        Raises ConfigError where that was made with another config or tokenizer.
        """
        self._settled(last=True)
        found = self.checkpoints.newest()
        if found is None:
            return False
        scalars = found.scalars
        if changes := difference(from_dict(scalars["config"]), self.config):
            raise ConfigError(f"{found.path} is of another run ({'; '.join(changes)}); choose another run.dir")
        then, now = scalars["tokenizer"], _digest(self.model.tokenizer.to_json())
        if then != now:
            path = self.run_dir / "tokenizer.json"
            problem = f"changed since {found.path.name} was saved (sha256 {then[:12]} then, {now[:12]} now)"
            raise ConfigError(f"{path}: {problem}; put the old one back")
        prefix = "optim/"
        self.optimizers.allocate({n.removeprefix(prefix): s for n, s in found.names.items() if n.startswith(prefix)})
        self.checkpoints.read(found, self.tensors())
        self.health.load(scalars["health"])
        self.saved = found.step
        self.step, self.order, self.record = found.step, scalars["order"], scalars["record"]
        return True

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps, or only at the end, happens now."""
        return self.step == self.config.run.steps or (every > 0 and self.step % every == 0)


def _spoilt(forward: Callable[..., Loss], factor: float) -> Callable[..., Loss]:
    """A forward whose loss is so many times what it should be: a fault on purpose."""

    def call(*arguments: Any) -> Loss:
        loss = forward(*arguments)
        return Loss(loss.value * factor, loss.metrics)

    return call


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """For JSON, which has no word for what is not a number: None stands for it."""
    bad = {name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    return {name: None if name in bad else value for name, value in record.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
