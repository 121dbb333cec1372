"""`mm checkpoints`: which checkpoints a run has, every byte of them compared with its manifest. Needs no torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from mm.training import manifest
from mm.usage import Parser, UsageError


def checkpoints(argv: Sequence[str]) -> int:
    parser = Parser("checkpoints", "Lists the checkpoints of a run and verifies every byte; exit 1 for a damaged one.")
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.read(argv)
    run = Path(args.run)
    if not (run / "config.json").is_file() and not (run / "checkpoints").is_dir():
        raise UsageError(f"{run}: not a run folder; give the run.dir of a training")
    found = _examine(manifest.committed(run), manifest.latest(run))
    left = [path.name for path in manifest.leftovers(run)]
    if args.json:
        print(json.dumps({"checkpoints": found, "latest": manifest.latest(run), "leftovers": left}))
    else:
        _tell(run, found, left)
    return int(any(one["problem"] for one in found))


def _examine(folders: Sequence[Path], latest: str) -> list[dict[str, Any]]:
    """A record for each checkpoint, newest first, with a bar of the bytes read on a terminal."""
    from tqdm import tqdm

    seen = [(folder, *manifest.inspect(folder)) for folder in folders]
    total = sum(content.size for _, content, problem in seen if content and not problem)
    records = []
    show = sys.stderr.isatty()
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=not show) as bar,
    ):
        for folder, content, problem in seen:
            if content and not problem:
                check = partial(manifest.damage, folder, progress=bar.update)
                found = pool.map(check, content.files, content.files.values())
                problem = next(filter(None, found), "")
            if not folder.exists():  # a run that goes on has dropped it meanwhile
                continue
            there = [path.stat() for path in folder.iterdir()]
            records.append(
                {
                    "name": folder.name,
                    "step": manifest.step_of(folder),
                    "bytes": sum(stat.st_size for stat in there),
                    "files": len(there),
                    "processes": content.world if content else None,
                    "time": content.time if content else folder.stat().st_mtime,
                    "problem": problem,
                    "latest": folder.name == latest,
                }
            )
    return records


def _tell(run: Path, found: Sequence[dict[str, Any]], left: Sequence[str]) -> None:
    for one in found:
        count = one["processes"]
        processes = f"{'?' if count is None else count} process{'' if count == 1 else 'es'}"
        verdict = f"damaged: {one['problem']}" if one["problem"] else "good"
        print(
            f"{one['name']}  {manifest.gigabytes(one['bytes']):>9}  {one['files']} files of {processes}  "
            f"{_age(time.time() - one['time']):>11}  {verdict}{', latest' if one['latest'] else ''}"
        )
    if not found:
        print(f"{run}: no checkpoint yet")
    for name in left:
        print(f"{name}: being written, or left by an interrupted save")


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
