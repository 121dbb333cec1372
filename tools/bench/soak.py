"""Whether memory stays flat: the loader for an hour over a few shards, and what it and its workers hold meanwhile.

Memory is the sum of proportional set sizes (pages shared by processes count once) over this process and all below it.
Pictures are decoded and cropped to 224, captions tokenized, two workers; the shards are passed over again and again.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from statistics import median

import numpy as np
from _common import arguments, circumstances
from _photographs import photograph_shards

from mm.adapters.image import ImageProcessor
from mm.adapters.text import ClipTokenizer, TextProcessor
from mm.data.loader import Loader


def resident() -> int:
    """Bytes that this process and all its descendants hold."""
    parents: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    total, waiting = 0, [os.getpid()]
    while waiting:
        process = waiting.pop()
        waiting += parents.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def main() -> None:
    args = arguments("memory of the loader over time", minutes=60, every=20)
    spec = "::".join(map(str, photograph_shards()))
    processors = {"image": ImageProcessor(224, crop_scale=0.9), "text": TextProcessor(ClipTokenizer(), 77)}
    loader = Loader(spec, processors, batch_size=64, train=True, workers=2)
    start, held, samples, due = time.monotonic(), [], 0, 0.0
    for batch in loader:
        samples += len(batch)
        seconds = time.monotonic() - start
        if seconds >= due:
            held.append((seconds, resident()))
            due += args.every
            if len(held) % 15 == 1:
                print(f"{seconds / 60:5.1f} min  {samples:>9,} samples  {held[-1][1] / 1e6:7.1f} MB", flush=True)
        if seconds > 60 * args.minutes:
            break
    # the first tenth fills caches and allocators; then the medians of a tenth each, and a straight line through all
    tenth = max(len(held) // 10, 1)
    settled = held[tenth:]
    first, last = (median(size for _, size in part) for part in (settled[:tenth], settled[-tenth:]))
    slope = float(np.polyfit([t for t, _ in settled], [size for _, size in settled], 1)[0])
    span = settled[-1][0] - settled[0][0]
    result = {
        "name": "memory of the loader over time",
        "ours": 100 * (last / first - 1),
        "peer": 0.0,
        "ratio": last / first,
        "unit": "% growth",
        "mark": 2.0,
        "better": "lower",
        "rounds": 1,
        "minutes": args.minutes,
        "samples": samples,
        "epochs": samples / loader.samples,
        "first_mb": first / 1e6,
        "last_mb": last / 1e6,
        "line_percent": 100 * slope * span / first,
        "held_mb": [round(size / 1e6, 1) for _, size in held[:: max(len(held) // 60, 1)]],
        **circumstances(("mm", "torch", "numpy")),
    }
    print(
        f"{samples:,} samples in {args.minutes} min: {first / 1e6:.1f} -> {last / 1e6:.1f} MB, {result['ours']:+.2f} %"
    )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
