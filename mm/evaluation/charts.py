"""Line charts as inline SVG; colours come from the page's CSS, so that light and dark both work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 28
MOST = 400  # points drawn a line: more would only make the file larger


def line_chart(series: Sequence[Points], *, title: str, smooth: float = 0.9) -> str:
    """An SVG element of one line a series, over a fainter one of the raw values; "" where there are no two points.

    `smooth` is the decay of the running average. The vertical range leaves out the highest 2 % of the values, which
    at the start of a training run would flatten all the rest.
    """
    series = [[(x, y) for x, y in points if math.isfinite(y)] for points in series]
    series = [points for points in series if len(points) > 1]
    if not series:
        return ""
    values = sorted(y for points in series for _, y in points)
    low, high = values[0], values[min(len(values) - 1, int(0.98 * len(values)))]
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = (0.0 if 0 <= low < 0.4 * high else low - margin), high + margin
    last = max(points[-1][0] for points in series)
    first = min(0.0, min(points[0][0] for points in series))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / ((last - first) or 1.0)
        up = (min(max(y, low), high) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks(low, high, 4):
        y = place(first, tick)[1]
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(first, last, 5):
        x = place(tick, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{short(tick)}</text>')
    for number, points in enumerate(series):
        if len(series) == 1:
            parts.append(f'<path class="raw" d="{path([place(*point) for point in thin(points)])}"/>')
        averaged = thin(running_mean(points, smooth))
        parts.append(f'<path class="line s{number % 4}" d="{path([place(*point) for point in averaged])}"/>')
    return "".join([*parts, "</svg>"])


def running_mean(points: Points, decay: float) -> list[tuple[float, float]]:
    """Exponential average without the bias of its start."""
    total = weight = 0.0
    found = []
    for x, y in points:
        total, weight = decay * total + y, decay * weight + 1.0
        found.append((x, total / weight))
    return found


def thin(points: Points) -> list[tuple[float, float]]:
    """At most MOST of the points, the last among them."""
    stride = -(-len(points) // MOST)
    return [*points[:-1:stride], points[-1]]


def path(places: Points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high."""
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= raw * 0.999)
    start = math.ceil(low / step - 1e-9)
    return [number * step for number in range(start, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """3000 as 3k, 0.25 as 0.25."""
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{round(value, 6):g}"
