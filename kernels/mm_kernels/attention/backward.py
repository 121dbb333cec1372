"""The backward kernels of attention: two passes without atomics, so that the same inputs give the same bits.

With s = scale q k^T, p = exp(s - lse) and delta = rowsum(dO O) - dlse: dV = p^T dO, dS = p (dO V^T - delta),
dQ = scale dS K and dK = scale dS^T Q (arXiv 2307.08691, algorithm 2, and d lse / d s = p).
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from mm_kernels.attention.tiles import (
    INFINITY,
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
def row_statistics(LSE, DELTA, query, real, CHECK: tl.constexpr):
    """lse in base 2 and delta `[BM]`; where no key was seen, or no such row is, +inf makes every weight zero."""
    if CHECK:
        lse = tl.load(LSE + query, mask=real, other=-INFINITY)
        delta = tl.load(DELTA + query, mask=real, other=0.0)
    else:
        lse = tl.load(LSE + query)
        delta = tl.load(DELTA + query)
    return tl.where(lse == -INFINITY, INFINITY, lse * LOG2E), delta


@triton.jit(do_not_specialize=["blocks", "heads", "rows"])
def delta_kernel(OUT, DOUT, DLSE, DELTA, CU_Q, blocks, heads, rows, lse_sample, lse_head,
                 D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, PACKED: tl.constexpr,
                 WITH_LSE: tl.constexpr):  # fmt: skip
    """DELTA, float32 and laid out as lse: rowsum(dO O), less the gradient of lse where there is one."""
    block, head, sample = program(blocks, heads)
    first_query, rows = sequence(CU_Q, rows, sample, PACKED)
    if block * BM < rows:
        near = tl.arange(0, BM)
        query = block * BM + near
        start = (first_query + block * BM) * (heads * D) + head * D
        out = load(OUT + start, near, heads * D, query < rows, D, D1, D2, True)
        dout = load(DOUT + start, near, heads * D, query < rows, D, D1, D2, True)
        delta = tl.sum(out[0].to(tl.float32) * dout[0].to(tl.float32), 1)
        if D2 > 0:
            delta += tl.sum(out[1].to(tl.float32) * dout[1].to(tl.float32), 1)
        at = sample.to(tl.int64) * lse_sample + head.to(tl.int64) * lse_head + query
        if PACKED:
            at += first_query
        if WITH_LSE:
            delta -= tl.load(DLSE + at, mask=query < rows, other=0.0)
        tl.store(DELTA + at, delta, mask=query < rows)


@triton.jit(do_not_specialize=["blocks", "heads", "rows", "keys"])
def dq_kernel(Q, K, V, DOUT, DQ, LSE, DELTA, CU_Q, CU_K, MASK, BOUNDS, scale, blocks, heads, rows, keys,
              q_row, k_row, v_row, lse_sample, lse_head,
              GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr,
              BN: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    """DQ `[T, H, D]`: one program sums BM rows over all keys that they see."""
    block, head, sample = program(blocks, heads)
    first_query, rows = sequence(CU_Q, rows, sample, PACKED)
    first_key, keys = sequence(CU_K, keys, sample, PACKED)
    if block * BM < rows:
        near, ahead = tl.arange(0, BM), tl.arange(0, BN)
        query = block * BM + near
        first = first_query + block * BM
        at = sample.to(tl.int64) * lse_sample + head.to(tl.int64) * lse_head
        if PACKED:
            at += first_query
        lse, delta = row_statistics(LSE + at, DELTA + at, query, query < rows, True)
        q = load(Q + first * q_row + head * D, near, q_row, query < rows, D, D1, D2, True)
        dout = load(DOUT + first * (heads * D) + head * D, near, heads * D, query < rows, D, D1, D2, True)
        K += head // GROUP * D
        V += head // GROUP * D
        dq = zeros(BM, D1, D2)
        whole, end = key_range(BOUNDS, sample, block * BM, rows, keys, BM, BN, MASKED, CAUSAL)
        low, high = 0, whole
        for PART in tl.static_range(2):  # blocks of keys that all queries see, then those with hidden ones
            for start in tl.range(low, high, BN):
                real = start + ahead < keys
                k = load(K + (first_key + start) * k_row, ahead, k_row, real, D, D1, D2, PART)
                p = tl.exp2(scores(q, k) * (scale * LOG2E) - lse[:, None])
                if PART:
                    p = tl.where(visible(MASK, first_key, start + ahead, query, rows, keys, MASKED, CAUSAL), p, 0.0)
                v = load(V + (first_key + start) * v_row, ahead, v_row, real, D, D1, D2, PART)
                dq = add_product(dq, p * (scores(dout, v) - delta[:, None]), k)
            low, high = whole, end
        dq = times_rows(dq, tl.full([BM], 1.0, tl.float32) * scale)
        store(DQ + first * (heads * D) + head * D, near, heads * D, query < rows, dq, D)


@triton.jit(do_not_specialize=["blocks", "heads", "rows", "keys"])
def dkdv_kernel(Q, K, V, DOUT, DK, DV, LSE, DELTA, CU_Q, CU_K, MASK, BOUNDS, scale, blocks, heads, rows, keys,
                q_row, k_row, v_row, lse_sample, lse_head,
                GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    """DK and DV `[S, heads, D]`: one program sums BN keys over the queries, of GROUP heads, that see them.

    A hidden key only spoils its own row here, so that the mask is not read before the rows are stored.
    """
    block, head, sample = program(blocks, heads)
    first_query, rows = sequence(CU_Q, rows, sample, PACKED)
    first_key, keys = sequence(CU_K, keys, sample, PACKED)
    if block * BN < keys:
        near, ahead = tl.arange(0, BN), tl.arange(0, BM)
        key = block * BN + near
        first = first_key + block * BN
        k = load(K + first * k_row + head * D, near, k_row, key < keys, D, D1, D2, True)
        v = load(V + first * v_row + head * D, near, v_row, key < keys, D, D1, D2, True)
        dk, dv = zeros(BN, D1, D2), zeros(BN, D1, D2)
        # Queries from `low` on see the first key of the block, from `whole` on the last; a tail may remain at the end.
        low, whole = 0, 0
        if CAUSAL:
            low = tl.maximum(block * BN - (keys - rows), 0) // BM * BM
            whole = tl.maximum(low, (tl.maximum(block * BN + BN - 1 - (keys - rows), 0) + BM - 1) // BM * BM)
        tail = tl.maximum(whole, rows // BM * BM)
        parts = (tl.minimum(whole, tl.cdiv(rows, BM) * BM) - low) // BM
        for member in tl.range(0, GROUP):
            at = sample.to(tl.int64) * lse_sample + (head * GROUP + member).to(tl.int64) * lse_head
            if PACKED:
                at += first_query
            Q_HEAD = Q + (head * GROUP + member) * D
            DOUT_HEAD = DOUT + (head * GROUP + member) * D
            turns = (tail - whole) // BM
            for PART in tl.static_range(2):
                for turn in tl.range(0, turns):
                    start = whole + turn * BM
                    if PART:  # the blocks before `whole`, then the tail
                        start = tl.where(turn < parts, low + turn * BM, tail)
                    query = start + ahead
                    real = query < rows
                    q = load(Q_HEAD + (first_query + start) * q_row, ahead, q_row, real, D, D1, D2, PART)
                    lse, delta = row_statistics(LSE + at, DELTA + at, query, real, PART)
                    p = tl.exp2(scores(k, q) * (scale * LOG2E) - lse[None, :])
                    if PART and CAUSAL:
                        p = tl.where(key[:, None] <= query[None, :] + (keys - rows), p, 0.0)
                    place = DOUT_HEAD + (first_query + start) * (heads * GROUP * D)
                    dout = load(place, ahead, heads * GROUP * D, real, D, D1, D2, PART)
                    dv = add_product(dv, p, dout)
                    dk = add_product(dk, p * (scores(v, dout) - delta[None, :]), q)
                turns = parts + (tail < rows).to(tl.int32)
        if MASKED:
            hidden = tl.load(MASK + first_key + key, mask=key < keys, other=0)[:, None] == 0
            dk, dv = clear(dk, hidden), clear(dv, hidden)
        dk = times_rows(dk, tl.full([BN], 1.0, tl.float32) * scale)
        store(DK + first * (heads * D) + head * D, near, heads * D, key < keys, dk, D)
        store(DV + first * (heads * D) + head * D, near, heads * D, key < keys, dv, D)


@triton.jit
def clear(tile, hidden):
    """Zeros in the hidden rows, whatever was summed there."""
    if len(tile) > 1:
        return (tl.where(hidden, 0.0, tile[0]), tl.where(hidden, 0.0, tile[1]))
    else:
        return (tl.where(hidden, 0.0, tile[0]),)
