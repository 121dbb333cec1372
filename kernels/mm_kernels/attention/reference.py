"""Attention in torch: the reference for the kernels, what the op runs on a CPU, and the fast forms there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_kernels.ragged import Ragged


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
    if visible is None:
        weights = (scores - top).exp()
    else:  # e^-80 is nothing beside the largest, 1; far below, exp takes four times as long. A row may see no key
        weights = (scores - top).clamp_min(-80.0).exp() * visible
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


def attention_by_sample(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`[B, Nq, H, D]`, a sample at a time: two batched products, and torch's softmax on scores that stay in the cache.

    The scores are in the type of q. In bf16 on a CPU without tile instructions this takes about half the time of the
    fused form, whose products are too small for the library. mask `[B, Nk]`.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    hidden = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    for b in range(len(q)):
        head_q, head_k, head_v = (tensor[b].transpose(0, 1).contiguous() for tensor in (q, k, v))  # [H, N, D]
        scores = torch.bmm(head_q * scale, head_k.transpose(1, 2))  # [H, Nq, Nk]
        if hidden is not None:
            scores += hidden[b]
        out[b] = torch.bmm(torch.softmax(scores, -1), head_v).transpose(0, 1)
    if mask is not None and not mask.any(1).all():
        out.masked_fill_(~mask.any(1).view(-1, 1, 1, 1), 0.0)
    return out


SCORES = 1 << 24  # at once of packed sequences: beyond, halves of the batch follow each other, each padded to its own


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`[T, H, D]` and log-sum-exp `[H, T]` of packed sequences, padded for the scores and packed again."""
    samples = cu_q.shape[0] - 1
    if not torch.compiler.is_compiling() and samples > 0:  # what pads to the longest there is takes less time
        max_q, max_k = min(max_q, int(cu_q.diff().max())), min(max_k, int(cu_k.diff().max()))
        if samples > 1 and samples * q.shape[1] * max_q * max_k > SCORES:
            return _in_halves(q, k, v, cu_q, cu_k, causal, scale)
    same = cu_q is cu_k and max_q == max_k and q.shape[0] == k.shape[0]
    queries = Ragged.of(cu_q, max_q, q.shape[0])
    keys = queries if same else Ragged.of(cu_k, max_k, k.shape[0])
    visible = keys.real[:, None, :, None]  # [B, 1, Nk, 1]
    if causal:
        key, query = torch.arange(max_k, device=q.device)[:, None], torch.arange(max_q, device=q.device)
        later = 0 if same else (cu_k.diff() - cu_q.diff())[:, None, None, None]
        visible = visible & (key <= query + later)
    q, k, v = queries.pad(q), keys.pad(k), keys.pad(v)
    out, lse = explicit_attention(q, *repeated(q, k, v), visible=visible, scale=scale, with_lse=True)
    assert lse is not None
    lse = queries.pack(lse.transpose(1, 2)).masked_fill(~queries.kept[:, None], -torch.inf)
    return queries.pack(out), lse.transpose(0, 1)


def _in_halves(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    middle = (len(cu_q) - 1) // 2
    row, column = int(cu_q[middle]), int(cu_k[middle])
    first = (q[:row], k[:column], v[:column], cu_q[: middle + 1], cu_k[: middle + 1])
    second = (q[row:], k[column:], v[column:], cu_q[middle:] - row, cu_k[middle:] - column)
    outs, sums = zip(
        *(packed_attention(*half, len(half[0]), len(half[1]), causal, scale) for half in (first, second)), strict=True
    )
    return torch.cat(outs), torch.cat(sums, 1)


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
