"""From noise to images: integrate dz/dsigma from sigma = 1 to 0 along the schedule's levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mm.diffusion.schedule import Schedule

Predict = Callable[[Tensor, Tensor], Tensor]  # (z [B, C, H, W], sigma [B]) -> predicted x
Solver = Literal["euler", "heun"]


def sample(
    predict: Predict,
    noise: Tensor,
    schedule: Schedule,
    steps: int,
    solver: Solver = "euler",
    progress: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Images x `[B, C, H, W]` from standard normal `noise` in `steps` levels.

    Euler evaluates the network once a level; Heun twice (all but the last), which is second order (EDM, arXiv
    2206.00364). `progress(step, x)` is called with each prediction.
    """
    sigmas = schedule.sampling_sigmas(steps).to(noise.device)
    z = noise * schedule.noise_scale
    for step in range(steps):
        now, then = sigmas[step].expand(len(z)), sigmas[step + 1].expand(len(z))
        x = predict(z, now)
        if progress is not None:
            progress(step, x)
        if step + 1 == steps:  # at the last level the path ends in the prediction itself
            return x
        width = (then - now).view(-1, 1, 1, 1)
        velocity = schedule.velocity(z, x, now)
        ahead = z + width * velocity
        if solver == "heun":
            ahead = z + width * (velocity + schedule.velocity(ahead, predict(ahead, then), then)) / 2
        z = ahead
    return z


def guided(predict_both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], guidance: float) -> Predict:
    """Classifier-free guidance (arXiv 2207.12598): without + guidance * (with - without)."""

    def predict(z: Tensor, sigma: Tensor) -> Tensor:
        shown, hidden = predict_both(z, sigma)
        return torch.lerp(hidden, shown, guidance)

    return predict
