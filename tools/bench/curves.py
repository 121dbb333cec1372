"""How cost grows: with batch, image tokens, labels and shards; slopes, and a plot each.

    python tools/bench/curves.py                   all of it
    python tools/bench/curves.py --part shards     one part, the others' figures stay

Each point is a process of its own (`_growth_probe.py`). A slope is the exponent p of cost ~ size^p, between every two
neighbours and overall by least squares through the logarithms: 1 is linear, and above `MOST` at the end of a curve is
said. Writes benchmarks/curves.json and benchmarks/curves-PART.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import ROOT, cache_folder, circumstances
from _growth import Points, save_curves, slopes

BATCHES = (64, 128, 256, 512, 1024)
SIDES = (56, 80, 128, 184, 256)  # pixels, in patches of 8: 49, 100, 256, 529 and 1,024 tokens
LABELS, TEXTS = (10, 100, 1_000, 10_000, 100_000), (10, 100, 1_000)
SHARDS, SAMPLES = (10, 100, 1_000, 10_000), 8  # of so many samples each
MOST = 1.15  # slope that is called superlinear: a linear cost, as timed here, stays below
OUT = Path(ROOT) / "benchmarks"

Lines = dict[str, list[tuple[float, float]]]


def probe(kind: str, **request: Any) -> dict[str, float]:
    """What one process measured. Raises RuntimeError with the end of what it said where it fails."""
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "_growth_probe.py"), kind, json.dumps(request)]
    path = os.pathsep.join([ROOT, os.path.join(ROOT, "kernels")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{kind} {request} failed: {done.stderr[-1500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{kind} {request}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
    return found


def batch() -> dict[str, Lines]:
    """Training steps of configs/demo.py's towers, 32 px, contrastive."""
    seconds: Lines = {}
    megabytes: Lines = {}
    for accumulate in (1, 4):
        name = "whole batch" if accumulate == 1 else f"{accumulate} micro-batches"
        found = [(size, probe("step", batch=size, size=32, accumulate=accumulate, joint=False)) for size in BATCHES]
        seconds[name] = [(size, point["seconds"]) for size, point in found]
        megabytes[name] = [(size, point["bytes"] / 1e6) for size, point in found]
    return {"seconds a step": seconds, "MB above what stays": megabytes}


def tokens() -> dict[str, Lines]:
    """The same at batch 8 with larger pictures, also with the denoiser, whose tokens grow as much."""
    seconds: Lines = {}
    megabytes: Lines = {}
    for name, joint in (("contrastive", False), ("joint", True)):
        found = [((side // 8) ** 2, probe("step", batch=8, size=side, accumulate=1, joint=joint)) for side in SIDES]
        seconds[name] = [(count, point["seconds"]) for count, point in found]
        megabytes[name] = [(count, point["bytes"] / 1e6) for count, point in found]
    found = [((side // 8) ** 2, probe("attention", batch=8, tokens=(side // 8) ** 2)) for side in SIDES]
    seconds["vision attention alone"] = [(count, point["seconds"]) for count, point in found]
    megabytes["one vision attention"] = [(count, point["bytes"] / 1e6) for count, point in found]
    return {"seconds a step": seconds, "MB above what stays": megabytes}


def labels() -> dict[str, Lines]:
    """Label weights kept and found again, labels encoded, and a picture's embedding compared with them all."""
    found = [(count, probe("labels", count=count)) for count in LABELS]
    encoded = [(count, probe("texts", count=count)["seconds"]) for count in TEXTS]
    return {
        "seconds": {
            "text encoding": encoded,
            "weights kept on disk": [(count, point["kept"]) for count, point in found],
            "weights found again": [(count, point["found"]) for count, point in found],
            "one image's five likeliest": [(count, point["seconds"]) for count, point in found],
        },
        "MB an image": {"probabilities": [(count, point["bytes"] / 1e6) for count, point in found]},
    }


def shards() -> dict[str, Lines]:
    """Shards of eight small pictures, hard links to one: indexed, opened, and the first batch in hand."""
    from mm.data.indexing import index

    os.environ["MM_CACHE"] = str(cache_folder("bench", "curves", "cache"))
    points = []
    for count in SHARDS:
        folder = many(count)
        start = time.perf_counter()
        index(str(folder))
        points.append((count, {"indexed": time.perf_counter() - start, **probe("shards", pattern=f"{folder}/*.tar")}))
        shutil.rmtree(folder)
    named = {"mm shards index": "indexed", "index opened after it": "cold"}
    named |= {"index opened again": "opened", "first batch in hand": "first"}
    return {
        "seconds": {name: [(count, point[key]) for count, point in points] for name, key in named.items()},
        "MB held": {"opened index": [(count, max(point["bytes"], 0) / 1e6) for count, point in points]},
    }


def many(count: int) -> Path:
    """A folder of so many shards."""
    from _photographs import photographs

    from mm.data.pack import ShardWriter

    folder = cache_folder("bench", "curves")
    one = folder / "one" / "train-000000.tar"
    if not one.is_file():
        with ShardWriter(one.parent, SAMPLES) as writer:
            for number, data in enumerate(photographs(SAMPLES)):
                writer.add("train", f"{number:09d}", {"jpg": data, "txt": b"a picture"})
            writer.finish({})
    made = folder / f"x{count}"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    for number in range(count):
        os.link(one, made / f"train-{number:06d}.tar")
    return made


PARTS = {
    "batch": (batch, "samples a batch"),
    "tokens": (tokens, "image tokens"),
    "labels": (labels, "labels"),
    "shards": (shards, "shards"),
}


def superlinear(name: str, points: Points) -> str:
    """A sentence where the curve's last segment is steeper than `MOST`; else ""."""
    last = slopes(points)["segments"][-1:]
    return f"{name}: slope {last[0]} at the end" if last and last[0] > MOST else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), default=None, help="only this one")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args(argv)
    path = OUT / "curves.json"
    parts: dict[str, Any] = json.loads(path.read_text())["parts"] if path.is_file() else {}
    for name in [args.part] if args.part else PARTS:
        measure, across = PARTS[name]
        start = time.perf_counter()
        panels = measure()
        parts[name] = {
            "what": measure.__doc__,
            "across": across,
            "panels": panels,
            "slopes": {panel: {line: slopes(p) for line, p in lines.items()} for panel, lines in panels.items()},
            "superlinear": [
                said for panel, lines in panels.items() for line, p in lines.items() if (said := superlinear(line, p))
            ],
            "seconds": time.perf_counter() - start,
            **circumstances(("mm", "torch")),
        }
        save_curves(OUT / f"curves-{name}.png", {f"{name}: {p}": lines for p, lines in panels.items()}, across, "")
        for panel, lines in parts[name]["slopes"].items():
            for line, found in lines.items():
                print(f"{name}, {panel}, {line}: slope {found['overall']}, between neighbours {found['segments']}")
    result = {"name": "how cost grows", "unit": "exponent of cost over size", "parts": parts}
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    os.replace(path.with_suffix(".part"), path)
    for part in parts.values():
        for said in part["superlinear"]:
            print(f"superlinear: {said}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
