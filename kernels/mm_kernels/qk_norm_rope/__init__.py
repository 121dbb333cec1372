"""RMS norm of queries and keys, then rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def qk_norm_rope(
    q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """q, k `[B, N, H, D]`: RMS norm over D with weights wq, wk `[D]`, then rotation by cos, sin `[N, D / 2]`.

    Statistics and rotation are in float32; the result has the type of the input. Without cos and sin only the norm.
    RMSNorm: arXiv 1910.07467; rotary embedding: arXiv 2104.09864.
    """
    q, k = rms_norm(q, wq, eps), rms_norm(k, wk, eps)
    if cos is None or sin is None:
        return q, k
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the type of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[..., i], x[..., i + D / 2]) of x `[B, N, H, D]` by the angles of each position."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]  # [N, 1, D / 2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
