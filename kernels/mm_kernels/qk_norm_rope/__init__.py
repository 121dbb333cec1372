"""RMS norm of queries and keys, then rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_kernels import forward_mode
from mm_kernels.qk_norm_rope import reference
from mm_kernels.qk_norm_rope.op import QkNormRope, qk_norm_rope_op
from mm_kernels.qk_norm_rope.reference import rms_norm, rotate
from mm_kernels.runtime import use_triton

__all__ = ["qk_norm_rope", "rms_norm", "rotate"]


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
    """RMS norm over D with weights wq, wk `[D]`, then rotation by cos, sin; the shapes and types of q and k.

    q and k are `[B, N, H, D]`, or packed `[T, H, D]`, and may differ in H. cos and sin are `[N, D / 2]` (packed:
    `[T, D / 2]`); with integer `positions` `[B, N]` (packed: `[T]`) they are tables `[P, D / 2]` from which each token
    takes the row of its position, 0 <= position < P: outside, torch raises an IndexError (or counts back from the end)
    and a kernel gives NaN. One- and two-dimensional embeddings differ in cos and sin only. Without both only the norm.
    Statistics and rotation are in float32; float64 in float64. Raises ValueError where shapes do not fit.
    RMSNorm: arXiv 1910.07467; rotary embedding: arXiv 2104.09864.
    """
    _check(q, k, wq, wk, cos, sin, positions)
    if not use_triton(q):
        return reference.forward(q, k, wq, wk, cos, sin, positions, eps)
    forward_mode.refuse_functorch("qk_norm_rope")
    if forward_mode.active():
        return forward_mode.apply(QkNormRope, q, k, wq, wk, cos, sin, positions, eps)
    return qk_norm_rope_op(q, k, wq, wk, cos, sin, positions, eps)


def _check(
    q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None
) -> None:
    """A kernel reads by these shapes; torch would broadcast some that are wrong."""
    if not (isinstance(wq, Tensor) and isinstance(wk, Tensor)):
        raise ValueError("wq, wk: must be tensors [D]; ones where nothing is learned")
    if not (q.is_floating_point() and k.is_floating_point()):
        raise ValueError(f"q and k are {q.dtype} and {k.dtype}: must be of a floating type")
    width = q.shape[-1]
    if q.ndim not in (3, 4) or q.shape[:-2] != k.shape[:-2] or k.shape[-1] != width:
        raise ValueError(f"q {[*q.shape]}, k {[*k.shape]}: both [B, N, H, D] or both [T, H, D], equal but for H")
    if wq.shape != (width,) or wk.shape != (width,):
        raise ValueError(f"wq {[*wq.shape]}, wk {[*wk.shape]}: the weights of heads of width {width} are [{width}]")
    if cos is None or sin is None:
        if not (cos is None and sin is None and positions is None):
            raise ValueError("cos, sin and positions: give cos and sin both, positions only with them")
        return
    rows = q.shape[-3] if positions is None else cos.shape[0]
    if width % 2 or cos.shape != (rows, width // 2) or sin.shape != cos.shape:
        raise ValueError(f"cos {[*cos.shape]}, sin {[*sin.shape]} for q {[*q.shape]}: [{rows}, D / 2] with an even D")
    if positions is not None and (positions.shape != q.shape[:-2] or positions.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"positions {[*positions.shape]}, {positions.dtype}: int32 or int64 {[*q.shape[:-2]]}")
