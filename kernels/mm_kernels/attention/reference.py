"""Attention written out: the reference for every other form, and the fast form for short sequences on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`[B, Nq, H, D]`, with the scores in memory and the softmax in float32 or wider.

    The scores lie transposed, `[B, H, Nk, Nq]`: a softmax over keys then runs along whole vectors of queries, and a
    mask is one number a row. Compiled, a block of the demo's denoiser takes less time than with `[.., Nq, Nk]`.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # [B, H, N, D]
    scores = k @ (q * scale).transpose(-1, -2)  # [B, H, Nk, Nq]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    columns, rows = scores.shape[-2:]
    hidden: Tensor | None = None
    if mask is not None:
        hidden = ~mask[:, None, :, None]
    if causal:
        later = torch.ones(columns, rows, dtype=torch.bool, device=q.device).tril(rows - columns - 1)
        hidden = later if hidden is None else hidden | later
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = (scores - scores.amax(-2, keepdim=True).detach()).exp()
    if hidden is not None:  # a row that sees no key
        weights = weights * ~hidden
    total = weights.sum(-2, keepdim=True)
    weights = weights / (total if hidden is None else total.clamp_min(torch.finfo(total.dtype).tiny))
    return (weights.to(v.dtype).transpose(-1, -2) @ v).transpose(1, 2)
