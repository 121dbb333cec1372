"""Which classes are taken for which: a heatmap with counts on hover, and the pairs most often confused, in words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from html import escape
from typing import Any

from mm.evaluation.report_page import table

MOST = 60  # classes drawn: more would be a grey square
WRITTEN = 16  # up to so many classes the counts stand in the cells
PAIRS = 12  # listed
SIDE, LEFT, TOP, RIGHT = 520, 130, 115, 70  # of the square of cells, and of the room for names
_LETTERS = 20  # of a name beside the cells


def checked(confusion: Any) -> tuple[list[str], list[list[int]]] | None:
    """Labels and counts `[true][guessed]` of a result's `detail["confusion"]`; None where it is no square of counts."""
    if not isinstance(confusion, dict):
        return None
    labels, counts = confusion.get("labels"), confusion.get("counts")
    if not isinstance(labels, list) or not labels or not isinstance(counts, list) or len(counts) != len(labels):
        return None
    for row in counts:
        if not isinstance(row, list) or len(row) != len(labels):
            return None
        if not all(isinstance(count, int) and count >= 0 for count in row):
            return None
    return [str(label) for label in labels], counts


def heatmap(labels: Sequence[str], counts: Sequence[Sequence[int]], *, title: str) -> str:
    """An SVG of at most 60 classes, those with most samples: a row a true class, a column a guess.

    A cell is as strong as its share of the row; the diagonal, which is right, has a colour of its own.
    """
    order = sorted(range(len(labels)), key=lambda place: -sum(counts[place]))[:MOST]
    shown = sorted(order)
    cell = SIDE / len(shown)
    size = min(12.0, 0.8 * cell)
    box = f'viewBox="0 0 {LEFT + SIDE + RIGHT} {TOP + SIDE + 4}" style="max-width:{min(900, 420 + 25 * len(shown))}px"'
    parts = [f'<svg {box} role="img" aria-label="{escape(title)}">']
    parts.append(f'<rect class="ground" x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}"></rect>')
    for row, true in enumerate(shown):
        total, y = sum(counts[true]), TOP + row * cell
        name = escape(_short(labels[true]))
        style = f'style="font-size:{size:.1f}px"'
        parts.append(f'<text x="{LEFT - 5}" y="{y + cell / 2 + size / 3:.1f}" text-anchor="end" {style}>{name}</text>')
        x = LEFT + row * cell + cell / 2 + size / 3
        turned = f'transform="translate({x:.1f} {TOP - 5}) rotate(-60)"'
        parts.append(f"<text {turned} {style}>{name}</text>")
        for column, guess in enumerate(shown):
            count = counts[true][guess]
            if count:
                words = f"{labels[true]} taken for {labels[guess]}: {count} of {total}"
                if true == guess:
                    words = f"{labels[true]}: {count} of {total} right"
                parts.append(
                    f'<rect class="cell{" own" if true == guess else ""}" x="{LEFT + column * cell:.1f}" y="{y:.1f}" '
                    f'width="{cell:.1f}" height="{cell:.1f}" fill-opacity="{0.12 + 0.88 * count / total:.2f}">'
                    f"<title>{escape(words)}</title></rect>"
                )
                if len(shown) <= WRITTEN:
                    at = f'x="{LEFT + (column + 0.5) * cell:.1f}" y="{y + cell / 2 + 4:.1f}"'
                    parts.append(f'<text class="count" {at} text-anchor="middle">{count}</text>')
    return f'<div class="heat">{"".join(parts)}</svg></div>'


def pairs_of(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Counter[tuple[str, str]]:
    """How often each true class was taken for each other one."""
    return Counter(
        {
            (labels[true], labels[guess]): count
            for true, row in enumerate(counts)
            for guess, count in enumerate(row)
            if count and true != guess
        }
    )


def pairs_table(pairs: Counter[tuple[str, str]], totals: dict[str, int] | None = None) -> str:
    """The most frequent of them; `totals`: samples of each true class, where known."""
    rows = []
    for (true, guess), count in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:PAIRS]:
        rows.append([true, guess, f"{count} of {totals[true]}" if totals else str(count)])
    return table(["is", "was taken for", "times"], rows, "left")


def guesses_of(result: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """Captions and the first name guessed, of a result's samples that were named; the largest label set it has."""
    found = []
    zero_shot = result.get("zero_shot")
    field = "all_names" if isinstance(zero_shot, dict) and "all_names" in zero_shot else "held_out_names"
    for sample in result.get("samples") or []:
        names = sample.get(field) if isinstance(sample, dict) else None
        if isinstance(names, list) and names and isinstance(sample.get("caption"), str):
            found.append((sample["caption"], str(names[0])))
    labels = zero_shot.get(field, {}).get("labels", 0) if isinstance(zero_shot, dict) else 0
    return found, labels if isinstance(labels, int) else 0


def names_table(guesses: Sequence[tuple[str, str]]) -> str:
    """Names given wrongly, the most frequent first, and some of what they were given to."""
    wrong: dict[str, list[str]] = defaultdict(list)
    for true, guess in guesses:
        if true != guess:
            wrong[guess].append(true)
    rows = []
    for guess, truths in sorted(wrong.items(), key=lambda item: (-len(item[1]), item[0]))[:PAIRS]:
        some = ", ".join(truths[:4]) + (f" and {len(truths) - 4} more" if len(truths) > 4 else "")
        rows.append([guess, some, str(len(truths))])
    return table(["the name", "was given to", "times"], rows, "left")


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else name[: _LETTERS - 1].rstrip() + "…"
