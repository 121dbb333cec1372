"""Scaled dot-product attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_kernels.attention.reference import explicit_attention

# On a CPU the fused form takes more than twice as long, backward included, while the scores still fit in the cache
# (benchmarks/attention_cpu.json); beyond this many scores a head, memory decides and the fused form is used.
EXPLICIT_SCORES = 512 * 512


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(q k^T scale) v, `[B, Nq, H, D]`, from q `[B, Nq, H, D]` and k, v `[B, Nk, H, D]`.

    `mask` `[B, Nk]` is True where a key is real; `causal` is aligned to the last key: query i sees keys
    <= i + Nk - Nq. `scale` defaults to D ** -0.5. A row that sees no key gives zeros.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type == "cpu" and training and q.shape[1] * k.shape[1] <= EXPLICIT_SCORES:
        return explicit_attention(q, k, v, mask=mask, causal=causal, scale=scale)
    visible = None if mask is None else mask[:, None, None, :]
    if causal:
        rows, columns = q.shape[1], k.shape[1]
        lower = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        visible = lower if visible is None else visible & lower
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    if visible is not None:  # torch's value for a row without keys differs by backend
        out = out.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2)
