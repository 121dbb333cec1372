"""Two opinions on the same candidates as one: log p by contrast and a score by drawing, added with fitted weights.

Letters: N or B images, L labels, K candidates of each image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGE = 1e-4  # on both weights, in units of the spread of what they weigh: a perfect separation has no best weight
_TURNS = 200


@dataclass(frozen=True)
class Fusion:
    """What `fit` found on `n` images: the weights, and nats an image and top-1 among the candidates.

    "before" is the contrastive opinion by itself (of drawing alone: no opinion).
    """

    alpha: float
    beta: float
    n: int
    nll_before: float
    nll_after: float
    right_before: float
    right_after: float

    def __str__(self) -> str:
        return (
            f"alpha {self.alpha:.3g}, beta {self.beta:.3g} from {self.n:,} images: negative log likelihood "
            f"{self.nll_before:.4f} -> {self.nll_after:.4f}, top-1 {100 * self.right_before:.1f} % -> "
            f"{100 * self.right_after:.1f} % of those with their label among the candidates"
        )


def fit(prior: Tensor, scores: Tensor, truth: Tensor, *, free: bool = True) -> Fusion:
    """Weights of at least 0 with which softmax(alpha prior + beta scores) makes the truth likeliest.

    `prior` and `scores` float64 `[N, K]`, `truth` int64 `[N]`: places among the candidates. `free` False leaves alpha
    at 1. A conditional logit: concave in both weights, by Newton's method; where drawing does not help, beta is 0.
    """
    columns = torch.stack([prior, scores], -1)  # [N, K, 2]
    columns = columns - columns.mean(1, keepdim=True)
    spread = columns.square().mean((0, 1)).sqrt().clamp_min(1e-12)
    features, own = columns / spread, truth[:, None]
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    alone = (_newton(features, own, start * spread, [0]) if free else start * spread) / spread
    free_ones = [0, 1] if free else [1]
    both = _newton(features, own, alone * spread, free_ones) / spread
    if both[1] <= 0:
        both = alone
    elif both[0] < 0:
        both = _newton(features, own, torch.zeros_like(start), [1]) / spread
    before, after = (columns @ weights for weights in (start, both))

    def right(values: Tensor) -> float:
        return float((values.argmax(1) == truth).double().mean())

    return Fusion(
        float(both[0].clamp_min(0)),
        float(both[1].clamp_min(0)),
        len(truth),
        float(F.cross_entropy(before, truth)),
        float(F.cross_entropy(after, truth)),
        right(before),
        right(after),
    )


def _newton(features: Tensor, own: Tensor, start: Tensor, free: list[int]) -> Tensor:
    """The weights `[2]`, those not `free` as at the start, with the least negative log likelihood and ridge."""
    weights = start.clone()
    for _ in range(_TURNS):
        value, slope, curve = _likelihood(features, own, weights)
        step = torch.zeros_like(weights)
        step[free] = torch.linalg.solve(curve[free][:, free], slope[free])
        size = 1.0
        while size > 1e-9 and _likelihood(features, own, weights - size * step)[0] > value - 1e-4 * size * slope @ step:
            size /= 2
        weights = weights - size * step
        if float((size * step).abs().max()) <= 1e-10:
            break
    return weights


def _likelihood(features: Tensor, own: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean negative log likelihood with the ridge, its gradient and its Hessian."""
    logits = features @ weights  # [N, K]
    p = logits.softmax(1)[..., None]
    mean = (p * features).sum(1)  # [N, 2]
    value = (logits.logsumexp(1) - logits.gather(1, own)[:, 0]).mean() + RIDGE / 2 * weights.square().sum()
    slope = (mean - features.gather(1, own[..., None].expand(-1, 1, 2))[:, 0]).mean(0) + RIDGE * weights
    apart = features - mean[:, None]
    curve = torch.einsum("nkc,nkd->cd", p * apart, apart) / len(own) + RIDGE * torch.eye(2, dtype=torch.float64)
    return value, slope, curve


def fused(contrastive: Tensor | None, places: Tensor, prior: Tensor, values: Tensor, kind: str) -> Tensor:
    """Probabilities float32 `[B, L]`: the candidates' by `values` float64 `[B, K]`, all others as they were.

    `contrastive` `[B, L]` None: the candidates are all labels, and their softmax is the answer. "softmax": the
    candidates share what was theirs anew. "sigmoid": the change of each logit against `prior`, less the mean change, so
    that the candidates stay as likely as they were on the whole. Either way the likeliest label is a candidate.
    """
    if contrastive is None:
        return torch.stack([row.softmax(0) for row in values]).float() if len(values) else values.float()
    found = contrastive.clone()
    for row, place, before, value in zip(found, places, prior, values, strict=True):
        if kind == "sigmoid":
            change = value - before
            row[place] = (before + change - change.mean()).sigmoid().float()
        else:
            row[place] = (row[place].double().sum() * value.softmax(0)).float()
    return found
