"""What is in some shards: counts, sizes, captions, aspect ratios, duplicates, and what img2dataset says of them."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mm.data import img2dataset
from mm.data.buckets import aspect_codes
from mm.data.captions import per_source
from mm.data.index import ShardIndex
from mm.data.reader import Reader
from mm.data.shards import expand
from mm.data.table import LOOKS

ASPECTS = ((1, 2), (9, 16), (2, 3), (3, 4), (4, 5), (1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1))  # width, height
SMALL = 224  # pixels on the short side
_MOST_CAPTIONS = 200_000
_MOST_REASONS = 10
_BINS = 40
_GROUPS, _OF_GROUP = 5, 4  # groups of duplicates, and samples of each, that are named
OTHER = "other reasons"
_NAMES = re.compile(r"(?<=^member ).*(?= refused:)|(?<=^second member ).*(?= ignored$)|(?<=, inside )(?!a |the ).*")
_NUMBERS = re.compile(r"(?<![\w-])(?:[1-9]\d*|\d\d+)")  # a lone 0 stays: an empty caption is not one that is too long


def stats(spec: str, caption: str = "txt", progress: bool = True) -> dict[str, Any]:
    """Figures on all samples that `spec` names, over several splits too: numbers, text, lists and dicts of them.

    Sizes are in bytes and pixels, shares of 1, `pN` percentiles. `samples` and `rejected` count all that is there,
    everything else usable samples; captions are read of at most 200,000, evenly spaced. Aspect ratios count to the
    nearest of `ASPECTS`. Widths, heights and the quick search for duplicates come from the shards' indexes: without one
    sizes are unknown, and images of equal size are read. Raises ConfigError where nothing can be used.
    """
    shards = expand(spec, mixed=True)
    parts = spec.split("::") if "::" in caption else [spec]
    counts = [len(expand(part, mixed=True)) for part in parts] if len(parts) > 1 else [len(shards)]
    places = [p for p, n in zip(per_source(caption, len(parts)), counts, strict=True) for _ in range(n)]
    index = ShardIndex(shards, spec=spec, parts=[place.parts for place in places])
    reader = Reader(index, places, images=False, cache_bytes=0)
    about = index.table.shards
    sizes = _column(index, "image.size")
    captions, words = _captions(reader, caption, progress)
    shard_bytes = np.array([shard.bytes for shard in about], np.int64)
    return {
        "spec": spec,
        "shards": len(shards),
        "samples": index.seen,
        "usable": len(index),
        "rejected": index.rejected,
        "bytes": {"total": int(shard_bytes.sum()), "per_shard": _range(shard_bytes)},
        "samples_per_shard": _range(index.sizes),
        "extensions": dict(Counter(word for shard in about for word in shard.extensions).most_common()),
        "image_bytes": _spread(sizes),
        "pictures": _pictures(_column(index, "width"), _column(index, "height")),
        "captions": captions,
        "duplicates": _duplicates(reader, sizes, progress),
        "ledger": _top(Counter(_alike(entry.reason) for entry in index.ledger)),
        "img2dataset": _said(index, progress),
        "histograms": {
            "image_bytes": _histogram(
                sizes, np.geomspace(low := sizes.min(), max(sizes.max() + 1, 3 * low), _BINS + 1)
            ),
            "caption_words": _histogram(words, _whole(0, captions["words"].get("p99", 0))),
            "samples_per_shard": _histogram(index.sizes, _whole(index.sizes.min(), index.sizes.max())),
        },
    }


def _column(index: ShardIndex, name: str) -> NDArray[np.int64]:
    """A column of the index for its usable samples; zeros where no shard has it."""
    column = index.table.look(name) if name in LOOKS else index.table.columns.get(name)
    rows = index.rows(np.arange(len(index)))
    return np.zeros(len(rows), np.int64) if column is None else column[rows].astype(np.int64)


def _range(values: NDArray[np.int64]) -> dict[str, int]:
    low, median, high = np.percentile(values, (0, 50, 100), method="inverted_cdf")
    return {"min": int(low), "median": int(median), "max": int(high)}


def _spread(values: NDArray[Any]) -> dict[str, float]:
    """Percentiles, each a value that occurs, and the mean; {} of nothing."""
    if not len(values):
        return {}
    marks = (1, 25, 50, 75, 99)
    found = np.percentile(values, marks, method="inverted_cdf")
    return {f"p{mark}": int(value) for mark, value in zip(marks, found, strict=True)} | {
        "mean": round(float(values.mean()), 2)
    }


def _whole(low: float, high: float) -> NDArray[np.int64]:
    """Edges of equal bins that hold whole numbers from low to high."""
    width = max(1, -(-int(high - low + 1) // _BINS))
    return np.arange(int(low), int(high) + width + 1, width)


def _histogram(values: NDArray[Any], edges: NDArray[Any]) -> dict[str, Any]:
    """`counts` between `edges`; of what the last bin counts, `above` lie beyond its edge."""
    inside = np.clip(values, None, np.nextafter(edges[-1], 0))
    counts, _ = np.histogram(inside, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist(), "above": int((values >= edges[-1]).sum())}


def _top(counts: Counter[str]) -> dict[str, int]:
    found = dict(counts.most_common(_MOST_REASONS))
    rest = counts.total() - sum(found.values())
    return found | ({OTHER: rest} if rest else {})


def _alike(reason: str) -> str:
    """A reason without the numbers and names that make each of its kind another."""
    return _NUMBERS.sub("N", _NAMES.sub("…", reason))


def _pictures(widths: NDArray[np.int64], heights: NDArray[np.int64]) -> dict[str, Any]:
    known = (widths > 0) & (heights > 0)
    widths, heights = widths[known], heights[known]
    names = [f"{width}:{height}" for width, height in ASPECTS]
    small = int((np.minimum(widths, heights) < SMALL).sum())
    return {
        "known": len(widths),
        "unknown": len(known) - len(widths),
        "width": _spread(widths),
        "height": _spread(heights),
        "aspect": dict(
            zip(names, np.bincount(aspect_codes(widths, heights, ASPECTS), minlength=len(names)).tolist(), strict=True)
        ),
        "small": small,
        "small_share": small / max(len(widths), 1),
    }


def _passing(reader: Reader, numbers: NDArray[np.int64], what: str, progress: bool) -> Iterator[int]:
    """The numbers, under a progress bar; remote shards that come next are fetched meanwhile."""
    starts = np.unique(reader.index.shards_of(numbers), return_index=True)[1]
    with tqdm(total=len(numbers), desc=what, unit="sample", disable=None if progress else True, leave=False) as bar:
        for place, some in enumerate(np.split(numbers, starts[1:])):
            reader.ahead(numbers[starts[place : place + 4]])
            for number in some.tolist():
                yield number
                bar.update()


def _captions(reader: Reader, caption: str, progress: bool) -> tuple[dict[str, Any], NDArray[np.int32]]:
    """Figures on the captions, and how many words each has."""
    total = len(reader.index)
    count = min(total, _MOST_CAPTIONS)
    characters, words, prints = np.zeros(count, np.int32), np.zeros(count, np.int32), np.zeros(count, np.int64)
    good, problems = 0, Counter[str]()
    for number in _passing(reader, np.arange(count) * total // count, "reading captions", progress):
        try:
            text = reader.texts(number)[0][0][0]
        except ValueError as error:
            problems[_alike(str(error))] += 1
            continue
        characters[good], words[good], prints[good] = len(text), len(text.split()), hash(text)
        good += 1
    same = int(_repeated(prints[:good]).sum())
    empty = problems.pop("caption is empty", 0)
    found = {
        "place": caption,
        "read": count,
        "of": total,
        "characters": _spread(characters[:good]),
        "words": _spread(words[:good]),
        "empty": empty,
        "unreadable": problems.total(),
        "problems": _top(problems),
        "identical": same,
        "identical_share": same / max(good, 1),
    }
    return found, words[:good]


def _repeated(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values occur more than once, [n]."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[places] > 1


def _duplicates(reader: Reader, sizes: NDArray[np.int64], progress: bool) -> dict[str, Any]:
    """Samples whose images are the same bytes: candidates by size and CRC-32, told by SHA-256."""
    index, unread = reader.index, 0
    crc = _column(index, "crc")
    unknown = np.flatnonzero(_repeated(sizes) & (crc == 0))
    for number in _passing(reader, unknown, "reading images", progress):
        try:
            crc[number] = zlib.crc32(reader.bytes(number, "image"))
        except ValueError:
            crc[number], unread = -1 - number, unread + 1  # like no other
    numbers = np.flatnonzero(_repeated(sizes << 32 ^ crc))
    good = np.ones(len(numbers), np.bool_)
    digests = np.zeros((len(numbers), 4), np.uint64)
    for place, number in enumerate(_passing(reader, numbers, "comparing images", progress)):
        try:
            digests[place] = np.frombuffer(hashlib.sha256(reader.bytes(number, "image")).digest(), np.uint64)
        except ValueError:
            good[place], unread = False, unread + 1
    numbers = numbers[good]
    _, firsts, groups, counts = np.unique(
        digests[good], axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    several = np.flatnonzero(counts > 1)
    return {
        "groups": len(several),
        "surplus": int((counts[several] - 1).sum()),
        "unread": unread,
        "first": [
            {
                "copies": int(counts[group]),
                "samples": [
                    [index.shards[index.shard_of(number)], index.key(number)]
                    for number in numbers[groups.reshape(-1) == group][:_OF_GROUP].tolist()
                ],
            }
            for group in several[np.argsort(firsts[several])][:_GROUPS]
        ],
    }


def _said(index: ShardIndex, progress: bool) -> dict[str, Any] | None:
    found = img2dataset.summed(index, progress)
    return found and {**found, "reasons": _top(Counter(found["reasons"]))}
