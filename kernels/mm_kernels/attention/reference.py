"""Attention in torch: the reference for the kernels, what the op runs on a CPU, and the fast forms there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, *, visible: Tensor | None, scale: float, with_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`[B, Nq, H, D]` and, if asked, log-sum-exp `[B, H, Nq]`, with scores in memory and a softmax in float32 or wider.

    The scores lie transposed, `[B, H, Nk, Nq]`: a softmax over keys then runs along whole vectors of queries, and a
    mask is one number a row. Compiled, a block of the demo's denoiser takes less time than with `[.., Nq, Nk]`.
    `visible` broadcasts to that shape.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # [B, H, N, D]
    scores = k @ (q * scale).transpose(-1, -2)  # [B, H, Nk, Nq]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if scores.shape[-2] == 0:  # no maximum to take; the zeros keep their gradient
        lse = scores.sum(-2) - torch.inf
        return (scores.to(v.dtype).transpose(-1, -2) @ v).transpose(1, 2), lse if with_lse else None
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    top = scores.amax(-2, keepdim=True).detach()
    weights = (scores - top).exp()
    if visible is not None:  # a row that sees no key
        weights = weights * visible
    total = weights.sum(-2, keepdim=True)
    safe = total if visible is None else total.clamp_min(torch.finfo(total.dtype).tiny)
    weights = weights / safe
    out = (weights.to(v.dtype).transpose(-1, -2) @ v).transpose(1, 2)
    if not with_lse:
        return out, None
    lse = safe.log() + top
    if visible is not None:
        lse = lse.masked_fill(total == 0, -torch.inf)
    return out, lse.squeeze(-2)


def visible_keys(mask: Tensor | None, causal: bool, rows: int, columns: int, device: torch.device) -> Tensor | None:
    """Which keys are seen, a bool that broadcasts to `[B, 1, Nk, Nq]`; None where all are."""
    seen = None if mask is None else mask[:, None, :, None]
    if causal:
        early = torch.ones(columns, rows, dtype=torch.bool, device=device).triu(rows - columns)
        seen = early if seen is None else seen & early
    return seen


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, visible: Tensor | None, scale: float) -> Tensor:
    """`[B, Nq, H, D]` by torch's scaled_dot_product_attention; `visible` as above."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    seen = None if visible is None else visible.transpose(-1, -2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    if seen is not None:  # torch's value for a row without keys differs by backend
        out = out.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2)


def padded(x: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed `[T, ..]` as `[B, longest, ..]`, zero where padded; lengths `[B, 1]`; and where tokens went, `[T]`.

    A token after the last sequence goes nowhere: its place is B longest.
    """
    first, lengths = offsets[:-1, None].long(), offsets.diff()[:, None].long()
    near = torch.arange(longest, device=x.device)
    real = near < lengths
    rows = x.index_select(0, (first + near).where(real, 0).flatten()) if x.shape[0] else x.new_zeros(0, *x.shape[1:])
    if not x.shape[0]:
        rows = x.new_zeros(real.numel(), *x.shape[1:])
    dense = rows.unflatten(0, tuple(real.shape)).masked_fill(~real[(..., *[None] * (x.ndim - 1))], 0)
    token = torch.arange(x.shape[0], device=x.device)
    sample = torch.searchsorted(offsets[1:].long().contiguous(), token, right=True)
    at = sample.clamp(max=max(len(first) - 1, 0))
    place = at * longest + token - first[:, 0].index_select(0, at) if len(first) else token
    return dense, lengths, place.where(sample < len(first), len(first) * longest)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`[T, H, D]` and log-sum-exp `[H, T]` of packed sequences, padded for the scores and packed again."""
    (q, rows, place), (k, columns, _), (v, _, _) = (
        padded(q, cu_q, max_q),
        padded(k, cu_k, max_k),
        padded(v, cu_k, max_k),
    )
    key, query = torch.arange(max_k, device=q.device)[:, None], torch.arange(max_q, device=q.device)
    visible = (key < columns[..., None])[:, None]  # [B, 1, Nk, 1]
    if causal:
        visible = visible & (key <= query + (columns - rows)[..., None])[:, None]
    out, lse = explicit_attention(q, *repeated(q, k, v), visible=visible, scale=scale, with_lse=True)
    assert lse is not None
    out, lse = out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)  # [B max_q, ..]; one more row for the tokens
    out, lse = F.pad(out, (0, 0, 0, 0, 0, 1)), F.pad(lse, (0, 0, 0, 1), value=-torch.inf)  # of no sequence
    return out.index_select(0, place), lse.index_select(0, place).transpose(0, 1)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with as many heads as q: each of theirs serves that many neighbouring ones of q."""
    group = q.shape[-2] // k.shape[-2]
    return (k, v) if group == 1 else (k.repeat_interleave(group, -2), v.repeat_interleave(group, -2))


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int,
    max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the op returns: attention as q, and its log-sum-exp, `[B, H, Nq]` or packed `[H, T]`."""
    if cu_q is not None and cu_k is not None:
        return packed_attention(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale)
    visible = visible_keys(mask, causal, q.shape[1], k.shape[1], q.device)
    out, lse = explicit_attention(q, *repeated(q, k, v), visible=visible, scale=scale, with_lse=True)
    assert lse is not None
    return out, lse
