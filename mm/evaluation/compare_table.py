"""A comparison for people: the numbers side by side, and what else is not the same in two results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mm.evaluation.compare import LEVEL, compare


def what_differs(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """A line for each thing beside the numbers that is not the same in both."""
    found = [f"{name}: {_short(one)} against {_short(other)}" for name, one, other in _facts(a, b) if one != other]
    theirs = {row["name"]: row for row in b["tasks"]}
    for row in a["tasks"]:
        if row["name"] not in theirs:
            found.append(f"{row['name']}: only in A")
            continue
        other = theirs.pop(row["name"])
        hashes = (row["hashes"], other["hashes"])
        if any(one.get("data") != two.get("data") for one, two in [hashes]) or _differ(hashes, "images"):
            found.append(f"{row['name']}: NOT THE SAME DATA: {row.get('dataset')} and {other.get('dataset')}")
        for name in ("truth", "labels", "templates"):
            if _differ(hashes, name):
                found.append(f"{row['name']}: other {name}")
        for key in dict.fromkeys([*row["settings"], *other["settings"]]):
            one, two = row["settings"].get(key), other["settings"].get(key)
            if one != two:
                found.append(f"{row['name']}: {key} = {_short(one)} against {_short(two)}")
        if row.get("task_version") != other.get("task_version"):
            found.append(f"{row['name']}: version {row.get('task_version')} against {other.get('task_version')}")
    return found + [f"{name}: only in B" for name in theirs]


def _facts(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What the results say of themselves, by name."""
    for name in ("run", "step", "seed", "commit", "split"):
        yield name, a.get(name), b.get(name)
    for group in ("settings", "versions"):
        one, other = a.get(group) or {}, b.get(group) or {}
        for key in dict.fromkeys([*one, *other]):
            if group == "versions" or key == "precision":  # the other settings are the tasks' own
                yield key, one.get(key), other.get(key)
    models = [row["hashes"].get("model") for row in (a["tasks"][0], b["tasks"][0])]
    yield "model", *models


def _differ(hashes: tuple[dict[str, Any], dict[str, Any]], name: str) -> bool:
    """Whether both have such a hash and it is not the same."""
    one, other = (found.get(name) for found in hashes)
    return one is not None and other is not None and one != other


def _short(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value)
    return shown if len(shown) <= 60 else shown[:59] + "…"


def table(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str]) -> str:
    """Both results side by side, and below what else differs."""
    lines = [f"A: {names[0]} ({_about(a)})", f"B: {names[1]} ({_about(b)})", ""]
    found = compare(a, b)
    width = max(24, *(len(one.metric) + 2 for one in found))
    lines.append(f"{'':{width}} {'A':>10} {'B':>10} {'B - A':>10}   {'error':>8} {'p':>8}")
    task = ""
    for one in found:
        if one.task != task:
            lines.append(one.task)
            task = one.task
        error, p = ("?" if number != number else f"{number:.2g}" for number in (one.error, one.p))
        mark = "*" if one.significant else " "
        numbers = f"{one.a:10.4f} {one.b:10.4f} {one.b - one.a:+10.4f} ± {error:>8} {p:>8} {mark}"
        lines.append(f"  {one.metric:{width - 2}} {numbers} {one.how}, n = {one.n}")
    expected = LEVEL * len(found)
    lines.append("")
    lines.append(f"* p < {LEVEL}: of {len(found)} comparisons, {expected:.1f} are expected to say so by chance alone")
    others = what_differs(a, b)
    lines += ["what else differs:", *(f"  {line}" for line in others)] if others else ["nothing else differs"]
    return "\n".join(lines)


def _about(result: dict[str, Any]) -> str:
    step = "" if result.get("step") is None else f", step {result['step']}"
    return f"{result.get('run')}{step}, seed {result.get('seed')}"
