"""Away from what a picture is not: a prediction that knows the condition, held against one that does not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mm.diffusion.sampler import Predict

EVERYWHERE = (0.0, 1.0)


def guided(predict_both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], guidance: float) -> Predict:
    """Classifier-free guidance (arXiv 2207.12598): without + guidance * (with - without).

    `predict_both` gives the prediction with the condition and the other one: without it, after a negative text, or
    that of a weaker model with the same condition (autoguidance, arXiv 2406.02507).
    """

    def predict(z: Tensor, sigma: Tensor) -> Tensor:
        shown, hidden = predict_both(z, sigma)
        return torch.lerp(hidden, shown, guidance)

    return predict


def within(interval: tuple[float, float], inside: Predict, outside: Predict) -> Predict:
    """`inside` at noise levels from `interval[0]` to `interval[1]`, both included, `outside` at others.

    Guidance in the middle of the path only gives better pictures (arXiv 2404.07724), and what is not guided costs one
    prediction instead of two. All of a call's sigma `[B]` must be one level.
    """
    if interval == EVERYWHERE:
        return inside
    low, high = torch.tensor(interval).tolist()  # rounded as levels are, or 0.7 would lie below 0.7

    def predict(z: Tensor, sigma: Tensor) -> Tensor:
        return (inside if low <= float(sigma[0]) <= high else outside)(z, sigma)

    return predict
