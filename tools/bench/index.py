"""The index: how fast it is built, how fast 1,000,000 samples and 10,000 shards are opened, and what they weigh.

Building is compared with the standard library doing the same: `tarfile`'s list of members and a SHA-256 of the file.
Shards are hard links to one, so that a million samples of 46 kB fit on a disk and in the page cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from _common import arguments, cache_folder, report
from _photographs import captions, photograph_shards

from mm.data import sidecar
from mm.data.indexing import index
from mm.data.pack import ShardWriter
from mm.data.tar import File, Scan

OPEN = """
import json, sys, time
import mm.data.sources
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) << 10
before, start = resident(), time.perf_counter()
index = mm.data.sources.open_sources(sys.argv[1]).index
opened = time.perf_counter() - start
for name, column in index.table.columns.items():
    if name not in ("width", "height", "crc"):
        int(column.sum(dtype="uint64"))  # every page that training reads
print(json.dumps({"seconds": opened, "samples": len(index), "bytes": (resident() - before) / len(index)}))
"""
RESUME = """
import json, sys, time
from mm.adapters.image import ImageProcessor
from mm.data.loader import Loader
start = time.perf_counter()
processors, batch = {"image": ImageProcessor(32)}, int(sys.argv[2])
loader = Loader(sys.argv[1], processors, batch_size=64, train=True, start=batch, ahead=False)
keys = next(iter(loader)).keys
print(json.dumps({"seconds": time.perf_counter() - start, "keys": len(keys)}))
"""


def shard(folder: Path, samples: int) -> Path:
    """One shard of so many samples, made of the photographs of the other benchmarks."""
    path = folder / f"one-{samples}" / "train-000000.tar"
    if not path.is_file():
        found = []
        for source in photograph_shards():
            fd = os.open(source, os.O_RDONLY)
            found += [os.pread(fd, m.size, m.offset) for m in Scan(File(fd)) if m.name.endswith(".jpg")]
            os.close(fd)
        with ShardWriter(path.parent, samples) as writer:
            for number, text in enumerate(captions(samples)):
                data = {"jpg": found[number % len(found)], "txt": text.encode(), "json": b'{"width": 500}'}
                writer.add("train", f"{number:09d}", data)
            writer.finish({})
    return path


def links(source: Path, count: int) -> Path:
    folder = source.parent.parent / f"{source.parent.name}-x{count}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(count):
        os.link(source, folder / f"train-{number:06d}.tar")
    return folder


def tarfile_and_hash(path: Path) -> None:
    with tarfile.open(path) as tar:
        tar.getmembers()
    with open(path, "rb") as file:
        hashlib.file_digest(file, "sha256")


def child(code: str, *words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = arguments("the index: build, open, resume", rounds=5, shards=100, many=10_000)
    folder = cache_folder("bench", "index")
    os.environ["MM_CACHE"] = str(folder / "cache")
    large = shard(folder, 10_000)
    size = large.stat().st_size / 1e6
    ours, peer = [], []
    for _ in range(args.rounds):
        start = time.perf_counter()
        sidecar.scan(str(large), whole=True)
        ours.append(size / (time.perf_counter() - start))
        start = time.perf_counter()
        tarfile_and_hash(large)
        peer.append(size / (time.perf_counter() - start))
    million = links(large, args.shards)
    start = time.perf_counter()
    index(str(million))
    built = time.perf_counter() - start
    opened = [child(OPEN, f"{million}/*.tar") for _ in range(args.rounds)]
    many = links(shard(folder, 100), args.many)
    index(str(many))
    resumed = [child(RESUME, f"{many}/*.tar", str(number * 1000 + 7)) for number in range(args.rounds)]
    report(
        "index built, one core",
        ours,
        peer,
        unit="MB/s",
        mark=300 / median(peer),
        better="higher",
        packages=("mm", "numpy"),
        args=args,
        mark_mb_per_second=300,
        samples=opened[0]["samples"],
        build_seconds_two_cores=built,
        build_mb_per_second_two_cores=size * args.shards / built,
        open_seconds=median(o["seconds"] for o in opened),
        resident_bytes_per_sample=median(o["bytes"] for o in opened),
        shards_resumed=args.many,
        resume_seconds=median(r["seconds"] for r in resumed),
    )


if __name__ == "__main__":
    main()
