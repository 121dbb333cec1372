"""Small checkpoints whose content says which step it is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.config import CheckpointConfig
from mm.distributed.world import World
from mm.training.checkpoint import Checkpoints, Found

POINTS = "begin staged written hashed manifest renamed latest pruned".split()
BEFORE = POINTS[: POINTS.index("renamed")]  # the points at which the new checkpoint does not count yet


def content(step: int) -> dict[str, Tensor]:
    """Tensors of every kind that a training has: weights, buffers, counters, nothing at all."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model/weight": torch.randn(37, 5, generator=generator),
        "model/transposed": torch.randn(5, 37, generator=generator).T,
        "model/part": torch.randn(64, generator=generator)[3:17],
        "model/half": torch.randn(9, generator=generator).bfloat16(),
        "model/empty": torch.empty(0, 3),
        "model/mask": torch.rand(6, generator=generator) > 0.5,
        "optim/weight/step": torch.tensor(float(step)),
        "optim/weight/count": torch.tensor([step], dtype=torch.int64),
    }


def checkpoints(run: Path, world: World | None = None, **config: Any) -> Checkpoints:
    return Checkpoints(run, CheckpointConfig(**config), world or World())


def save(run: Path, step: int, world: World | None = None, **config: Any) -> None:
    """One whole checkpoint of `content(step)`."""
    checkpoints(run, world, **config).save(step, content(step), {"order": f"o{step}"}, wait=True)


def state(run: Path, world: World | None = None) -> tuple[Found, dict[str, Tensor]]:
    """The newest whole checkpoint and all that is in it, as plain tensors."""
    saved = checkpoints(run, world)
    found = saved.newest()
    assert found is not None
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in found.names.items()}
    saved.read(found, tensors)
    return found, tensors


def same(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return tensors.keys() == wanted.keys() and all(
        tensors[name].dtype == wanted[name].dtype and torch.equal(tensors[name], wanted[name]) for name in wanted
    )


def whole(run: Path, step: int, world: World | None = None) -> bool:
    """Whether the newest checkpoint is of that step, and all of it is."""
    found, tensors = state(run, world)
    return found.step == step and found.scalars == {"order": f"o{step}"} and same(tensors, content(step))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())
