"""The Triton kernels of the q/k norm and rotary embedding.

A row is one head of one token. A program takes ROWS rows of q, or, further along the grid, of k. A row is held as its
two halves, so that the pair which a rotation mixes is in the same place of both and nothing moves between threads. The
backward pass has whole rows in registers and recomputes their norms: nothing but the inputs is saved.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(
    block, rows, tokens, stride_b, stride_n, stride_h, HEADS: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr
):
    """Of the rows of a block: which are real, the token's number, and the offset of the first value, in int64."""
    row = block * ROWS + tl.arange(0, ROWS)
    token = row // HEADS
    offset = (token // tokens).to(tl.int64) * stride_b + (token % tokens).to(tl.int64) * stride_n
    return row < rows, token, (offset + (row % HEADS).to(tl.int64) * stride_h) * ALIGN


@triton.jit
def _load(X, offset, real, D: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """The two halves of rows, `[ROWS, COLUMNS]` each, with zeros where there is nothing."""
    column = tl.arange(0, COLUMNS)[None, :]
    at = X + offset[:, None] + column
    low = tl.load(at, mask=real[:, None] & (column < HALF), other=0.0)
    high = tl.load(at + HALF, mask=real[:, None] & (column < D - HALF), other=0.0)
    return low.to(WIDE), high.to(WIDE)


@triton.jit
def _store(X, offset, real, low, high, D: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)[None, :]
    at = X + offset[:, None] + column
    tl.store(at, low.to(X.dtype.element_ty), mask=real[:, None] & (column < HALF))
    tl.store(at + HALF, high.to(X.dtype.element_ty), mask=real[:, None] & (column < D - HALF))


@triton.jit
def _load_weight(W, D: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    low = tl.load(W + column, mask=column < HALF, other=0.0)
    high = tl.load(W + HALF + column, mask=column < D - HALF, other=0.0)
    return low.to(WIDE)[None, :], high.to(WIDE)[None, :]


@triton.jit
def _load_angles(
    COS, SIN, POSITIONS, table, token, tokens, real, HALF: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """cos and sin of each row, `[ROWS, COLUMNS]`; NaN for a position outside of the table."""
    column = tl.arange(0, COLUMNS)[None, :]
    if POSITIONS is None:
        at = (token % tokens).to(tl.int64)[:, None] * HALF + column
        cos = tl.load(COS + at, mask=column < HALF, other=0.0).to(WIDE)
        sin = tl.load(SIN + at, mask=column < HALF, other=0.0).to(WIDE)
    else:
        place = tl.load(POSITIONS + token, mask=real, other=0).to(tl.int64)
        there = ((place >= 0) & (place < table))[:, None]
        at = place[:, None] * HALF + column
        cos = tl.load(COS + at, mask=there & (column < HALF), other=0.0).to(WIDE)
        sin = tl.load(SIN + at, mask=there & (column < HALF), other=0.0).to(WIDE)
        cos = tl.where(there, cos, float("nan"))
    return cos, sin


@triton.jit
def _inverse_norm(low, high, eps, D: tl.constexpr):
    return tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]


@triton.jit
def _forward_rows(
    X, W, COS, SIN, POSITIONS, OUT, block, rows, tokens, table, eps, x_b, x_n, x_h,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    real, token, offset = _places(block, rows, tokens, x_b, x_n, x_h, HEADS, ROWS, ALIGN)
    low, high = _load(X, offset, real, D, HALF, COLUMNS, WIDE)
    weight_low, weight_high = _load_weight(W, D, HALF, COLUMNS, WIDE)
    inverse = _inverse_norm(low, high, eps, D)
    low, high = low * inverse * weight_low, high * inverse * weight_high
    if COS is not None:
        cos, sin = _load_angles(COS, SIN, POSITIONS, table, token, tokens, real, HALF, COLUMNS, WIDE)
        low, high = low * cos - high * sin, high * cos + low * sin
    target = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64) * D
    _store(OUT, target, real, low, high, D, HALF, COLUMNS)


@triton.jit
def forward_kernel(
    Q, K, WQ, WK, COS, SIN, POSITIONS, OUT_Q, OUT_K, rows_q, rows_k, tokens, table, eps,
    q_b, q_n, q_h, k_b, k_n, k_h,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """OUT = rotate(norm(X) * W), contiguous `[tokens, HEADS, D]`, for q and k at once."""
    block, of_q = tl.program_id(0), tl.cdiv(rows_q, ROWS)
    if block < of_q:
        _forward_rows(
            Q, WQ, COS, SIN, POSITIONS, OUT_Q, block, rows_q, tokens, table, eps, q_b, q_n, q_h,
            HEADS_Q, D, HALF, COLUMNS, ROWS, WIDE, ALIGN,
        )  # fmt: skip
    else:
        _forward_rows(
            K, WK, COS, SIN, POSITIONS, OUT_K, block - of_q, rows_k, tokens, table, eps, k_b, k_n, k_h,
            HEADS_K, D, HALF, COLUMNS, ROWS, WIDE, ALIGN,
        )  # fmt: skip


@triton.jit
def _tangent_rows(
    X, W, TX, TW, COS, SIN, POSITIONS, OUT, block, rows, tokens, table, eps, x_b, x_n, x_h,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    real, token, offset = _places(block, rows, tokens, x_b, x_n, x_h, HEADS, ROWS, ALIGN)
    target = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64) * D
    low, high = _load(X, offset, real, D, HALF, COLUMNS, WIDE)
    inverse = _inverse_norm(low, high, eps, D)
    low, high = low * inverse, high * inverse
    move_low, move_high = _load(TX, target, real, D, HALF, COLUMNS, WIDE)
    along = ((tl.sum(low * move_low, 1) + tl.sum(high * move_high, 1)) / D)[:, None]
    weight_low, weight_high = _load_weight(W, D, HALF, COLUMNS, WIDE)
    turn_low, turn_high = _load_weight(TW, D, HALF, COLUMNS, WIDE)
    move_low = inverse * (move_low - low * along) * weight_low + low * turn_low
    move_high = inverse * (move_high - high * along) * weight_high + high * turn_high
    if COS is not None:
        cos, sin = _load_angles(COS, SIN, POSITIONS, table, token, tokens, real, HALF, COLUMNS, WIDE)
        move_low, move_high = move_low * cos - move_high * sin, move_high * cos + move_low * sin
    _store(OUT, target, real, move_low, move_high, D, HALF, COLUMNS)


@triton.jit
def tangent_kernel(
    Q, K, WQ, WK, TQ, TK, TWQ, TWK, COS, SIN, POSITIONS, OUT_Q, OUT_K, rows_q, rows_k, tokens, table, eps,
    q_b, q_n, q_h, k_b, k_n, k_h,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The tangents of forward_kernel's results along contiguous TQ, TK and TWQ, TWK."""
    block, of_q = tl.program_id(0), tl.cdiv(rows_q, ROWS)
    if block < of_q:
        _tangent_rows(
            Q, WQ, TQ, TWQ, COS, SIN, POSITIONS, OUT_Q, block, rows_q, tokens, table, eps, q_b, q_n, q_h,
            HEADS_Q, D, HALF, COLUMNS, ROWS, WIDE, ALIGN,
        )  # fmt: skip
    else:
        _tangent_rows(
            K, WK, TK, TWK, COS, SIN, POSITIONS, OUT_K, block - of_q, rows_k, tokens, table, eps, k_b, k_n, k_h,
            HEADS_K, D, HALF, COLUMNS, ROWS, WIDE, ALIGN,
        )  # fmt: skip


@triton.jit
def _backward_rows(
    GRAD, X, W, COS, SIN, POSITIONS, DX, PARTIAL, part, parts, rows, tokens, table, eps, g_b, g_n, g_h, x_b, x_n, x_h,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    weight_low, weight_high = _load_weight(W, D, HALF, COLUMNS, WIDE)
    sum_low = tl.zeros([ROWS, COLUMNS], WIDE)
    sum_high = tl.zeros([ROWS, COLUMNS], WIDE)
    for block in range(part, tl.cdiv(rows, ROWS), parts):
        real, token, offset = _places(block, rows, tokens, g_b, g_n, g_h, HEADS, ROWS, ALIGN)
        grad_low, grad_high = _load(GRAD, offset, real, D, HALF, COLUMNS, WIDE)
        if COS is not None:
            cos, sin = _load_angles(COS, SIN, POSITIONS, table, token, tokens, real, HALF, COLUMNS, WIDE)
            grad_low, grad_high = grad_low * cos + grad_high * sin, grad_high * cos - grad_low * sin
        real, token, offset = _places(block, rows, tokens, x_b, x_n, x_h, HEADS, ROWS, ALIGN)
        low, high = _load(X, offset, real, D, HALF, COLUMNS, WIDE)
        inverse = _inverse_norm(low, high, eps, D)
        low, high = low * inverse, high * inverse
        sum_low += tl.where(real[:, None], grad_low * low, 0.0)  # without eps a row of zeros has no norm
        sum_high += tl.where(real[:, None], grad_high * high, 0.0)
        grad_low, grad_high = grad_low * weight_low, grad_high * weight_high
        along = ((tl.sum(low * grad_low, 1) + tl.sum(high * grad_high, 1)) / D)[:, None]
        target = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64) * D
        _store(
            DX, target, real, inverse * (grad_low - low * along), inverse * (grad_high - high * along), D, HALF, COLUMNS
        )
    column = tl.arange(0, COLUMNS)
    at = PARTIAL + part.to(tl.int64) * D + column
    tl.store(at, tl.sum(sum_low, 0), mask=column < HALF)
    tl.store(at + HALF, tl.sum(sum_high, 0), mask=column < D - HALF)


@triton.jit
def backward_kernel(
    GRAD_Q, GRAD_K, Q, K, WQ, WK, COS, SIN, POSITIONS, DQ, DK, PARTIAL_Q, PARTIAL_K,
    parts_q, parts_k, rows_q, rows_k, tokens, table, eps,
    gq_b, gq_n, gq_h, gk_b, gk_n, gk_h, q_b, q_n, q_h, k_b, k_n, k_h,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """DQ and DK, contiguous, and of each program its share of the weights' gradients, to be summed afterwards.

    Program p takes blocks p, p + parts, ..., always in this order: the same bits every time.
    """
    part = tl.program_id(0)
    if part < parts_q:
        _backward_rows(
            GRAD_Q, Q, WQ, COS, SIN, POSITIONS, DQ, PARTIAL_Q, part, parts_q, rows_q, tokens, table, eps,
            gq_b, gq_n, gq_h, q_b, q_n, q_h, HEADS_Q, D, HALF, COLUMNS, ROWS, WIDE, ALIGN,
        )  # fmt: skip
    else:
        _backward_rows(
            GRAD_K, K, WK, COS, SIN, POSITIONS, DK, PARTIAL_K, part - parts_q, parts_k, rows_k, tokens, table, eps,
            gk_b, gk_n, gk_h, k_b, k_n, k_h, HEADS_K, D, HALF, COLUMNS, ROWS, WIDE, ALIGN,
        )  # fmt: skip
