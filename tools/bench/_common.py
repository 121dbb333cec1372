"""What benchmark scripts share: timing in alternation, peers in folders of their own, one JSON object at the end."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

OPEN_CLIP = ("open_clip-3.3.0", "open_clip_torch[training]==3.3.0", "webdataset==0.2.86")  # the newest for its trainer
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def alternate(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each call of two sides, as `rounds_of`."""
    seconds = rounds_of({"ours": ours, "peer": peer}, rounds)
    return seconds["ours"], seconds["peer"]


def rounds_of(sides: dict[str, Callable[[], object]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each call of each side, in turn; `warm` rounds before them are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm + rounds):
        for name, function in sides.items():
            start = time.perf_counter()
            function()
            if number >= warm:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def fastest(sides: dict[str, Callable[[], object]]) -> str:
    """The side that takes the least time, of one call each. All have been called before."""
    seconds = {}
    for name, function in sides.items():
        start = time.perf_counter()
        function()
        seconds[name] = time.perf_counter() - start
    return min(seconds, key=lambda name: seconds[name])


def report(
    name: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    unit: str,
    mark: float,
    better: str,
    packages: Sequence[str],
    args: argparse.Namespace | None = None,
    **more: Any,
) -> None:
    """Print medians and their ratio; with --json, one JSON object on the last line.

    `args`: what `arguments` gave, where the script has read the command line itself.
    """
    if args is None:
        args = arguments(name)
    a, b = median(ours), median(peer)
    ratio = b / a if better == "lower" else a / b
    verdict = f"{ratio:.2f} times better" if ratio >= 1 else f"{1 / ratio:.2f} times worse"
    print(f"{name}: {a:.4g} against {b:.4g} {unit}: {verdict} (mark {mark:.3g}, {len(ours)} rounds)")
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
            **circumstances(packages),
            **more,
        }
        print(json.dumps(result))


def figure(
    name: str,
    value: float,
    *,
    unit: str,
    mark: float,
    better: str,
    json_too: bool,
    packages: Sequence[str],
    **more: Any,
) -> None:
    """A figure that is held against a mark and no peer, printed as `report` does."""
    print(f"{name}: {value:.4g} {unit} (mark {mark:.3g})")
    if json_too:
        result = {"name": name, "ours": value, "unit": unit, "mark": mark, "better": better}
        print(json.dumps({**result, **circumstances(packages), **more}))


def arguments(description: str, **options: int | str) -> argparse.Namespace:
    """The command line: --json, and a whole number or word for each of `options`, with its default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    return parser.parse_args()


def circumstances(packages: Sequence[str]) -> dict[str, Any]:
    """Commit, versions, machine and date of a measurement."""
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """The commit of this checkout, "-dirty" where files differ."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def python(*arguments: str) -> None:
    """A fresh interpreter, its output thrown away; raises where it fails."""
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def cache_folder(*names: str) -> Path:
    """A folder, which may not be there yet, in the user's cache: what is made once and kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mm", *names)


def peer_python(name: str, *requirements: str) -> str:
    """A Python that has `requirements` in an environment of its own and, behind them, the packages of the running one.

    So a peer gets the versions that it asks for, and torch is not copied. Installed by pip where it is not there yet;
    raises RuntimeError with the last of what pip said where that fails.
    """
    folder, shared = cache_folder("peers", name), sysconfig.get_path("purelib")
    interpreter, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join([shared, *requirements])
    if not stamp.is_file() or stamp.read_text() != wanted:
        _run(sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder))
        own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        Path(own, "shared.pth").write_text(shared + "\n")
        pip = (sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet")
        _run(*pip, "--no-deps", "--ignore-installed", *requirements)  # even where the running one has that version
        _run(*pip, *requirements)
        stamp.write_text(wanted)
    return str(interpreter)


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    if result.returncode:
        last = " ".join(result.stderr.split())[-600:]
        raise RuntimeError(f"{' '.join(command[1:])} failed: {last}")
