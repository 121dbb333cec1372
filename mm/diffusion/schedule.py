"""The noise path, the distribution of noise levels, and what the network's output means.

sigma = 1 is pure noise and sigma = 0 the clean image, as in diffusers: z = (1 - sigma) x + sigma s eps. The network
predicts x (arXiv 2511.13720); everything else follows from it. Training and sampling go through this one object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mm.config import DiffusionConfig


@dataclass(frozen=True)
class Schedule:
    """A straight path from data to noise of standard deviation `noise_scale`."""

    sigma_mean: float = 0.8
    sigma_std: float = 0.8
    noise_scale: float = 1.0
    shift: float = 1.0
    floor: float = 0.05  # smallest divisor of a velocity: near sigma = 0 the prediction itself is the answer

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> Schedule:
        return cls(config.sigma_mean, config.sigma_std, config.noise_scale, config.shift)

    def training_sigma(self, normal: Tensor) -> Tensor:
        """Noise levels in (0, 1) from standard normal draws: logit-normal, then shifted."""
        return self._shift(torch.sigmoid(self.sigma_mean + self.sigma_std * normal))

    def sampling_sigmas(self, steps: int, strength: float = 1.0) -> Tensor:
        """`[steps + 1]` levels from `strength` (1: pure noise) down to 0, shifted once."""
        return self._shift(torch.linspace(strength, 0.0, steps + 1, dtype=torch.float64)).float()

    def add_noise(self, x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """z at level sigma `[B]` from images x and standard normal noise `[B, C, H, W]`."""
        sigma = sigma.view(-1, 1, 1, 1)
        return (1 - sigma) * x + sigma * self.noise_scale * noise

    def velocity(self, z: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """dz/dsigma = (z - x) / sigma, from the true or the predicted x; sigma `[B]`."""
        return (z - x) / self.floored(sigma).view(-1, 1, 1, 1)

    def floored(self, sigma: Tensor) -> Tensor:
        """What a difference of pictures is divided by for one of velocities: sigma, but never next to nothing."""
        return sigma.clamp_min(self.floor)

    def _shift(self, sigma: Tensor) -> Tensor:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)
