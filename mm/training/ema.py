"""An exponential average of the weights: what is evaluated, exported and released."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mm.nn.sharded import own_part, whole


class Ema:
    """One averaged copy a trainable parameter, sharded like it; the decay ramps in as (1 + step) / (10 + step).

    With a decay of 0 the averages are the parameters themselves, and take no memory.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.module = module
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() if decay else p.detach() for name, p in self.named.items()}
        self._parts = [own_part(average) for average in self.average.values()]

    @torch.no_grad()
    def update(self, step: int, weight: float | None = None) -> None:
        """Move towards the weights after step `step` (from 0). `weight` overrides the decay; 0 changes nothing."""
        if not self.decay:
            return
        if weight is None:
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._parts, [own_part(p) for p in self.named.values()], weight)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return self.average

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """The module's whole state, one tensor at a time, with averages for the trained parameters; all must ask."""
        for name, tensor in self.module.state_dict().items():
            yield name, whole(self.average.get(name, tensor))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averaged weights and is in evaluation mode; afterwards its own again."""
        parameters = [own_part(p) for p in self.named.values()] if self.decay else []
        own = [part.clone() for part in parameters]
        _copy(parameters, self._parts if self.decay else [])
        self.module.eval()
        try:
            yield
        finally:
            _copy(parameters, own)
            self.module.train()


@torch.no_grad()
def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)
