"""Results as the table that README shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench: made by `make bench` -->", "<!-- end of bench -->"


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line a result: ours, the peer's, the ratio with the extremes of both, the mark and whether it is reached."""
    lines = ["| what | mm | peer | | mark | |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['what']} | | | failed: {row['error'].replace('|', '/')} | | |")
            continue
        what = row.get("what", row["name"])
        if "peer" not in row:
            sign = "≤" if row["better"] == "lower" else "≥"
            lines.append(
                f"| {what} | **{number(row['ours'])}** {row['unit']} | | | {_mark(row, sign)} | {verdict(row)} |"
            )
            continue
        peer = f"{number(row['peer'])} ({row.get('against', 'peer')})"
        ours = f"{number(row['ours'])} {row['unit']}"
        lines.append(
            f"| {what} | {ours} | {peer} | **{row['ratio']:.2f}×** | {_mark(row, '≥', '×')} | {verdict(row)} |"
        )
    return "\n".join(lines)


def reached(row: dict[str, Any]) -> bool | None:
    """Whether a result reaches its mark; None where it has none."""
    if not row.get("mark"):
        return None
    if "peer" in row:
        return bool(row["ratio"] >= row["mark"])
    return bool(row["ours"] <= row["mark"] if row["better"] == "lower" else row["ours"] >= row["mark"])


def verdict(row: dict[str, Any]) -> str:
    return {True: "reached", False: "**missed**", None: ""}[reached(row)]


def number(value: float) -> str:
    """Three digits, or all of a whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _mark(row: dict[str, Any], sign: str, unit: str = "") -> str:
    return f"{sign} {row['mark']:.3g}{unit}" if row.get("mark") else ""


def in_readme(path: Path, table: str, source: str) -> None:
    """Put `table` between the two comments of README. Raises ValueError where they are not there."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path.name} has no place for the table: {BEGIN} … {END}")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    note = f"Two CPU cores, medians; all numbers: [benchmarks/{source}](benchmarks/{source})."
    path.write_text(f"{head}{BEGIN}\n\n{table}\n\n{note}\n\n{END}{tail}", encoding="utf-8")
