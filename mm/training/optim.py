"""AdamW, or Muon on the matrices of the blocks and AdamW on the rest; the learning rate is a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mm.nn.sharded import own_part, whole
from mm.training.muon import Muon

if TYPE_CHECKING:
    from mm.config import OptimConfig
    from mm.distributed.world import World


class Optimizers:
    """What updates the parameters of one module. Its state is addressed by parameter name.

    With `world`, its processes share the work that all would otherwise do alike; all must then take every step.
    """

    def __init__(self, module: nn.Module, config: OptimConfig, steps: int, world: World | None = None):
        self.config, self.steps = config, steps
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        muon = {name for name, p in self.named.items() if config.name == "muon" and is_matrix(name, p)}
        rest = {name: p for name, p in self.named.items() if name not in muon}
        groups: list[dict[str, Any]] = [  # biases, norms, positions, embeddings and scalars are not decayed
            {"params": [p for name, p in rest.items() if p.ndim >= 2 and not is_table(name)]},
            {"params": [p for name, p in rest.items() if p.ndim < 2 or is_table(name)], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.all: list[torch.optim.Optimizer] = [adamw]
        if muon:
            self.all.append(
                Muon(
                    [self.named[name] for name in self.named if name in muon],
                    lr=config.muon_lr,
                    momentum=config.muon_momentum,
                    weight_decay=config.muon_weight_decay,
                    steps=config.muon_steps,
                    world=world,
                )
            )
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]

    def step(self, number: int, factor: float | None = None) -> float:
        """Update after step `number` (from 0) and drop the gradients; returns AdamW's learning rate.

        `factor` overrides the schedule: with 0 no parameter changes, which calibration uses.
        """
        factor = learning_rate(self.config, number, self.steps) if factor is None else factor
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
        self.drop()
        return self.config.lr * factor

    def drop(self) -> None:
        """Drop the gradients."""
        for optimizer in self.all:
            optimizer.zero_grad()

    def clip(self) -> Tensor:
        """The gradient norm over all parameters, before it is clipped to `optim.clip`."""
        return whole(nn.utils.clip_grad_norm_(self.named.values(), self.config.clip))

    def reset(self) -> None:
        """Forget all state, as if no step had been made."""
        for optimizer in self.all:
            optimizer.state.clear()

    def state(self) -> dict[str, Tensor]:
        """`name/key` -> tensor, for every parameter that has been updated."""
        return {
            f"{name}/{key}": value
            for optimizer, name, p in self._owners()
            for key, value in optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor)
        }

    def allocate(self, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Make the state of these shapes and types, by `name/key`, for a checkpoint to be read into; all else goes."""
        self.reset()
        owners = {name: (optimizer, p) for optimizer, name, p in self._owners()}
        for path, (shape, dtype) in shapes.items():
            name, _, key = path.rpartition("/")
            optimizer, p = owners[name]
            like = tuple(shape) == tuple(p.shape)  # the parameter, sharded as it is; else a count
            made = torch.zeros_like(p, dtype=dtype) if like else own_part(p).new_zeros(shape, dtype=dtype)
            optimizer.state[p][key] = made

    def _owners(self) -> Iterator[tuple[torch.optim.Optimizer, str, nn.Parameter]]:
        names = {p: name for name, p in self.named.items()}
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    yield optimizer, names[p], p


def is_matrix(name: str, parameter: Tensor) -> bool:
    """A weight that Muon should orthogonalise: a matrix inside a block, but no modulation (it starts at zero).

    Nor a factor of LoRA: the product is what counts, of which B starts at zero, and an update of both factors that is
    as long in every direction would not be one of the product.
    """
    return parameter.ndim == 2 and ".blocks." in name and "modulation" not in name and ".lora_" not in name


def is_table(name: str) -> bool:
    """Learned positions and embeddings: rows that are looked up, not multiplied."""
    return name.endswith(("position", "embedding.weight", "cls"))


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The share of the peak at `step`: linear warm-up, then cosine or linear decay to `final` at the last step."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    left = 1 - step / max(1, steps)
    decay = left if config.schedule == "linear" else (1 + math.cos(math.pi * (1 - left))) / 2
    return warm * (config.final + (1 - config.final) * decay)
