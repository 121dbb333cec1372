"""Which shards a string names: local paths, and URLs of the stores that `mm.data.remote` allows."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mm.config import ConfigError
from mm.data.remote import check, is_remote
from mm.data.remote import glob as matches_there

SUFFIX = ".mmindex"  # of a shard's sidecar
SPLITS = ("train", "dev", "val")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MOST_SHARDS = 1_000_000


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
        if not part or part.startswith("pipe:"):
            raise ConfigError(f"shards {spec!r}: {part!r} is not a path or URL of .tar files (and nothing is run)")
        far = is_remote(part)
        if far:
            check(part)
        part = part if far else os.path.expanduser(part)
        braces = [part] if not far and os.path.exists(part) else _braces(part)
        alternatives = list(itertools.islice(braces, _MOST_SHARDS + 1))
        if len(alternatives) > _MOST_SHARDS:
            raise ConfigError(
                f"shards {spec!r}: {part!r} names more than {_MOST_SHARDS} shards; join narrower ones by ::"
            )
        missing = []
        for name in alternatives:
            matches = matches_there(name) if far else _matches(name)
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
    files = [path if is_remote(path) else os.path.abspath(path) for path in found]
    if len(set(files)) < len(files):
        counts = Counter(files)
        twice = next(path for path, file in zip(found, files, strict=True) if counts[file] > 1)
        raise ConfigError(f"shards {spec!r}: names {twice!r} more than once; remove the overlap")
    return found


def _matches(name: str) -> list[str]:
    """Local files; of a folder or pattern also shards that are gone and whose index is still there, to be missed."""
    if os.path.isfile(name):
        return [name]
    folder = os.path.isdir(name)
    pattern = os.path.join(glob.escape(name), "*.tar") if folder else name
    found = {path for path in glob.glob(pattern, recursive=True) if folder or os.path.isfile(path)}
    indexed = {path.removesuffix(SUFFIX) for path in glob.glob(pattern + SUFFIX, recursive=True)}
    return sorted(found | {path for path in indexed if not os.path.exists(path)})


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
    if is_remote(name):
        return "nothing there has this name"
    folder = Path(name)
    while not os.path.isdir(folder):  # False, and no error, for a name that is too long
        if folder == folder.parent:
            break
        folder = folder.parent
    names = sorted(entry.name for entry in itertools.islice(os.scandir(folder), 10_000))
    if not names:
        return f"the folder {str(folder)!r} is empty"
    return f"the folder {str(folder)!r} holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
