"""How well the denoiser draws an image back when it is told a label: what a diffusion classifier compares.

An image is noised at evenly spaced levels and drawn back once a label, every label from the same noise at the same
levels ("Your diffusion model is secretly a zero-shot classifier", arXiv 2303.16203; also arXiv 2303.15233).

Letters: B images, K candidate labels of each, R levels, P pairs of image and label in a forward, C H W latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm.config import ConfigError
from mm.diffusion.noise import normal
from mm.diffusion.schedule import Schedule
from mm.types import Encoded, Tokens

if TYPE_CHECKING:
    from mm.evaluation.inference import Inference, Items

LEVELS = 1000  # stream of the first level's noise; each level has its own, training and drawing use others
SMALLEST = 1e-12  # mean squared error that counts as none: its logarithm must be a number
_ROWS = 16  # noisy images in a forward, for each picture that is drawn in one


class Explainer:
    """Scores of images under texts; the texts are encoded here, once.

    The noise of level i depends on `seed` and i and on nothing else: not on the image, the label or the call.
    """

    def __init__(self, inference: Inference, texts: Sequence[str], *, levels: int, seed: int) -> None:
        """Raises ConfigError where the model was trained without diffusion."""
        diffusion = inference.config.objectives.diffusion
        if inference.model.denoiser is None or diffusion is None:
            raise ConfigError(
                "objectives.diffusion = None: this model was trained without it and cannot explain images"
            )
        self.inference, self.levels, self.seed = inference, levels, seed
        self.schedule = Schedule.from_config(diffusion)
        tokens, self.mask, pooled = inference.text_condition(texts)
        self.tokens, self.pooled = tokens.float(), pooled.float()

    def latents(self, images: Tensor) -> Tensor:
        """What diffusion noises, float32 `[B, C, H, W]`, of uint8 `[B, 3, H, W]`."""
        model = self.inference.model

        def encode(pixels: Tensor) -> Items:
            return (model.latents.encode(pixels.to(model.device)).float(),)

        return self.inference.run(encode, (images,), self.inference.size("draw"))[0]

    def scores(self, latents: Tensor, candidates: Tensor, levels: Sequence[int], label: str = "") -> Tensor:
        """float64 `[B, K]`: minus the log of the mean squared error, summed over some of the levels.

        `candidates` int64 `[B, K]`: places of the texts that each image is drawn from. `label` is that of a bar.

        exp(-score / R) is the geometric mean of |x - x̂(z, sigma, text)|² / CHW. Up to a factor the score is the log
        likelihood of x around x̂ where nothing is known of the variance at a level, which differs from image to image
        more than from label to label. How a level is weighted (as x, noise or velocity) cancels between labels.
        """
        count, found = candidates.numel(), torch.zeros(candidates.shape, dtype=torch.float64)
        pairs = (torch.arange(len(candidates)).repeat_interleave(candidates.shape[1]), candidates.flatten())
        alone = self.inference.size("draw") == 1  # then an item's place must be always the same
        rows = _ROWS * self.inference.size("draw")
        pieces = [levels[start : start + rows] for start in range(0, len(levels), rows)] if count else []
        for number, piece in enumerate(pieces, 1):
            size = 1 if alone else max(1, rows // len(piece))
            bar = label and (label if len(pieces) == 1 else f"{label}, part {number} of {len(pieces)}")
            errors = self.inference.run(_Errors(self, latents, piece), pairs, size, bar)[0].cpu()  # [B K, R]
            # image by image: of a logarithm, the last bit may depend on the place in a tensor
            for row, part in zip(found, errors.double().clamp_min(SMALLEST).unflatten(0, found.shape), strict=True):
                row -= part.log().sum(1)
        return found


class _Errors:
    """Places of images and texts, int64 `[P]` each, to mean squared errors `[P, R]` at some levels."""

    def __init__(self, explainer: Explainer, latents: Tensor, levels: Sequence[int]) -> None:
        self.explainer, self.latents = explainer, latents
        seed, shape = torch.tensor([explainer.seed]), tuple(latents.shape[1:])
        self.noise = torch.cat([normal(seed, shape, LEVELS + level) for level in levels]).to(latents.device)  # [R, ..]
        self.sigma = ((torch.tensor(levels) + 0.5) / explainer.levels).to(latents.device)  # [R]

    def __call__(self, images: Tensor, texts: Tensor) -> Items:
        model, told = self.explainer.inference.model, self.explainer
        assert model.denoiser is not None
        pairs, count = len(images), len(self.sigma)
        tokens, mask, text = (column[texts.to(column.device)] for column in (told.tokens, told.mask, told.pooled))
        encoded = {"text": Encoded(Tokens(tokens, mask, max_len=tokens.shape[1]), text)}
        keep = {"text": torch.ones(pairs, device=text.device), "image": torch.zeros(pairs, device=text.device)}
        condition, pooled = model.condition(encoded, keep)
        x = self.latents[images.to(self.latents.device)].repeat_interleave(count, 0)  # [P R, C, H, W]
        sigma = self.sigma.repeat(pairs)
        z = told.schedule.add_noise(x, self.noise.repeat(pairs, 1, 1, 1), sigma)
        drawn = model.denoiser(z, sigma, condition, pooled).float()
        return ((x - drawn).square().flatten(1).mean(1).view(pairs, count),)


def rounds_of(levels: int, rounds: int) -> list[range]:
    """The levels 0 ... levels - 1 dealt out so that each round's are evenly spaced."""
    return [range(first, levels, rounds) for first in range(rounds)]


def survivors(count: int, keep: float) -> int:
    """How many of `count` candidates a round leaves."""
    return min(count, max(1, math.ceil(keep * count)))
