"""What img2dataset says of the shards that it wrote: `NAME_stats.json` and `NAME.parquet` beside each `NAME.tar`."""

from __future__ import annotations

import importlib
import io
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mm.data import remote

if TYPE_CHECKING:
    from mm.data.index import ShardIndex

_DIFFERENT = 5  # shards at odds that are named


def summed(index: ShardIndex, progress: bool) -> dict[str, Any] | None:
    """What img2dataset says of the shards, summed: `status` by rows of its parquet files, else by its statistics;
    `reasons` of failures by these. None where it left no file beside any shard."""
    many = ThreadPoolExecutor(16 if any(map(remote.is_remote, index.shards)) else 1)
    with many as pool:
        bar = tqdm(total=len(index.shards), desc="img2dataset", disable=None if progress else True, leave=False)
        with bar:
            said = []
            for one in pool.map(_said, index.shards):
                said.append(one)
                bar.update()
    if not any(status is not None or bad for status, _, bad in said):
        return None
    total: Counter[str] = sum((status for status, _, _ in said if status is not None), Counter())
    reasons: Counter[str] = sum((reasons for _, reasons, _ in said), Counter())
    different = [
        {"shard": shard, "says": status["success"], "holds": about.rows}
        for shard, about, (status, _, _) in zip(index.shards, index.table.shards, said, strict=True)
        if status is not None and status["success"] != about.rows
    ]
    unreadable = [bad for _, _, bad in said if bad]
    return {
        "shards": sum(status is not None for status, _, _ in said),
        "attempted": total.total(),
        "successes": total["success"],
        "failed_to_download": total["failed_to_download"],
        "failed_to_resize": total["failed_to_resize"],
        "status": dict(total.most_common()),
        "reasons": dict(reasons.most_common()),
        "different": len(different),
        "first_different": different[:_DIFFERENT],
        "unreadable": len(unreadable),
        "first_unreadable": unreadable[:_DIFFERENT],
    }


def _said(shard: str) -> tuple[Counter[str] | None, Counter[str], str]:
    """Rows by status, failures by reason, and what could not be read, of the files beside one shard."""
    stem = shard.removesuffix(".tar")
    status: Counter[str] | None = None
    reasons, bad = Counter[str](), ""
    try:
        data = _beside(stem + "_stats.json")
        if data is not None:
            said = json.loads(data)
            counts = {name: int(said[name]) for name in ("failed_to_download", "failed_to_resize")}
            status = Counter({"success": int(said["successes"])} | {name: n for name, n in counts.items() if n})
            rest = int(said["count"]) - status.total()
            status.update({"other": rest} if rest > 0 else {})
            reasons.update({str(why): int(n) for why, n in said["status_dict"].items() if why != "success"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        bad = f"{stem}_stats.json: {' '.join(str(error).split())[:100]}"
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        return status, reasons, bad
    try:
        data = _beside(stem + ".parquet")
        if data is not None:
            rows = parquet.read_table(io.BytesIO(data), columns=["status"])
            status = Counter(map(str, rows.column("status").to_pylist()))
    except (OSError, ValueError, KeyError) as error:
        bad = f"{stem}.parquet: {' '.join(str(error).split())[:100]}"
    return status, reasons, bad


def _beside(place: str) -> bytes | None:
    if remote.is_remote(place):
        return remote.read_small(place)
    return Path(place).read_bytes() if os.path.exists(place) else None


def successes(shard: str) -> list[str] | int | None:
    """Keys of the samples that img2dataset put into a local shard, by its parquet file where pyarrow is there; else
    their number, by its statistics; None where neither says so."""
    stem = shard.removesuffix(".tar")
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        rows = parquet.read_table(f"{stem}.parquet", columns=["key", "status"]).to_pylist()
        return [str(row["key"]) for row in rows if row["status"] == "success"]
    except (ImportError, OSError, ValueError, KeyError):
        pass
    try:
        return int(json.loads(Path(f"{stem}_stats.json").read_text(encoding="utf-8"))["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
