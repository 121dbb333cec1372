"""What corruptions are made of: pictures blurred by a kernel, sampled between their pixels, and smooth random maps.

Letters: H W pixels, C channels, R pixels from a kernel's centre to its edge. Pictures are float64 `[H, W, C]`. Kernels
are of points between pixels, each shared among the four around it (bilinear), so that a radius of a fraction of a
pixel means something: pictures of 32 pixels need it.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray
_FINE = 16  # points a radius, at least; and at least two a pixel


def blurred(picture: Array, kernel: Array) -> Array:
    """Each pixel the mean of those around it with the weights `kernel` `[2R + 1, 2R + 1]`; mirrored at the edges."""
    height, width, reach = *picture.shape[:2], len(kernel) // 2
    around = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), "reflect")
    shape = around.shape[:2]
    spectrum = np.fft.rfft2(kernel[::-1, ::-1], shape)[..., None]
    whole = np.fft.irfft2(np.fft.rfft2(around, axes=(0, 1)) * spectrum, shape, axes=(0, 1))
    return whole[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]


def disk(radius: float) -> Array:
    """The kernel of a lens out of focus: all of a disk alike."""
    steps = max(_FINE, math.ceil(2 * radius))
    line = (np.arange(-steps, steps) + 0.5) / steps
    rows, columns = (axis.ravel() for axis in np.meshgrid(line, line, indexing="ij"))
    inside = rows**2 + columns**2 <= 1
    return _kernel(radius * rows[inside], radius * columns[inside], np.ones(inside.sum()))


def gaussian(sigma: float) -> Array:
    """The kernel of a normal distribution, up to four standard deviations."""
    steps = max(_FINE, math.ceil(8 * sigma))
    line = 4 * sigma * np.arange(-steps, steps + 1) / steps
    weights = np.exp(-0.5 * (4 * np.arange(-steps, steps + 1) / steps) ** 2)
    rows, columns = (axis.ravel() for axis in np.meshgrid(line, line, indexing="ij"))
    return _kernel(rows, columns, np.outer(weights, weights).ravel())


def motion(radius: float, sigma: float, angle: float) -> Array:
    """The kernel of a movement: a line of `radius` from the centre at an angle in degrees, ever fainter.

    One side of a normal distribution of deviation `sigma`, as ImageMagick's motion blur has it.
    """
    steps = max(_FINE, math.ceil(2 * radius))
    along = radius * np.arange(steps + 1) / steps
    turn = math.radians(angle)
    return _kernel(math.sin(turn) * along, math.cos(turn) * along, np.exp(-0.5 * (along / sigma) ** 2))


def _kernel(rows: Array, columns: Array, weights: Array) -> Array:
    """`[2R + 1, 2R + 1]` with sum 1 of weighted points (row, column) around the centre."""
    reach = math.ceil(max(np.abs(rows).max(), np.abs(columns).max()))
    kernel = np.zeros((2 * reach + 3, 2 * reach + 3))  # an empty row and column more, where shares of 0 go
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = rows - top, columns - left
    for row, up in ((0, 1 - down), (1, down)):
        for column, near in ((0, 1 - right), (1, right)):
            np.add.at(kernel, (top + row + reach + 1, left + column + reach + 1), weights * up * near)
    return kernel[1:-1, 1:-1] / weights.sum()


def along(picture: Array, positions: Array, axis: int) -> Array:
    """The picture at some positions of one axis, between pixels linearly; beyond an edge is the edge's pixel."""
    last = picture.shape[axis] - 1
    positions = np.clip(positions, 0, last)
    before = np.minimum(positions.astype(int), max(last - 1, 0))
    shape = [1] * picture.ndim
    shape[axis] = -1
    after = np.minimum(before + 1, last)
    share = (positions - before).reshape(shape)
    return picture.take(before, axis) * (1 - share) + picture.take(after, axis) * share


def stretched(grid: Array, shape: tuple[int, int]) -> Array:
    """A map `[h, w]` over `shape` (H, W), corners on corners."""
    for axis, size in enumerate(shape):
        grid = along(grid, np.linspace(0, grid.shape[axis] - 1, size), axis)
    return grid


def zoomed(picture: Array, factor: float) -> Array:
    """Its middle, `factor` times as large."""
    for axis in (0, 1):
        middle = (picture.shape[axis] - 1) / 2
        picture = along(picture, middle + (np.arange(picture.shape[axis]) - middle) / factor, axis)
    return picture


def moved(picture: Array, down: Array, right: Array) -> Array:
    """Each pixel taken from so many pixels further down and right, `[H, W]` each; beyond an edge is its pixel."""
    height, width = picture.shape[:2]
    rows = np.clip(np.arange(height)[:, None] + down, 0, height - 1)
    columns = np.clip(np.arange(width) + right, 0, width - 1)
    top, left = rows.astype(int), columns.astype(int)
    below, beside = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    dy, dx = (rows - top)[..., None], (columns - left)[..., None]
    upper = picture[top, left] * (1 - dx) + picture[top, beside] * dx
    lower = picture[below, left] * (1 - dx) + picture[below, beside] * dx
    return upper * (1 - dy) + lower * dy


def smooth(shape: tuple[int, int], sigma: float, rng: np.random.Generator) -> Array:
    """A random map `[H, W]` of deviation 1 that changes over about `sigma` pixels."""
    kernel = gaussian(sigma)
    noise = blurred(rng.standard_normal(shape)[..., None], kernel)[..., 0]
    return noise / np.sqrt((kernel**2).sum())


def clouds(shape: tuple[int, int], decay: float, rng: np.random.Generator) -> Array:
    """A random map `[H, W]` from 0 to 1: unevenness over the whole picture, and at each half of its scale less by
    `decay`, down to pixels."""
    total, side, size = np.zeros(shape), max(shape), 1
    for octave in range(max(1, math.ceil(math.log2(side)))):
        total += stretched(rng.uniform(-1, 1, (size + 1, size + 1)), shape) * decay**-octave
        size *= 2
    total -= total.min()
    return total / max(total.max(), 1e-12)
