"""Averaged weights, and none where the decay is 0."""

from __future__ import annotations

import torch
from torch import nn

from mm.training.ema import Ema


def moved(decay: float) -> tuple[nn.Linear, Ema]:
    """A layer of ones whose weights became 3 since its averages began, which one update has seen."""
    layer = nn.Linear(2, 2, bias=False)
    nn.init.ones_(layer.weight)
    ema = Ema(layer, decay)
    nn.init.constant_(layer.weight, 3.0)
    ema.update(1000)
    return layer, ema


def test_averages_follow_the_weights_and_stand_in_for_them() -> None:
    layer, ema = moved(0.75)
    torch.testing.assert_close(ema.state()["weight"], torch.full((2, 2), 1.5))
    with ema.applied():
        assert layer.weight[0, 0] == 1.5 and not layer.training
    assert layer.weight[0, 0] == 3.0 and layer.training


def test_without_decay_the_averages_are_the_weights_and_take_no_memory() -> None:
    layer, ema = moved(0.0)
    assert ema.state()["weight"].data_ptr() == layer.weight.data_ptr()
    assert not ema.state()["weight"].requires_grad
    with ema.applied():
        assert layer.weight[0, 0] == 3.0 and not layer.training
    assert layer.training and dict(ema.export())["weight"][0, 0] == 3.0
