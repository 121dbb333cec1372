"""One tile of the loss in torch: the work that Triton's kernels do on a GPU (`triton_tiles.py`, same functions).

A tile is images `[M, E]` against texts `[N, E]`; image a belongs to text a + `first`, which may lie outside the tile.
Pairs have no part in it: `chunked.py` adds theirs, row by row.
Embeddings have the type of the statistics (float32 or float64), `scale` and `bias` are `[1]` in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EDGE = 512  # of a tile: float32 scores of 1 MB stay in the cache, and products over 512 rows run at full speed
SLOPES = False  # dL/dt costs nothing from the gradient of images, which is exact enough here
SAFE = 1e-25  # a sum of exponentials above it has lost nothing to underflow


def statistics(image: Tensor, text: Tensor, scale: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each image's `[M]` and each text's `[N]` logits; -inf where there are none."""
    scores = _logits(image, text, scale)
    scores.diagonal(first).fill_(-torch.inf)
    high = scores.max().clamp(min=torch.finfo(scores.dtype).min)
    powers = scores.sub_(high).exp_()
    rows, columns = powers.sum(1), powers.sum(0)
    if torch.minimum(rows.min(), columns.min()) < SAFE:  # one maximum for all is too high for some
        scores = _logits(image, text, scale)
        scores.diagonal(first).fill_(-torch.inf)
        return scores.logsumexp(1), scores.logsumexp(0)
    return rows.log_().add_(high), columns.log_().add_(high)


def softmax_weights(
    image: Tensor, text: Tensor, scale: Tensor, first: int, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """2N dL/d logits `[M, N]`: e^(s - r) + e^(s - c) with r `rows` `[M]`, c `columns` `[N]`; 0 on pairs. And sums.

    Sums are float64 `[3]`: of losses (sigmoid only), of weights (sigmoid only), of weights times ⟨I, T⟩ (SLOPES only).
    """
    scores = _logits(image, text, scale)
    weights = (scores - rows[:, None]).exp_()
    weights += scores.sub_(columns).exp_()
    weights.diagonal(first).zero_()
    return weights, weights.new_zeros(3, dtype=torch.float64)


def sigmoid_weights(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, first: int, gradients: bool
) -> tuple[Tensor, Tensor]:
    """N dL/d logits `[M, N]`: σ(z), 0 on pairs; nothing without `gradients`. And sums, the losses being softplus(z)."""
    logits = _logits(image, text, scale, bias)
    logits.diagonal(first).fill_(-torch.inf)
    sums = logits.new_zeros(3, dtype=torch.float64)
    sums[0] = F.softplus(logits).sum(1).double().sum()
    if not gradients:
        return logits.new_empty(0), sums
    weights = logits.sigmoid_()
    sums[1] = weights.sum(1).double().sum()
    return weights, sums


def add_product(out: Tensor, weights: Tensor, embeddings: Tensor) -> None:
    """out `[M, E]` += weights `[M, N]` @ embeddings `[N, E]`."""
    out.addmm_(weights, embeddings)


def _logits(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The factor goes into the product, which costs no pass over the tile and rounds once."""
    factor = float(scale)
    if bias is None:
        return torch.addmm(scale, image, text.T, beta=0, alpha=factor)
    return torch.addmm(bias, image, text.T, alpha=factor)
