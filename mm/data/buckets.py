"""Batches of like samples (aspect ratio, text length) out of any order, and the codes that say what is alike.

Codes decide the order, so they too are equal on every machine: whole numbers and exact products, no logarithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mm.config import ConfigError
from mm.data.mixture import Mixture
from mm.data.order import Order, draws

Codes = Callable[[NDArray[np.int64]], NDArray[Any]]


class Buckets:
    """`order` regrouped so that every global batch holds samples of like code.

    Each window of positions (`window`, rounded up to whole batches) is sorted by code, cut into batches, and these are
    shuffled. Thus a window holds the samples that it held before, each still once an epoch, and at most (distinct
    codes - 1) of its batches hold more than one code. `codes`: sample numbers `[n]` -> whole numbers `[n]`, always the
    same; to be pickled, as this is. Raises ConfigError where `batch` is not positive.
    """

    def __init__(self, order: Order | Mixture, codes: Codes, batch: int, window: int) -> None:
        if batch < 1:
            raise ConfigError(f"data.batch_size: {batch} must be at least 1")
        self.order, self.codes, self.batch = order, codes, batch
        self.window = max(-(-window // batch), 1) * batch
        self.samples = order.samples
        self._window = lru_cache(maxsize=3)(self._make_window)

    def __reduce__(self) -> tuple[type[Buckets], tuple[Any, ...]]:
        return Buckets, (self.order, self.codes, self.batch, self.window)

    def span(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and sample numbers, both `[stop - start]`, of positions `start` ... `stop`."""
        parts = [np.empty((2, 0), dtype=np.int64)]
        position = start
        while position < stop:
            window, offset = divmod(position, self.window)
            parts.append(self._window(window)[0][:, offset : offset + stop - position])
            position += parts[-1].shape[1]
        epochs, numbers = np.concatenate(parts, axis=1)
        return epochs, numbers

    def code(self, batch_number: int) -> int:
        """The code that a whole batch takes: the upper median of its samples' codes."""
        window, place = divmod(batch_number, self.window // self.batch)
        return int(self._window(window)[1][place])

    def _make_window(self, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and sample numbers of a window, `[2, window]`, and its batches' codes, `[window / batch]`."""
        samples = np.stack(self.order.span(window * self.window, (window + 1) * self.window))
        codes = np.asarray(self.codes(samples[1]))
        if codes.shape != (self.window,) or codes.dtype.kind not in "iu":
            raise TypeError(f"codes: {codes.dtype} {codes.shape} must be whole numbers ({self.window},)")
        alike = np.argsort(codes, kind="stable").reshape(-1, self.batch)
        batches = alike[np.argsort(draws(self.order.seed, window, "buckets", 0, len(alike)), kind="stable")]
        return samples[:, batches.ravel()], codes[batches[:, self.batch // 2]].astype(np.int64)


def aspect_shapes(size: int, patch: int, n: int) -> list[tuple[int, int]]:
    """At most `n` (width, height) in pixels from 1:2 to 2:1, the square of `size` among them, narrow ones first.

    Sides are multiples of `patch`. No shape has more pixels than the square, none less than 7/8 of them; each is there
    lying and standing. Raises ConfigError where `size` is no multiple of `patch` or `n` is not positive.
    """
    if patch < 1 or size < patch or size % patch:
        raise ConfigError(f"image.size: {size} must be a multiple of image.patch = {patch} for shapes about that size")
    if n < 1:
        raise ConfigError(f"aspect shapes: {n} must be at least 1")
    side = size // patch
    pairs: list[tuple[int, int]] = []
    for short in range(side - 1, 0, -1):
        long = min(side**2 // short, 2 * short)
        if 8 * short * long < 7 * side**2:
            break
        pairs.append((short, long))
        if long == 2 * short:
            break
    most = min((n - 1) // 2, len(pairs))
    pairs = [pairs[-(-(i + 1) * len(pairs) // most) - 1] for i in range(most)]  # evenly, the longest among them
    shapes = [*reversed(pairs), (side, side), *((long, short) for short, long in pairs)]
    return [(width * patch, height * patch) for width, height in shapes]


def aspect_codes(widths: ArrayLike, heights: ArrayLike, shapes: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The index into `shapes` of the one nearest in log(width / height), `[n]`; half-way, the wider one.

    A width or height of 0 is one that nobody knows and counts as a square. `shapes`: (width, height), narrow first, as
    `aspect_shapes` gives them.
    """
    width, height = np.asarray(widths, dtype=np.float64), np.asarray(heights, dtype=np.float64)
    unknown = (width <= 0) | (height <= 0)
    width, height = np.where(unknown, 1.0, width), np.where(unknown, 1.0, height)
    codes = np.zeros(width.shape, dtype=np.int64)
    for (w0, h0), (w1, h1) in pairwise(shapes):
        if w0 * h1 > w1 * h0:
            raise ValueError(f"shapes: {w0}x{h0} is wider than {w1}x{h1} behind it; sort them, narrow ones first")
        codes += width * width * (h0 * h1) >= height * height * (w0 * w1)  # above the geometric mean of both aspects
    return codes


def length_codes(byte_lengths: ArrayLike, edges: Sequence[int]) -> NDArray[np.int64]:
    """The first edge that each text's length in bytes does not exceed, `[n]`; len(edges) where it exceeds them all.

    Raises ValueError where the edges do not rise.
    """
    if any(low >= high for low, high in pairwise(edges)):
        raise ValueError(f"edges: {list(edges)} must rise")
    return np.searchsorted(np.asarray(edges, dtype=np.int64), np.asarray(byte_lengths), side="left")
