"""Which shards a string names, and where every sample lies in them."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mm.config import ConfigError
from mm.data.tar import Member, scan

IMAGES = ("jpg", "jpeg", "png", "webp")
ALLOWED = (*IMAGES, "txt", "json")  # nothing else in a shard is ever read
SPLITS = ("train", "dev", "val")
LARGEST_TEXT = 1 << 20  # bytes of a caption or of metadata
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's rule: the key ends at the first dot of the file name
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 1_000_000


class Entry(NamedTuple):
    """One line of the ledger: a sample, or with an empty key a whole shard or member, that could not be used."""

    shard: str
    key: str
    reason: str


def expand(spec: str, *, mixed: bool = False) -> list[str]:
    """The shard files that `spec` names: a folder, a file, a brace or glob pattern, or several joined by `::`.

    One folder or wildcard never reaches across splits (train-, dev-, val-) unless `mixed`: held-out data must be named.
    Raises ConfigError with the spec and what was seen where a part matches nothing, or a shard is named twice.
    """
    if not spec.strip():
        raise ConfigError(
            "shards: nothing is named; give a folder, a pattern such as 'OUT/train-*.tar', or some joined by ::"
        )
    found: list[str] = []
    for part in (part.strip() for part in spec.split("::")):
        if not part or part.startswith("pipe:") or "://" in part:
            raise ConfigError(f"shards {spec!r}: {part!r} is not a path; name local .tar files (no pipe: or URL)")
        part = os.path.expanduser(part)
        alternatives = [part] if os.path.exists(part) else list(_braces(part))
        missing = []
        for name in alternatives:
            matches = _matches(name)
            if not matches:
                missing.append(name)
            splits = {base.split("-")[0] for base in map(os.path.basename, matches)} & set(SPLITS)
            if len(splits) > 1 and not mixed:
                folder = name if os.path.isdir(name) else os.path.dirname(name)
                there = [split for split in SPLITS if split in splits]
                raise ConfigError(
                    f"shards {spec!r}: matches {', '.join(there)} shards at once; "
                    f"name one split, such as {os.path.join(folder, there[0] + '-*.tar')!r}"
                )
            found += matches
        if missing:
            some = f" (and {len(missing) - 1} more of {len(alternatives)})" if len(missing) > 1 else ""
            raise ConfigError(f"shards {spec!r}: no shard at {missing[0]!r}{some}; {_seen(missing[0])}")
    files = [os.path.abspath(path) for path in found]
    if len(set(files)) < len(files):
        twice = next(path for path, file in zip(found, files, strict=True) if files.count(file) > 1)
        raise ConfigError(f"shards {spec!r}: names {twice!r} more than once; remove the overlap")
    return found


def _matches(name: str) -> list[str]:
    if os.path.isdir(name):
        return sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
    if os.path.isfile(name):
        return [name]
    return sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))


def _braces(pattern: str) -> Iterator[str]:
    """`a-{000..002}` and `{a,b}`, innermost first, with the zeros of the first bound."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    inside, bounds = match[1], _RANGE.fullmatch(match[1])
    words: list[str] = inside.split(",")
    if bounds is not None:
        first, last = int(bounds[1]), int(bounds[2])
        if not 0 <= last - first < _MOST_SHARDS:
            raise ConfigError(
                f"shards {pattern!r}: range {inside!r} must run upwards over at most {_MOST_SHARDS} numbers"
            )
        words = [str(number).zfill(len(bounds[1])) for number in range(first, last + 1)]
    for word in words:
        yield from _braces(pattern[: match.start()] + word + pattern[match.end() :])


def _seen(name: str) -> str:
    folder = Path(name)
    while not folder.is_dir():
        if folder == folder.parent:
            break
        folder = folder.parent
    names = sorted(entry.name for entry in itertools.islice(os.scandir(folder), 10_000))
    if not names:
        return f"the folder {str(folder)!r} is empty"
    return f"the folder {str(folder)!r} holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


class ShardIndex:
    """Every usable sample of some shards: its key, and where its image, caption and metadata lie.

    `shards` paths; `sizes` usable samples in each; `keys` [N]; `shard_of` [N] int32; `spans` [N, 3, 2] int64, offset
    and size in bytes of image, caption, metadata (size -1: none). `ledger` says what was left out and why, `rejected`
    of `seen` samples. Raises ConfigError naming the member extensions that were seen where no sample is usable.
    """

    def __init__(self, shards: Sequence[str], *, spec: str = "") -> None:
        self.shards = list(shards)
        self.sizes: list[int] = []
        self.keys: list[str] = []
        self.ledger: list[Entry] = []
        self.seen = self.rejected = 0
        spans: list[tuple[tuple[int, int], ...]] = []
        extensions: set[str] = set()
        for shard in self.shards:
            before = len(self.keys)
            try:
                members, damage = scan(shard)
            except OSError as error:
                members, damage = [], f"cannot be read: {error.strerror or error}"
            samples = self._group(shard, members, extensions)
            for key, parts in samples.items():
                reason = _lacks(parts)
                if reason:
                    self.ledger.append(Entry(shard, key, reason))
                    self.rejected += 1
                    continue
                image = next(parts[extension] for extension in IMAGES if extension in parts)
                self.keys.append(key)
                spans.append((image, parts["txt"], parts.get("json", (0, -1))))
            if damage:
                self.ledger.append(Entry(shard, "", damage))
            self.seen += len(samples)
            self.sizes.append(len(self.keys) - before)
        self.shard_of = np.repeat(np.arange(len(self.shards), dtype=np.int32), self.sizes)
        self.spans = np.array(spans, dtype=np.int64).reshape(-1, 3, 2)
        if not self.keys:
            raise ConfigError(self._nothing(spec or "::".join(self.shards[:3]), extensions))

    def __len__(self) -> int:
        return len(self.keys)

    def _group(self, shard: str, members: list[Member], extensions: set[str]) -> dict[str, dict[str, tuple[int, int]]]:
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        for name, offset, size, problem in members:
            match = _KEY.match(name)
            if problem:
                self.ledger.append(Entry(shard, "", f"member {name} refused: {problem}"))
                continue
            if match is None:  # a hidden file, or no extension: not part of a sample
                continue
            key, extension = match[1], match[2].lower()
            extensions.add(extension)
            parts = samples.setdefault(key, {})
            if extension in parts:
                self.ledger.append(Entry(shard, key, f"second member {name} ignored"))
            elif extension in ALLOWED:
                parts[extension] = (offset, size)
        return samples

    def _nothing(self, spec: str, extensions: set[str]) -> str:
        if not self.seen:
            first = f"; {self.ledger[0].shard!r}: {self.ledger[0].reason}" if self.ledger else ""
            return f"shards {spec!r}: no sample in {len(self.shards)} shard(s){first}"
        seen = ", ".join(sorted(extensions)[:12])
        return (
            f"shards {spec!r}: none of {self.seen} samples has an image ({', '.join(IMAGES)}) and a caption (txt); "
            f"member extensions seen: {seen}"
        )


def _lacks(parts: dict[str, tuple[int, int]]) -> str:
    """Why a sample with these members is not usable, or ""."""
    images = [parts[extension] for extension in IMAGES if extension in parts]
    if not images:
        return "no image"
    if "txt" not in parts:
        return "no caption"
    if not images[0][1]:
        return "empty image"
    if not 0 < parts["txt"][1] <= LARGEST_TEXT:
        return f"caption of {parts['txt'][1]} bytes"
    return ""
