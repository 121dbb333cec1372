"""The operations of `mm_kernels` from their torch references alone: what a bundle calls in their place."""

from __future__ import annotations

from torch import Tensor

from mm_kernels.adaln_modulate import reference as modulation
from mm_kernels.attention.reference import forward, fused_attention, repeated, visible_keys
from mm_kernels.qk_norm_rope import reference as rotation


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T scale) v: `mm_kernels.attention` by torch's own attention."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_q is not None:
        cu_k = cu_q if cu_k is None else cu_k
        return forward(q, k, v, mask, cu_q, cu_k, max_q or len(q), max_k or len(k), causal, scale)[0]
    k, v = repeated(q, k, v)
    visible = visible_keys(mask, causal, q.shape[1], k.shape[1], q.device)
    return fused_attention(q, k, v, visible=visible, scale=scale)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    wq: Tensor,
    wk: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = 1e-6,
    *,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mm_kernels.qk_norm_rope`."""
    return rotation.forward(q, k, wq, wk, cos, sin, positions, eps)


def adaln_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mm_kernels.adaln_modulate`."""
    out, h = modulation.forward(x, shift, scale, gate, residual, eps)
    return out if residual is None else (out, h)
