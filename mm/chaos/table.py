"""The suite's result for a person, for a README and for a program."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from os import sched_getaffinity
from pathlib import Path
from typing import Any

from mm.chaos.suite import Finding, Scenario

WIDTH = 120  # characters of a line that was seen


@dataclass(frozen=True)
class Row:
    """What came of one scenario; `problem` "" where it went as it should."""

    scenario: Scenario
    finding: Finding | None
    problem: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON."""
        found = self.finding
        return {
            "name": self.scenario.name,
            "processes": self.scenario.processes,
            "injected": self.scenario.where,
            "seen": found.seen if found else "",
            "resumed_from": found.resumed if found else None,
            "steps_lost": found.lost if found else None,
            "verdict": found.verdict if found else f"failed: {self.problem}",
            "ok": found is not None,
            "seconds": round(self.seconds, 1),
        }


def text(rows: Sequence[Row]) -> str:
    """A table for a terminal: fault, what was seen, where the run went on, verdict."""
    lines = []
    for row in rows:
        one = row.as_dict()
        lines.append(f"{'ok ' if one['ok'] else 'BAD'} {one['injected']} ({_processes(row.scenario.processes)})")
        if one["seen"]:
            lines.append(f"      {shortened(one['seen'])}")
        lines.append(f"      {_went_on(one)}{one['verdict']}; {one['seconds']:.0f} s")
    bad = sum(not row.finding for row in rows)
    lines.append(f"{len(rows)} faults: {len(rows) - bad} as they should be, {bad} not")
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """The rows of a result as a table for a README."""
    lines = ["| fault | where | what was seen | went on from |", "|---|---|---|---|"]
    for row in result["faults"]:
        lost = row["steps_lost"]
        again = f", {lost or 'no'} step{'' if lost == 1 else 's'} again"
        went = row["verdict"] if row["resumed_from"] is None else f"step {row['resumed_from']}{again}"
        seen = shortened(row["seen"]).replace("|", "\\|") or row["verdict"]
        lines.append(f"| {row['name']} | {row['injected']} ({_processes(row['processes'])}) | {seen} | {went} |")
    return "\n".join(lines) + "\n"


def result(rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    """The whole result as JSON: a row a fault, and what it was measured on."""
    packages = {name: version(name) for name in ("mm", "torch", "numpy")}
    return {
        "name": "mm chaos",
        "faults": [row.as_dict() for row in rows],
        "failed": sum(not row.finding for row in rows),
        "seconds": round(seconds, 1),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **packages},
        "machine": f"{platform.machine()}, {len(sched_getaffinity(0))} cores",
        "date": time.strftime("%F"),
    }


def shortened(line: str) -> str:
    """A line that fits a table."""
    return line if len(line) <= WIDTH else line[: WIDTH - 4].rstrip() + " ..."


def _went_on(row: dict[str, Any]) -> str:
    if row["resumed_from"] is None:
        return ""
    lost = row["steps_lost"]
    return f"went on from step {row['resumed_from']}, {lost or 'no'} step{'' if lost == 1 else 's'} lost; "


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _commit() -> str:
    """The commit that the running code is of, "-dirty" where files differ; "" outside of a checkout."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except OSError:
        return ""
