"""The Triton kernels of the loss: scores are float32 and never leave the chip but as weights.

Products of float16 and bfloat16 embeddings run on the matrix units with float32 sums; float32 ones are exact ("ieee"),
never tf32. The weights of a tile are written once, in the embeddings' type, and both products read them. No atomics:
sums go through memory by program and are added up in one order.
"""

# mypy: allow-untyped-defs
# (the bodies of kernels are Triton's language: their arguments have no Python types)

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _products(
    Image, Text, row, column, M, N, E,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """⟨I, T⟩ `[BM, BN]`. Rows past the end repeat the last one, without a mask; the caller leaves them out."""
    inner = tl.arange(0, BK)
    image = Image + tl.minimum(row, M - 1).to(tl.int64)[:, None] * E + inner[None, :]
    text = Text + tl.minimum(column, N - 1).to(tl.int64)[:, None] * E + inner[None, :]
    products = tl.zeros([BM, BN], tl.float32)
    for start in range(0, E, BK):
        if EVEN:
            a, b = tl.load(image), tl.load(text)
        else:
            there = (inner < E - start)[None, :]
            a, b = tl.load(image, mask=there, other=0.0), tl.load(text, mask=there, other=0.0)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
        image += BK
        text += BK
    return products


@triton.jit
def statistics_kernel(
    Image, Text, Scale, Rows, Columns, M, N, E, first,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp by program, pairs left out: Rows `[programs along N, M]`, Columns `[programs along M, N]`."""
    i, j = tl.program_id(0), tl.program_id(1)
    row, column = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    scores = _products(Image, Text, row, column, M, N, E, BM, BN, BK, EVEN) * tl.load(Scale)
    seen = (row < M)[:, None] & (column < N)[None, :] & (column[None, :] != row[:, None] + first)
    scores = tl.where(seen, scores, float("-inf"))
    high = tl.maximum(tl.max(scores, 1), LOWEST)
    sums = tl.sum(tl.exp(scores - high[:, None]), 1)
    tl.store(Rows + j.to(tl.int64) * M + row, high + tl.log(sums), mask=row < M)
    high = tl.maximum(tl.max(scores, 0), LOWEST)
    sums = tl.sum(tl.exp(scores - high[None, :]), 0)
    tl.store(Columns + i.to(tl.int64) * N + column, high + tl.log(sums), mask=column < N)


@triton.jit
def softmax_kernel(
    Image, Text, Scale, Rows, Columns, Weights, Sums, M, N, E, first,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Weights `[M, N]`: e^(s - r) + e^(s - c), 0 on pairs; Sums `[3, programs]`: the last that of weights × ⟨I, T⟩."""
    i, j = tl.program_id(0), tl.program_id(1)
    row, column = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    products = _products(Image, Text, row, column, M, N, E, BM, BN, BK, EVEN)
    scores = products * tl.load(Scale)
    rows = tl.load(Rows + row, mask=row < M, other=0.0)
    columns = tl.load(Columns + column, mask=column < N, other=0.0)
    weights = tl.exp(scores - rows[:, None]) + tl.exp(scores - columns[None, :])
    inside = (row < M)[:, None] & (column < N)[None, :]
    weights = tl.where(inside & (column[None, :] != row[:, None] + first), weights, 0.0)
    place = Weights + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(place, weights.to(Weights.dtype.element_ty), mask=inside)
    sums = Sums + i.to(tl.int64) * tl.num_programs(1) + j
    tl.store(sums + 2 * tl.num_programs(0) * tl.num_programs(1), tl.sum(tl.sum(weights * products, 1), 0))


@triton.jit
def sigmoid_kernel(
    Image, Text, Scale, Bias, Weights, Sums, M, N, E, first,
    GRADIENTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Weights `[M, N]`: σ(z), 0 on pairs; Sums `[3, programs]`: of softplus(z), of weights, of weights × ⟨I, T⟩."""
    i, j = tl.program_id(0), tl.program_id(1)
    row, column = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    products = _products(Image, Text, row, column, M, N, E, BM, BN, BK, EVEN)
    logits = products * tl.load(Scale) + tl.load(Bias)
    inside = (row < M)[:, None] & (column < N)[None, :]
    seen = inside & (column[None, :] != row[:, None] + first)
    small = tl.exp(-tl.abs(logits))
    # log(1 + x) by 2 artanh(x / (2 + x)), x <= 1: a GPU's fast logarithm has no digit left near 1
    y = small / (2.0 + small)
    z = y * y
    series = 1.0 / 9.0 + z * (1.0 / 11.0 + z * (1.0 / 13.0 + z * (1.0 / 15.0)))
    series = 1.0 + z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * series)))
    losses = tl.where(seen, tl.maximum(logits, 0.0) + 2.0 * y * series, 0.0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    sums = Sums + i.to(tl.int64) * tl.num_programs(1) + j
    tl.store(sums, tl.sum(tl.sum(losses, 1), 0))
    if GRADIENTS:
        weights = tl.where(seen, tl.where(logits >= 0.0, 1.0, small) / (1.0 + small), 0.0)
        tl.store(sums + programs, tl.sum(tl.sum(weights, 1), 0))
        tl.store(sums + 2 * programs, tl.sum(tl.sum(weights * products, 1), 0))
        place = Weights + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(place, weights.to(Weights.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    Weights, Embeddings, Out, M, K, E,
    TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Out `[M, E]`, float32, += Weights `[M, K]` (TRANSPOSED: held as `[K, M]`) @ Embeddings `[K, E]`.

    Masks, not repeated last places, along what is contiguous: there the compiler must see whole lines of memory.
    """
    row, column = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    wide = (column < E)[None, :]
    if TRANSPOSED:
        weights, step = Weights + inner.to(tl.int64)[:, None] * M + row[None, :], BK * M
    else:
        weights, step = Weights + tl.minimum(row, M - 1).to(tl.int64)[:, None] * K + inner[None, :], BK
    embeddings = Embeddings + inner.to(tl.int64)[:, None] * E + column[None, :]
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        there = inner < K - start
        if TRANSPOSED:
            a = tl.trans(tl.load(weights, mask=there[:, None] & (row < M)[None, :], other=0.0))
        else:
            a = tl.load(weights, mask=there[None, :], other=0.0)
        b = tl.load(embeddings, mask=there[:, None] & wide, other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        weights += step
        embeddings += BK * E
    place, inside = Out + row.to(tl.int64)[:, None] * E + column[None, :], (row < M)[:, None] & wide
    tl.store(place, tl.load(place, mask=inside, other=0.0) + sums, mask=inside)
