"""What the benchmark scripts share: timing in alternation, and one JSON object on the last line."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import median
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def alternate(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each call, the two sides in turn, after one call of each that is not counted."""
    ours()
    peer()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, function in enumerate((ours, peer)):
            start = time.perf_counter()
            function()
            seconds[side].append(time.perf_counter() - start)
    return seconds


def report(
    name: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    unit: str,
    mark: float,
    better: str,
    packages: Sequence[str],
    **more: Any,
) -> None:
    """Print medians and their ratio; with --json, one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=name)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args()
    a, b = median(ours), median(peer)
    ratio = b / a if better == "lower" else a / b
    print(f"{name}: {a:.4g} against {b:.4g} {unit}: {ratio:.2f} times better (mark {mark}, {len(ours)} rounds)")
    if args.json:
        result = {
            "name": name,
            "ours": a,
            "peer": b,
            "ratio": ratio,
            "unit": unit,
            "mark": mark,
            "better": better,
            "rounds": len(ours),
            "spread": {"ours": [min(ours), max(ours)], "peer": [min(peer), max(peer)]},
            "commit": commit(),
            "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "date": datetime.date.today().isoformat(),
            **more,
        }
        print(json.dumps(result))


def commit() -> str:
    """The commit of this checkout, "-dirty" where files differ."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def python(*arguments: str) -> None:
    """A fresh interpreter, its output thrown away; raises where it fails."""
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
