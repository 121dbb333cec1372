"""An embedding index of 1,000,000 x 512 numbers: how fast it opens, and one exact query against matmul and top-k.

Both read the same mapped file with the same threads; first they must find the same rows. `--lists 1` times the lists
too, with the share of the exact top 10 that they find, on vectors that cluster as embeddings do (making them takes
minutes). `--rows 20000` is a smoke run.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _common import alternate, arguments, report

from mm.evaluation import vector_store as store
from mm.evaluation.nearest import BLOCK
from mm.evaluation.vector_build import _write_lists
from mm.evaluation.vectors import VectorIndex

OPEN = """
import sys, time
from mm.evaluation.vectors import VectorIndex
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) << 10
before, start = resident(), time.perf_counter()
index = VectorIndex.open(sys.argv[1])
index.key(len(index) - 1), index.captions(0)
print(time.perf_counter() - start, resident() - before)
"""


def write(folder: Path, rows: int, dim: int, clusters: int) -> None:
    """An index of unit vectors around `clusters` centres, 0 for none: normal in every direction."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(clusters, 1), dim), np.float32)
    raw = folder / "raw"
    with open(raw, "wb") as file:
        for start in range(0, rows, BLOCK):
            some = rng.standard_normal((min(BLOCK, rows - start), dim), np.float32)
            if clusters:
                some += centres[rng.integers(0, clusters, len(some))]
            file.write((some / np.linalg.norm(some, axis=1, keepdims=True)).data)
    store.write_columns(folder / store.EMBEDDINGS, [("embeddings", "float32", (rows, dim), raw)])
    raw.unlink()
    keys = np.frombuffer("".join(f"{n:09d}" for n in range(rows)).encode(), np.uint8)
    ends = 9 * np.arange(1, rows + 1)
    columns: list[Any] = [("keys", "uint8", keys.shape, keys), ("key_ends", "int64", (rows,), ends)]
    columns += [("captions", "uint8", keys.shape, keys), ("caption_ends", "int64", (rows,), ends)]
    columns += [("caption_counts", "int64", (rows,), np.arange(1, rows + 1))]
    store.write_columns(folder / store.SAMPLES, columns)
    shards = [store.ShardFacts("bench-000000.tar", 0, "", rows)]
    about = store.About("bench", "bench", "", rows, dim, "fp32", "txt", None, 0, shards)
    (folder / store.INDEX).write_bytes(about.to_bytes())


def lists_too(folder: Path, queries: torch.Tensor, rounds: int) -> dict[str, float]:
    start = time.perf_counter()
    about = store.read_about(folder)
    about.lists = _write_lists(folder, about, False)
    (folder / store.INDEX).write_bytes(about.to_bytes())
    built = time.perf_counter() - start
    index = VectorIndex.open(folder)
    right = index.search(queries, 10, approximate=False)[0].tolist()
    found = index.search(queries, 10, approximate=True)[0].tolist()
    assert not index.note, index.note
    seconds = []
    for place in range(rounds):
        start = time.perf_counter()
        index.search(queries[place % len(queries)][None], 10, approximate=True)
        seconds.append(time.perf_counter() - start)
    share = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, right, strict=True)]))
    print(f"lists: made in {built:.0f} s, a query {1e3 * median(seconds):.1f} ms, {share:.3f} of the exact top 10")
    return {"lists_seconds": built, "lists_query_ms": 1e3 * median(seconds), "lists_recall_at_10": share}


def main() -> None:
    args = arguments("one exact query", rows=1_000_000, dim=512, rounds=11, queries=64, lists=0)
    folder = Path(tempfile.mkdtemp(prefix="vectors-"))
    try:
        write(folder, args.rows, args.dim, args.rows // 100 if args.lists else 0)
        opened = [
            [
                float(word)
                for word in subprocess.run(
                    [sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True
                ).stdout.split()
            ]
            for _ in range(5)
        ]
        index = VectorIndex.open(folder)
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # mapped, and only read
        matrix = torch.from_numpy(index.embeddings)
        noise = torch.randn(args.queries, args.dim, generator=torch.Generator().manual_seed(1))
        near = matrix[torch.arange(args.queries) * (args.rows // args.queries)]
        queries = torch.nn.functional.normalize(near + 0.05 * noise, dim=1)
        one = queries[:1]
        assert torch.equal(index.search(one, 10, approximate=False)[0], (one @ matrix.T).topk(10).indices)
        ours, peer = alternate(
            lambda: index.search(one, 10, approximate=False), lambda: (one @ matrix.T).topk(10), args.rounds
        )
        many, many_peer = alternate(
            lambda: index.search(queries, 10, approximate=False), lambda: (queries @ matrix.T).topk(10), 3
        )
        found = {
            "rows": args.rows,
            "dim": args.dim,
            "threads": torch.get_num_threads(),
            "open_ms": 1e3 * median(seconds for seconds, _ in opened),
            "open_resident_mb": median(size for _, size in opened) / 1e6,
            f"queries_{args.queries}_ms": [1e3 * median(many), 1e3 * median(many_peer)],
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }
        print(json.dumps(found))
        if args.lists:
            found |= lists_too(folder, queries, args.rounds)
        report(
            f"one exact query in {args.rows:,} rows against a matmul and top-k of torch's",
            [1e3 * second for second in ours],
            [1e3 * second for second in peer],
            unit="ms",
            mark=1.0,
            better="lower",
            packages=("mm", "torch", "faiss-cpu"),
            args=args,
            **found,
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
