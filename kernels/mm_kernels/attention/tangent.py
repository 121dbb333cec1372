"""Attention and its directional derivative in one pass over the keys, for few-step diffusion (arXiv 2505.13447).

With s = scale q k^T, p = softmax(s) and ds = scale (dq k^T + q dk^T): d lse = rowsum(p ds) and
d out = (p ds) v + p dv - d lse out. All are sums over keys, rescaled with the running maximum as in the forward.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from mm_kernels.attention.forward import softmax_step
from mm_kernels.attention.tiles import (
    INFINITY,
    LN2,
    LOG2E,
    add_product,
    key_range,
    load,
    more_scores,
    program,
    scores,
    sequence,
    store,
    times_rows,
    visible,
    zeros,
)


@triton.jit
def add_rows(tile, other, factor):
    """tile + factor `[R]` other."""
    if len(tile) > 1:
        return (tile[0] + factor[:, None] * other[0], tile[1] + factor[:, None] * other[1])
    else:
        return (tile[0] + factor[:, None] * other[0],)


@triton.jit(do_not_specialize=["blocks", "heads", "rows", "keys"])
def tangent_kernel(Q, K, V, TQ, TK, TV, OUT, TOUT, LSE, TLSE, CU_Q, CU_K, MASK, BOUNDS, scale, blocks, heads, rows,
                   keys, q_row, k_row, v_row, lse_sample, lse_head,
                   GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    """OUT and LSE as the forward kernel's, and their tangents; TQ, TK, TV lie as Q, K, V do."""
    block, head, sample = program(blocks, heads)
    first_query, rows = sequence(CU_Q, rows, sample, PACKED)
    first_key, keys = sequence(CU_K, keys, sample, PACKED)
    if block * BM < rows:
        near, ahead = tl.arange(0, BM), tl.arange(0, BN)
        query = block * BM + near
        first = first_query + block * BM
        place = first * q_row + head * D
        q = load(Q + place, near, q_row, query < rows, D, D1, D2, True)
        tq = load(TQ + place, near, q_row, query < rows, D, D1, D2, True)
        total, tangent = zeros(BM, D1, D2), zeros(BM, D1, D2)
        top = tl.full([BM], -INFINITY, tl.float32)
        weight, slope = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        whole, end = key_range(BOUNDS, sample, block * BM, rows, keys, BM, BN, MASKED, CAUSAL)
        low, high = 0, whole
        for PART in tl.static_range(2):  # blocks of keys that all queries see, then those with hidden ones
            for start in tl.range(low, high, BN):
                real = start + ahead < keys
                place = (first_key + start) * k_row + head // GROUP * D
                k = load(K + place, ahead, k_row, real, D, D1, D2, PART)
                tk = load(TK + place, ahead, k_row, real, D, D1, D2, PART)
                seen = real
                if PART:
                    seen = visible(MASK, first_key, start + ahead, query, rows, keys, MASKED, CAUSAL)
                p, top, shrink = softmax_step(scores(q, k), top, seen, scale * LOG2E, PART)
                ds = p * (more_scores(tq, k, scores(q, tk)) * scale)
                weight = weight * shrink + tl.sum(p, 1)
                slope = slope * shrink + tl.sum(ds, 1)
                place = (first_key + start) * v_row + head // GROUP * D
                v = load(V + place, ahead, v_row, real, D, D1, D2, PART)
                tv = load(TV + place, ahead, v_row, real, D, D1, D2, PART)
                total = add_product(times_rows(total, shrink), p, v)
                tangent = add_product(add_product(times_rows(tangent, shrink), ds, v), p, tv)
            low, high = whole, end
        inverse = tl.where(weight > 0, 1.0 / weight, 0.0)
        total = times_rows(total, inverse)
        slope *= inverse
        tangent = add_rows(times_rows(tangent, inverse), total, -slope)
        start = first * (heads * D) + head * D
        store(OUT + start, near, heads * D, query < rows, total, D)
        store(TOUT + start, near, heads * D, query < rows, tangent, D)
        at = sample.to(tl.int64) * lse_sample + head.to(tl.int64) * lse_head + query
        if PACKED:
            at += first_query
        lse = tl.where(weight > 0, (top + tl.log2(weight)) * LN2, -INFINITY)
        tl.store(LSE + at, lse, mask=query < rows)
        tl.store(TLSE + at, slope, mask=query < rows)
