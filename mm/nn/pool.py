"""From tokens to one vector a sample, and the gradient switch between objectives."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_tokens(x: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """`[B, D]` from x `[B, N, D]`: the mean of the real tokens, the first token, or the last real one."""
    if kind == "cls":
        return x[:, 0]
    if kind == "last":
        if mask is None:
            return x[:, -1]
        place = torch.arange(1, mask.shape[1] + 1, device=x.device)
        return x[torch.arange(len(x), device=x.device), (mask * place).argmax(1)]
    if mask is None:
        return x.mean(1)
    weight = mask.to(x.dtype)[..., None]  # [B, N, 1]
    return (x * weight).sum(1) / weight.sum(1)


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself, with its gradient multiplied by `scale`: 0 stops it, 1 leaves it alone."""
    if scale == 1.0:
        return x
    if scale == 0.0:
        return x.detach()
    return x * scale + x.detach() * (1.0 - scale)
