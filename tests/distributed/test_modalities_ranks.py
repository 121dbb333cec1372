"""A third modality over gloo processes: gradients are those of one process, in micro-batches too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modality_line import LINE, build, make_batch, tiny
from torch import Tensor

from mm.distributed.parallelize import parallelize
from mm.distributed.world import World
from ranks import Trained

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def gradients(world: World, kind: str, strategy: Any, accumulate: int) -> dict[str, Tensor]:
    """Of the contrastive loss over image, text and line, each process having its rows of one batch."""
    config = tiny("all", LINE, kind=kind)
    config.objectives.diffusion = config.model.denoiser = None
    config.parallel.strategy = strategy
    step = build(config)
    part = make_batch(step).split(8 // world.size)[world.rank]
    parallel = parallelize(step, config.parallel, world, torch.device("cpu"), False)
    metrics = step.backward(part, accumulate, call=parallel.forward, sync=parallel.sync)
    found = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    found = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
    return {**found, "value": metrics["loss/contrastive"]}


@pytest.mark.parametrize(
    ("kind", "strategy", "accumulate"), [("softmax", "ddp", 1), ("softmax", "fsdp", 2), ("sigmoid", "ddp", 2)]
)
def test_two_processes_get_the_gradients_of_one(trained: Trained, kind: str, strategy: str, accumulate: int) -> None:
    one = gradients(World(), kind, strategy, 1)
    ranks = trained.team(2)(gradients, kind, strategy, accumulate)
    torch.testing.assert_close((ranks[0]["value"] + ranks[1]["value"]) / 2, one.pop("value"), atol=1e-6, rtol=1e-5)
    assert one["model.adapters.line.proj.weight"].abs().max() > 0
    for found in ranks:
        for name, wanted in one.items():
            torch.testing.assert_close(found[name], wanted, atol=2e-6, rtol=2e-4, msg=name)
