"""The forward kernel of attention: online softmax over blocks of keys (arXiv 2205.14135, 2307.08691)."""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from mm_kernels.attention.tiles import (
    INFINITY,
    LN2,
    LOG2E,
    add_product,
    key_range,
    load,
    program,
    scores,
    sequence,
    store,
    times_rows,
    visible,
    zeros,
)


@triton.jit
def softmax_step(x, top, seen, log2_scale, PART: tl.constexpr):
    """Weights `[BM, BN]` of scores x, the new maximum and the factor of all that was summed under the old one.

    Maxima are of x log2_scale, so that a weight is one multiply-add and one exp2. With PART some keys are hidden, and a
    row may have seen none yet: its maximum is -inf, and 0 stands for it lest inf - inf be met.
    """
    if PART:
        x = tl.where(seen, x, -INFINITY)
    new = tl.maximum(top, tl.max(x, 1) * log2_scale)
    base = new
    if PART:
        base = tl.where(new == -INFINITY, 0.0, new)
    return tl.exp2(x * log2_scale - base[:, None]), new, tl.exp2(top - base)


@triton.jit(do_not_specialize=["blocks", "heads", "rows", "keys"])
def forward_kernel(Q, K, V, OUT, LSE, CU_Q, CU_K, MASK, BOUNDS, scale, blocks, heads, rows, keys,
                   q_row, k_row, v_row, lse_sample, lse_head,
                   GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    """OUT `[T, H, D]` and LSE, natural and float32, from Q `[T, H, D]`, K and V `[S, H / GROUP, D]`: BM rows each."""
    block, head, sample = program(blocks, heads)
    first_query, rows = sequence(CU_Q, rows, sample, PACKED)
    first_key, keys = sequence(CU_K, keys, sample, PACKED)
    if block * BM < rows:
        near, ahead = tl.arange(0, BM), tl.arange(0, BN)
        query = block * BM + near
        first = first_query + block * BM
        q = load(Q + first * q_row + head * D, near, q_row, query < rows, D, D1, D2, True)
        K += head // GROUP * D
        V += head // GROUP * D
        total = zeros(BM, D1, D2)
        top = tl.full([BM], -INFINITY, tl.float32)
        weight = tl.zeros([BM], tl.float32)
        whole, end = key_range(BOUNDS, sample, block * BM, rows, keys, BM, BN, MASKED, CAUSAL)
        low, high = 0, whole
        for PART in tl.static_range(2):  # blocks of keys that all queries see, then those with hidden ones
            for start in tl.range(low, high, BN):
                real = start + ahead < keys
                k = load(K + (first_key + start) * k_row, ahead, k_row, real, D, D1, D2, PART)
                seen = real
                if PART:
                    seen = visible(MASK, first_key, start + ahead, query, rows, keys, MASKED, CAUSAL)
                p, top, shrink = softmax_step(scores(q, k), top, seen, scale * LOG2E, PART)
                weight = weight * shrink + tl.sum(p, 1)
                v = load(V + (first_key + start) * v_row, ahead, v_row, real, D, D1, D2, PART)
                total = add_product(times_rows(total, shrink), p, v)
            low, high = whole, end
        total = times_rows(total, tl.where(weight > 0, 1.0 / weight, 0.0))
        store(OUT + first * (heads * D) + head * D, near, heads * D, query < rows, total, D)
        lse = tl.where(weight > 0, (top + tl.log2(weight)) * LN2, -INFINITY)
        LSE += sample.to(tl.int64) * lse_sample + head.to(tl.int64) * lse_head
        if PACKED:
            LSE += first_query
        tl.store(LSE + query, lse, mask=query < rows)
