"""Muon (K. Jordan, 2024: momentum, orthogonalised by Newton-Schulz iterations), its work shared out over processes.

Processes that hold whole matrices have the same gradients. Each orthogonalises only some of the updates, and they
exchange the results, in bfloat16: bit for bit what each would have computed alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm.distributed.world import World, awaited

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: the steepest at zero that stays near one
EPSILON = 1e-7
HELPERS = 16  # processes that take part of the work, at most: each tells all others what it has


class Muon(torch.optim.Optimizer):
    """Of matrices only. With Nesterov's momentum, and the rate scaled by sqrt(max(1, rows / columns)).

    The same numbers as torch.optim.Muon. Sharded matrices (DTensor) are not shared out: all processes work on each.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        steps: int,
        world: World | None = None,
    ):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})
        held = self.param_groups[0]["params"]
        self.world = World() if world is None or any(isinstance(p, DTensor) for p in held) else world
        self._helpers = min(self.world.size, HELPERS)
        self._owner = dict(zip(held, shares([p.shape for p in held], self._helpers), strict=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        (group,) = self.param_groups
        held = [p for p in group["params"] if p.grad is not None]
        parts: list[list[nn.Parameter]] = [[] for _ in range(self._helpers)]
        for p in held:
            parts[self._owner[p]].append(p)
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        for p, update in zip([p for part in parts for p in part], self._updates(parts, group), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1])))

    def _updates(self, parts: list[list[nn.Parameter]], group: dict) -> Iterator[Tensor]:
        """Of all matrices, by owner: its own are computed, the rest is told. Alone, one is held at a time."""
        if self.world.size == 1:
            yield from (self._update(p, group) for p in parts[0])
            return
        told = []
        for owner, part in enumerate(parts):
            if not part:
                continue
            flat = torch.empty(sum(p.numel() for p in part), dtype=torch.bfloat16, device=part[0].device)
            pieces = [piece.view(p.shape) for piece, p in zip(flat.split([p.numel() for p in part]), part, strict=True)]
            if owner == self.world.rank:
                for piece, p in zip(pieces, part, strict=True):
                    piece.copy_(self._update(p, group))
            work = None
            if dist.is_initialized():  # mm plan asks for no more than the sizes; bytes, which every backend knows
                work = dist.broadcast(flat.view(torch.uint8), src=owner, async_op=True)
            told.append((pieces, work))
        for pieces, work in told:
            awaited(work)
            yield from pieces

    def _update(self, p: nn.Parameter, group: dict) -> Tensor:
        assert p.grad is not None
        update = orthogonal(p.grad.lerp(self.state[p]["momentum_buffer"], group["momentum"]), group["steps"])
        if isinstance(p, DTensor):  # one with few rows comes back whole
            return cast("DTensor", update).redistribute(placements=p.placements)
        return update


def orthogonal(update: Tensor, steps: int) -> Tensor:
    """The nearest matrix whose singular values are about one (0.7 to 1.2), [rows, columns], in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = update.shape[0] > update.shape[1]
    x = update.bfloat16().T if tall else update.bfloat16()
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def shares(shapes: Sequence[tuple[int, ...]], size: int) -> list[int]:
    """Who of `size` processes orthogonalises which matrix: the costliest first, each to who has least to do."""
    load, owner = [0] * size, [0] * len(shapes)
    costs = [rows * columns * min(rows, columns) for rows, columns in shapes]
    for index in sorted(range(len(shapes)), key=lambda index: -costs[index]):
        owner[index] = load.index(min(load))
        load[owner[index]] += costs[index]
    return owner
