"""The torch form of the q/k norm and rotary embedding, and its gradients written out."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the type of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[..., i], x[..., i + D / 2]) of x `[..., N, H, D]` by the angles of each position.

    cos and sin are `[N, D / 2]`, or `[..., N, D / 2]` where positions differ by sample.
    """
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]  # [..., N, 1, D / 2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def forward(
    q: Tensor,
    k: Tensor,
    wq: Tensor,
    wk: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Both, normed and rotated; shapes as `qk_norm_rope` has them."""
    q, k = rms_norm(q, wq, eps), rms_norm(k, wk, eps)
    if cos is None or sin is None:
        return q, k
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    wq: Tensor,
    wk: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, wq and wk, from those of the two results."""
    if cos is not None and sin is not None:
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        grad_q, grad_k = rotate(grad_q, cos, -sin), rotate(grad_k, cos, -sin)  # a rotation's transpose turns back
    (dq, dwq), (dk, dwk) = _norm_backward(grad_q, q, wq, eps), _norm_backward(grad_k, k, wk, eps)
    return dq, dk, dwq, dwk


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale
    inner = grad.to(wide.dtype) * weight
    dx = scale * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (grad.to(wide.dtype) * normed).flatten(0, -2).sum(0).to(weight.dtype)
