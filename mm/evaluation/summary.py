"""A result in a few lines: the shares that reports lead with, and every metric with its standard error."""

from __future__ import annotations

from typing import Any

from mm.evaluation.share import Share

LED = ("zero_shot", "generation")  # tasks whose numbers are among the headlines


def headlines(result: dict[str, Any]) -> dict[str, Share]:
    """The shares of a result that are worth a line each, by what they say."""
    wanted = {
        "zero-shot top-1, held-out names": ("zero_shot", "held_out_names", "top1"),
        "zero-shot top-1, all names": ("zero_shot", "all_names", "top1"),
        "… held-out names, without skin tones": ("zero_shot", "held_out_names_without_skin_tones", "top1"),
        "… all names, without skin tones": ("zero_shot", "all_names_without_skin_tones", "top1"),
        "drawing, training captions": ("generation", "train"),
        "drawing, held-out captions": ("generation", "held_out"),
        "… held-out captions, without skin tones": ("generation", "held_out_without_skin_tones"),
    }
    found = {}
    for title, path in wanted.items():
        node: Any = result
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            found[title] = Share(**node)
    return found


def summary(result: dict[str, Any]) -> str:
    """A result as a few lines for a terminal."""
    lines = [
        f"{title:<40} {100 * share.value:5.1f} % ± {100 * share.error:.1f}  (n = {share.n})"
        for title, share in headlines(result).items()
    ]
    led = {row["name"] for row in result["tasks"] if row["name"] == row["kind"] and row["name"] in LED}
    for row in result["tasks"]:
        if row["name"] not in led:
            lines += [metric_line(f"{row['name']} {name}", row, name) for name in row["metrics"]]
    added = result.get("retrieval", {}).get("modalities", {})
    lines += [f"{name:<40} {100 * value:5.1f} %" for name, value in added.items() if "@" in name]
    return "\n".join(lines)


def metric_line(title: str, row: dict[str, Any], name: str) -> str:
    """`title   0.6244 ± 0.0332  (n = 213)`."""
    value, error = row["metrics"][name], row["errors"].get(name)
    shown = "none" if value is None else f"{value:.4g}"
    return f"{title:<40} {shown:>8}{'' if error is None else f' ± {error:.2g}'}  (n = {row['n'][name]})"
