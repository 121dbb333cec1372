"""What the attention kernels share: tiles of a width that is no power of two, and where a program's rows lie.

A tile `[R, D]` is a tuple of one or two pieces, `[R, D1]` and `[R, D2]`: a width of 72 is 64 + 16, which does 1.11
times the ideal matrix work where padding to 128 does 1.78 times. In the kernels D, D1 and D2 are that width and its
pieces, BM rows of queries and BN rows of keys make a block, and every product sets its precision: on a GPU the
default for float32 would be tf32.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load_piece(
    start, rows, stride, real, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr
):
    """`[R, WIDTH]` from column FIRST on; zeros past column D and, with CHECK, in rows that are not real."""
    columns = FIRST + tl.arange(0, WIDTH)
    place = start + rows[:, None] * stride + columns[None, :]
    if FIRST + WIDTH > D:
        inside = columns[None, :] < D
        if CHECK:
            inside = inside & real[:, None]
        return tl.load(place, mask=inside, other=0.0)
    elif CHECK:
        return tl.load(place, mask=real[:, None], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def load(start, rows, stride, real, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CHECK: tl.constexpr):
    """The tile `[R, D]` at `start`, whose rows are `stride` apart."""
    if D2 > 0:
        return (
            load_piece(start, rows, stride, real, D, 0, D1, CHECK),
            load_piece(start, rows, stride, real, D, D1, D2, CHECK),
        )
    else:
        return (load_piece(start, rows, stride, real, D, 0, D1, CHECK),)


@triton.jit
def zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """A float32 tile of zeros, to sum products in."""
    if D2 > 0:
        return (tl.zeros([ROWS, D1], tl.float32), tl.zeros([ROWS, D2], tl.float32))
    else:
        return (tl.zeros([ROWS, D1], tl.float32),)


@triton.jit
def scores(a, b):
    """a b^T, `[R, S]` in float32, of tiles `[R, D]` and `[S, D]`."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) > 1:
        total = tl.dot(a[1], tl.trans(b[1]), total, input_precision="ieee")
    return total


@triton.jit
def more_scores(a, b, total):
    """total + a b^T."""
    total = tl.dot(a[0], tl.trans(b[0]), total, input_precision="ieee")
    if len(a) > 1:
        total = tl.dot(a[1], tl.trans(b[1]), total, input_precision="ieee")
    return total


@triton.jit
def add_product(total, weights, tile):
    """total + weights tile, of a tile `[R, D]` of sums, weights `[R, S]` and a tile `[S, D]`."""
    weights = weights.to(tile[0].dtype)
    first = tl.dot(weights, tile[0], total[0], input_precision="ieee")
    if len(total) > 1:
        return (first, tl.dot(weights, tile[1], total[1], input_precision="ieee"))
    else:
        return (first,)


@triton.jit
def times_rows(tile, factor):
    """Each row of a tile by its factor `[R]`."""
    if len(tile) > 1:
        return (tile[0] * factor[:, None], tile[1] * factor[:, None])
    else:
        return (tile[0] * factor[:, None],)


@triton.jit
def store(start, rows, stride, real, tile, D: tl.constexpr):
    """The real rows of a tile, and its columns before D, in the type that `start` points at."""
    WIDTH: tl.constexpr = tile[0].shape[1]
    first = tl.arange(0, WIDTH)
    place = start + rows[:, None] * stride + first[None, :]
    tl.store(place, tile[0].to(start.dtype.element_ty), mask=real[:, None] & (first[None, :] < D))
    if len(tile) > 1:
        second = WIDTH + tl.arange(0, tile[1].shape[1])
        place = start + rows[:, None] * stride + second[None, :]
        tl.store(place, tile[1].to(start.dtype.element_ty), mask=real[:, None] & (second[None, :] < D))


@triton.jit
def program(blocks, heads):
    """Block, head and sample of this program: blocks of one head run together, for the cache's sake."""
    at = tl.program_id(0)
    return at % blocks, (at // blocks) % heads, at // (blocks * heads)


@triton.jit
def sequence(CU, length, sample, PACKED: tl.constexpr):
    """First token, int64, and number of tokens of a sample: from `[B + 1]` offsets, or the same length for all."""
    if PACKED:
        first = tl.load(CU + sample)
        return first.to(tl.int64), tl.load(CU + sample + 1) - first
    else:
        return sample.to(tl.int64) * length, length


@triton.jit
def key_range(BOUNDS, sample, first_row, rows, keys, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
              CAUSAL: tl.constexpr):  # fmt: skip
    """Keys that a block of queries sees whole, a multiple of BN, and the end of those that it sees in part.

    With MASKED, BOUNDS `[B, 2]` holds how many keys are visible before the first hidden one, and the end of the last
    visible one: only between the two are the mask's bytes read.
    """
    whole, end = keys, keys
    if MASKED:
        whole = tl.load(BOUNDS + 2 * sample)
        end = tl.load(BOUNDS + 2 * sample + 1)
    if CAUSAL:
        whole = tl.minimum(whole, tl.maximum(first_row + 1 + keys - rows, 0))
        end = tl.minimum(end, tl.maximum(first_row + BM + keys - rows, 0))
    return whole // BN * BN, end


@triton.jit
def visible(MASK, first_key, at, query, rows, keys, MASKED: tl.constexpr, CAUSAL: tl.constexpr):
    """`[BM, BN]` (or `[1, BN]`): which queries see which of the keys `at`; `first_key` is the sample's first."""
    real = at < keys
    if MASKED:
        real = real & (tl.load(MASK + first_key + at, mask=real, other=0) != 0)
    seen = real[None, :]
    if CAUSAL:
        seen = seen & (at[None, :] <= query[:, None] + (keys - rows))
    return seen
