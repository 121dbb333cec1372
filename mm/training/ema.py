"""An exponential average of the weights: what is evaluated, exported and released."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Ema:
    """One averaged copy a trainable parameter; the decay ramps in as (1 + step) / (10 + step)."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.module = module
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.named.items()}

    @torch.no_grad()
    def update(self, step: int, weight: float | None = None) -> None:
        """Move towards the weights after step `step` (from 0). `weight` overrides the decay; 0 changes nothing."""
        if weight is None:
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.named.values()), weight)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return self.average

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.average.items():
            tensor.copy_(state[name])

    def export(self) -> dict[str, Tensor]:
        """The module's state with averages in place of the trained parameters."""
        return {name: self.average.get(name, tensor) for name, tensor in self.module.state_dict().items()}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averaged weights and is in evaluation mode; afterwards its own again."""
        with torch.no_grad():
            own = {name: p.detach().clone() for name, p in self.named.items()}
            for name, p in self.named.items():
                p.copy_(self.average[name])
            self.module.eval()
            try:
                yield
            finally:
                for name, p in self.named.items():
                    p.copy_(own[name])
                self.module.train()
