"""Bytes a second that the reader gives, sample by sample from shards in the page cache, against `dd bs=1M` on them.

What bounds it is measured beside it: `pread`, one system call for each member at offsets known beforehand and nothing
else; `readinto`, the shards' bytes in pieces of 1 MiB into one buffer, as dd does it but in Python.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from _common import arguments, report
from _photographs import photograph_shards

from mm.data.index import ShardIndex
from mm.data.reader import Reader

_PARTS = ("image", "txt")


def main() -> None:
    args = arguments(__doc__.splitlines()[0], rounds=9)
    shards = photograph_shards()
    index = ShardIndex(list(map(str, shards)))
    reader = Reader(index, cache_bytes=0)
    spans = [
        [(index.shard_of(number), *index.span(number, part)) for part in _PARTS] for number in range(len(index))
    ]  # (shard, offset, size) of each member
    useful = sum(size for sample in spans for _, _, size in sample)

    def ours() -> int:
        return sum(sum(map(len, reader.parts(number, _PARTS).values())) for number in range(len(index)))

    def pread() -> int:
        files = [os.open(shard, os.O_RDONLY) for shard in shards]
        total = sum(len(os.pread(files[s], size, offset)) for sample in spans for s, offset, size in sample)
        for file in files:
            os.close(file)
        return total

    assert ours() == pread() == useful, "the reader gives other bytes than its index names"
    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: _rate(ours),
        "dd": lambda: _dd(shards),
        "pread": lambda: _rate(pread),
        "readinto": lambda: _rate(lambda: _readinto(shards)),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, measure in sides.items():
            rates[name].append(measure())
    rate = {name: median(values) for name, values in rates.items()}
    report(
        f"reading {len(index)} samples of {useful / len(index) / 1e3:.0f} kB from page cache, against dd",
        rates["ours"],
        rates["dd"],
        unit="GB/s",
        mark=0.9,
        better="higher",
        packages=("mm",),
        args=args,
        rates={name: round(value, 3) for name, value in rate.items()},
        microseconds_a_sample={name: round(useful / len(index) / 1e3 / value, 2) for name, value in rate.items()},
        of_pread=round(rate["ours"] / rate["pread"], 3),
    )


def _rate(read: Callable[[], int]) -> float:
    start = time.perf_counter()
    total = read()
    return total / (time.perf_counter() - start) / 1e9


def _dd(shards: list[Path]) -> float:
    """By dd's own clock, so that starting it costs nothing."""
    total = seconds = 0.0
    for shard in shards:
        command = ["dd", f"if={shard}", "of=/dev/null", "bs=1M"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
        match = re.search(r"(\d+) bytes .*copied, ([\d.e-]+) s", said.stderr)
        assert match is not None, f"dd said {said.stderr!r}"
        total, seconds = total + int(match[1]), seconds + float(match[2])
    return total / seconds / 1e9


def _readinto(shards: list[Path]) -> int:
    buffer, total = bytearray(1 << 20), 0
    for shard in shards:
        with shard.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


if __name__ == "__main__":
    main()
