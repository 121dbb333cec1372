"""Our Muon against torch's, and how its work is shared out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from mm.training.muon import Muon, orthogonal, shares

SHAPES = [(8, 8), (24, 8), (8, 24), (16, 5)]
OPTIONS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_bitwise_those_of_torchs_muon(dtype: torch.dtype) -> None:
    ours, theirs, generator = parameters(dtype), parameters(dtype), torch.Generator().manual_seed(1)
    one, other = Muon(ours, steps=4, **OPTIONS), torch.optim.Muon(theirs, ns_steps=4, **OPTIONS)
    for step in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.clone()
        if step == 2:
            ours[1].grad = theirs[1].grad = None
        one.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(one.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonal(update, 5).float())
    assert values.min() > 0.6 and values.max() < 1.25
    assert torch.equal(orthogonal(torch.zeros(shape), 5), torch.zeros(shape, dtype=torch.bfloat16))


def test_every_process_gets_its_part_of_the_work() -> None:
    shapes = [(192, 192)] * 6 + [(768, 192)] * 3 + [(320, 1280)] * 2 + [(64, 64)]
    owner = shares(shapes, 3)
    load = [
        sum(a * b * min(a, b) for (a, b), who in zip(shapes, owner, strict=True) if who == rank) for rank in (0, 1, 2)
    ]
    assert max(load) < 1.4 * sum(load) / 3 or max(load) == max(a * b * min(a, b) for a, b in shapes)
    assert shares(shapes, 1) == [0] * len(shapes)
    assert sorted(shares(shapes[:2], 5)) == [0, 1], "more processes than matrices"
    assert all(a != b for a, b in pairwise(shares([(8, 8)] * 6, 2)))
