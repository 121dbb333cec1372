"""From noise to images: integrate dz/dsigma = (z - x) / sigma from a first noise level down to 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from mm.diffusion.schedule import Schedule

Predict = Callable[[Tensor, Tensor], Tensor]  # (z [B, C, H, W], sigma [B]) -> predicted x
Solver = Literal["euler", "heun", "dpmpp_2m"]
SOLVERS: tuple[str, ...] = get_args(Solver)


def sample(
    predict: Predict,
    noise: Tensor,
    schedule: Schedule,
    steps: int,
    solver: Solver = "euler",
    progress: Callable[[int, Tensor], None] | None = None,
    *,
    start: Tensor | None = None,
    strength: float = 1.0,
    redraw: Tensor | None = None,
) -> Tensor:
    """Images x `[B, C, H, W]` from standard normal `noise` in `steps` levels; the last gives the prediction itself.

    With `start`, images x, the path begins at their noised form at level `strength` (shifted), and all of the levels
    lie below it. With `redraw` too, bool `[B, 1, H, W]`, only what is True there is drawn: elsewhere the prediction is
    `start`, so that the path is its noised form at every level (inpainting as in arXiv 2201.09865, one noise
    throughout). `progress(step, x)` is called with each level's prediction.

    - euler: first order; the network runs `steps` times.
    - heun: second order (EDM, arXiv 2206.00364); 2 `steps` - 1 times.
    - dpmpp_2m: second order but for a log of `steps`, from the prediction before (DPM-Solver++(2M), arXiv 2211.01095);
      `steps` times.
    """
    sigmas = schedule.sampling_sigmas(steps, strength).to(noise.device)
    z = noise * schedule.noise_scale if start is None else schedule.add_noise(start, noise, sigmas[:1])
    if start is not None and redraw is not None:
        predict = _held(predict, schedule, start, noise, redraw)
    before = None  # the prediction at the level before
    for step in range(steps):
        now, then = sigmas[step].expand(len(z)), sigmas[step + 1].expand(len(z))
        x = predict(z, now)
        if progress is not None:
            progress(step, x)
        if step + 1 == steps:
            return x
        width = (then - now).view(-1, 1, 1, 1)
        if solver == "dpmpp_2m" and before is not None:
            # The path is alpha x + beta eps with alpha = 1 - sigma, beta = sigma s; in l = log(alpha / beta) its exact
            # solution is z' = beta'/beta z + beta' int exp(l) x dl. With x at the middle of the step in l, on a line
            # through this prediction and the one before, that is the straight step below towards that x.
            extrapolated = _half_step(schedule, sigmas[step - 1 : step + 2])
            x, before = x + extrapolated * (x - before), x
        else:
            before = x
        velocity = schedule.velocity(z, x, now)
        ahead = z + width * velocity
        if solver == "heun":
            ahead = z + width * (velocity + schedule.velocity(ahead, predict(ahead, then), then)) / 2
        z = ahead
    return z


def _held(predict: Predict, schedule: Schedule, start: Tensor, noise: Tensor, redraw: Tensor) -> Predict:
    """The prediction where `redraw` is True, made of a z that elsewhere is the noised `start`; elsewhere `start`."""

    def held(z: Tensor, sigma: Tensor) -> Tensor:
        known = schedule.add_noise(start, noise, sigma)  # z itself strays from it a little below the schedule's floor
        return torch.where(redraw, predict(torch.where(redraw, z, known), sigma), start)

    return held


def _half_step(schedule: Schedule, sigmas: Tensor) -> Tensor:
    """Half of the coming step over the one before, both in the log of signal to noise; 0 after pure noise."""
    past, now, then = (torch.logit(sigmas.double(), eps=None)).unbind()  # -l, less log s, which cancels
    return ((now - then) / (2 * (past - now))).float()
