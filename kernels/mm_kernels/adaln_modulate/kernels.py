"""The Triton kernels of norm and modulation.

A program holds ROWS whole rows of one sample, so a row is read once, and its mean and variance are recomputed in the
backward pass instead of being saved. BLOCK is the power of two from D on; what is past D is never read and counts as 0.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(X, sample, token, real, stride_b, stride_n, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Rows `[ROWS, BLOCK]` of one sample."""
    column = tl.arange(0, BLOCK)[None, :]
    at = X + sample.to(tl.int64) * stride_b + token.to(tl.int64)[:, None] * stride_n + column
    return tl.load(at, mask=real[:, None] & (column < D), other=0.0).to(WIDE)


@triton.jit
def _load_vector(X, sample, stride_b, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """What a sample's rows share, `[1, BLOCK]`."""
    column = tl.arange(0, BLOCK)[None, :]
    return tl.load(X + sample.to(tl.int64) * stride_b + column, mask=column < D, other=0.0).to(WIDE)


@triton.jit
def _store(X, sample, token, real, tokens, value, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a contiguous result."""
    column = tl.arange(0, BLOCK)[None, :]
    at = X + (sample.to(tl.int64) * tokens + token)[:, None] * D + column
    tl.store(at, value.to(X.dtype.element_ty), mask=real[:, None] & (column < D))


@triton.jit
def _norm(h, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows without mean and of unit variance, 0 past D; and the factor that made the variance so."""
    column = tl.arange(0, BLOCK)[None, :]
    centred = tl.where(column < D, h - (tl.sum(h, 1) / D)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)[:, None]
    return centred * inverse, inverse


@triton.jit
def forward_kernel(
    X, SHIFT, SCALE, GATE, RESIDUAL, OUT, H, tokens, eps, x_b, x_n, shift_b, scale_b, gate_b, residual_b, residual_n,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """OUT = norm(H) * (1 + SCALE) + SHIFT with H = RESIDUAL + GATE * X, or X; OUT and H are contiguous."""
    blocks = tl.cdiv(tokens, ROWS)
    sample = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    real = token < tokens
    h = _load(X, sample, token, real, x_b, x_n, D, BLOCK, WIDE)
    if RESIDUAL is not None:
        if GATE is not None:
            h *= _load_vector(GATE, sample, gate_b, D, BLOCK, WIDE)
        h += _load(RESIDUAL, sample, token, real, residual_b, residual_n, D, BLOCK, WIDE)
        h = h.to(H.dtype.element_ty)  # the norm is that of the h which is returned
        _store(H, sample, token, real, tokens, h, D, BLOCK)
        h = h.to(WIDE)
    normed, _ = _norm(h, eps, D, BLOCK)
    scale = _load_vector(SCALE, sample, scale_b, D, BLOCK, WIDE)
    shift = _load_vector(SHIFT, sample, shift_b, D, BLOCK, WIDE)
    _store(OUT, sample, token, real, tokens, normed * (1 + scale) + shift, D, BLOCK)


@triton.jit
def tangent_kernel(
    H, X, SCALE, GATE, TX, TSHIFT, TSCALE, TGATE, TRESIDUAL, OUT, OUT_H, tokens, eps,
    h_b, h_n, x_b, x_n, scale_b, gate_b,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The tangents of forward_kernel's results along TX, TSHIFT, TSCALE, TGATE, TRESIDUAL, all contiguous."""
    blocks = tl.cdiv(tokens, ROWS)
    sample = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    real = token < tokens
    start = sample.to(tl.int64) * tokens  # of contiguous tensors, in rows
    move = _load(TX, start, token, real, D, D, D, BLOCK, WIDE)
    if TRESIDUAL is not None:
        if GATE is not None:
            x = _load(X, sample, token, real, x_b, x_n, D, BLOCK, WIDE)
            move *= _load_vector(GATE, sample, gate_b, D, BLOCK, WIDE)
            move += _load_vector(TGATE, sample, D, D, BLOCK, WIDE) * x
        move += _load(TRESIDUAL, start, token, real, D, D, D, BLOCK, WIDE)
        _store(OUT_H, sample, token, real, tokens, move, D, BLOCK)
    normed, inverse = _norm(_load(H, sample, token, real, h_b, h_n, D, BLOCK, WIDE), eps, D, BLOCK)
    along = (tl.sum(normed * move, 1) / D)[:, None]
    moved = inverse * (move - (tl.sum(move, 1) / D)[:, None] - normed * along)
    scale = _load_vector(SCALE, sample, scale_b, D, BLOCK, WIDE)
    turn = _load_vector(TSCALE, sample, D, D, BLOCK, WIDE)
    lift = _load_vector(TSHIFT, sample, D, D, BLOCK, WIDE)
    _store(OUT, sample, token, real, tokens, moved * (1 + scale) + normed * turn + lift, D, BLOCK)


@triton.jit
def backward_kernel(
    GRAD, GRAD_H, H, X, SCALE, GATE, DH, DX, DSHIFT, DSCALE, DGATE, tokens, span, eps,
    grad_b, grad_n, grad_h_b, grad_h_n, h_b, h_n, x_b, x_n, scale_b, gate_b,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """DH and DX = GATE * DH, contiguous, and DSHIFT, DSCALE, DGATE `[B, parts, D]`: sums over `span` tokens each.

    They are to be summed afterwards; a program adds up its tokens in one order: the same bits every time.
    """
    part, parts = tl.program_id(0), tl.cdiv(tokens, span)
    sample = part // parts
    first = part % parts * span
    last = tl.minimum(first + span, tokens)
    factor = 1 + _load_vector(SCALE, sample, scale_b, D, BLOCK, WIDE)
    dshift = tl.zeros([ROWS, BLOCK], WIDE)
    dscale = tl.zeros([ROWS, BLOCK], WIDE)
    dgate = tl.zeros([ROWS, BLOCK], WIDE)
    for start in range(first, last, ROWS):
        token = start + tl.arange(0, ROWS)
        real = token < last
        normed, inverse = _norm(_load(H, sample, token, real, h_b, h_n, D, BLOCK, WIDE), eps, D, BLOCK)
        grad = _load(GRAD, sample, token, real, grad_b, grad_n, D, BLOCK, WIDE)
        dshift += grad
        dscale += tl.where(real[:, None], grad * normed, 0.0)  # without eps a row of zeros has no norm
        grad *= factor
        along = (tl.sum(grad * normed, 1) / D)[:, None]
        dh = inverse * (grad - (tl.sum(grad, 1) / D)[:, None] - normed * along)
        if GRAD_H is not None:
            dh += _load(GRAD_H, sample, token, real, grad_h_b, grad_h_n, D, BLOCK, WIDE)
        _store(DH, sample, token, real, tokens, dh, D, BLOCK)
        if GATE is not None:
            x = _load(X, sample, token, real, x_b, x_n, D, BLOCK, WIDE)
            dgate += tl.where(real[:, None], dh * x, 0.0)
            gate = _load_vector(GATE, sample, gate_b, D, BLOCK, WIDE)
            _store(DX, sample, token, real, tokens, gate * dh, D, BLOCK)
    column = tl.arange(0, BLOCK)
    at = part.to(tl.int64) * D + column
    tl.store(DSHIFT + at, tl.sum(dshift, 0), mask=column < D)
    tl.store(DSCALE + at, tl.sum(dscale, 0), mask=column < D)
    if GATE is not None:
        tl.store(DGATE + at, tl.sum(dgate, 0), mask=column < D)
