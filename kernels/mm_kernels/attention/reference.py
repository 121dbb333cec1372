"""Attention written out: the reference for every other form, and the fast form for short sequences on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`[B, Nq, H, D]`, with the scores `[B, H, Nq, Nk]` in memory and the softmax in float32 or wider."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # [B, H, N, D]
    scores = (q * scale) @ k.transpose(-1, -2)  # [B, H, Nq, Nk]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    rows, columns = scores.shape[-2:]
    visible = None if mask is None else mask[:, None, None, :]
    if causal:
        lower = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        visible = lower if visible is None else visible & lower
    if visible is None:
        weights = scores.softmax(-1)
    else:
        weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        if not _has_key_everywhere(mask, causal, rows, columns):
            weights = weights.masked_fill(~visible, 0.0)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def _has_key_everywhere(mask: Tensor | None, causal: bool, rows: int, columns: int) -> bool:
    return mask is None and (not causal or rows <= columns)
