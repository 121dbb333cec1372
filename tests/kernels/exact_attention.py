"""Attention one sequence at a time, in the type it is given: what the tests of both forms compare with in float64."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The result and log-sum-exp of `mm_kernels.attention`, as its docstring has them."""
    cu_k = cu_q if cu_k is None else cu_k
    if cu_q is None or cu_k is None:
        samples = [(q[b], k[b], v[b]) for b in range(q.shape[0])]
    else:
        samples = [
            (q[a:b], k[c:d], v[c:d])
            for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
        ]
    results = [
        one_sequence(*sample, None if mask is None else mask[b], causal, scale) for b, sample in enumerate(samples)
    ]
    outs, sums = zip(*results, strict=True)
    return (torch.stack(outs), torch.stack(sums)) if cu_q is None else (torch.cat(outs), torch.cat(sums, 1))


def one_sequence(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """`[Nq, H, D]` and `[H, Nq]`."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows, columns = scores.shape[1:]
    seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(columns - rows)
    if mask is not None:
        seen = seen & mask
    some = seen.any(-1)
    # Rows without keys get harmless scores, lest the gradient of a softmax over nothing be NaN.
    scores = scores.masked_fill(~seen & some[:, None], -torch.inf)
    total = scores.logsumexp(-1) if columns else scores.sum(-1)
    weights = (scores - total[..., None]).exp() * some[:, None]
    return torch.einsum("hnm,mhd->nhd", weights, v), total.masked_fill(~some, -torch.inf)


def offsets(*lengths: int) -> Tensor:
    """`[B + 1]` int32, of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(rows: int, columns: int, heads: int, key_heads: int, width: int, samples: int | None = 2) -> list[Tensor]:
    """q, k, v, dense or, without `samples`, packed."""
    torch.manual_seed(rows * 1000 + columns * 10 + width)
    lead = () if samples is None else (samples,)
    return [torch.randn(*lead, n, h, width) for n, h in ((rows, heads), (columns, key_heads), (columns, key_heads))]
