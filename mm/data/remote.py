"""Objects in remote stores, through fsspec: what is there, and their exact bytes in spite of what a network does.

Every wait has an end: a try that brings next to nothing for `Options.stall` seconds is given up. What was yielded is
not asked for again, save where an HTTP server knows no ranges. Local copies of whole shards are in
`mm/data/shard_cache.py`.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from mm.config import ConfigError
from mm.data import transport

PROTOCOLS = ("http", "https", "s3", "gs", "hf", "az")  # nothing else is ever opened
_BACKENDS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs"}
_LEAST = 64 << 10  # bytes: a smaller range is not asked for, and a smaller gain is no progress
_LONGEST_DELAY = 8.0  # seconds between two tries
_jitter = random.Random()  # its own: the run's generators are not touched
Found = TypeVar("Found")


class Facts(NamedTuple):
    """What tells that an object is still the same: size in bytes, and etag, else time of change, else ""."""

    size: int
    version: str


class Options(NamedTuple):
    """Tries in a row that bring nothing; seconds without progress; seconds before the second try; bytes of a piece.

    `patience`: seconds of waiting between tries that an outage is given at least, where they fail at once.
    """

    tries: int = 5
    stall: float = 60.0
    first_delay: float = 0.5
    chunk: int = 8 << 20
    patience: float = 0.0


DEFAULTS = Options()


class Unavailable(OSError):
    """An object that cannot be had: the message names the URL, what happened, and after how many tries.

    `kind`: "missing", "forbidden", "changed", "refused" (all of these were not tried again), or "failed".
    """

    def __init__(self, message: str, kind: str = "failed") -> None:
        super().__init__(message)
        self.kind = kind


def is_remote(path: str) -> bool:
    return "://" in path


def check(url: str) -> None:
    """Raises ConfigError where the protocol is not one of PROTOCOLS, or what reads it is not installed."""
    protocol, _, rest = url.partition("://")
    if protocol not in PROTOCOLS or not rest.strip("/") or "::" in rest or "://" in rest:
        allowed = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise ConfigError(f"shards {url!r}: not a URL that is read; name an object or a folder at {allowed}")
    for module in ("fsspec", _BACKENDS[protocol]):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"shards {url!r}: {protocol}:// needs {module}; pip install {module}")


def glob(url: str, options: Options = DEFAULTS) -> list[str]:
    """URLs of the objects that `url` names, sorted: itself (not looked up), a folder's *.tar, or a pattern's matches.

    Patterns of http(s) need a server that lists its folders as links; `?` begins a query there. [] where nothing
    matches; raises Unavailable where the store cannot be asked.
    """
    check(url)
    protocol = url.partition("://")[0]
    wild = "*[" if transport.is_http(url) else "*?["
    pattern = url + "*.tar" if url.endswith("/") else url
    if not any(sign in pattern for sign in wild):
        return [url]
    folder, _, name = pattern.rpartition("/")
    root = folder
    while any(sign in root for sign in wild):
        root = root.rpartition("/")[0]
    if not root.partition("://")[2]:
        raise ConfigError(f"shards {url!r}: wildcards in the host or bucket are not looked up; name it")
    store = transport.filesystem(url, options.stall)

    def look() -> list[dict[str, Any]]:
        # listed for its own sake, as fsspec's glob takes a folder that it may not list for an empty one
        listed = transport.call(store, options.stall, "ls", store._strip_protocol(root + "/"), detail=True)
        if root != folder:
            path = store._strip_protocol(pattern)
            return list(transport.call(store, options.stall, "glob", path, detail=True).values())
        inside = store._strip_protocol(folder)
        pairs = [(entry, *entry["name"].rpartition("/")[::2]) for entry in listed]
        return [entry for entry, parent, base in pairs if parent == inside and fnmatch.fnmatchcase(base, name)]

    try:
        found = _tries(url, options, look)
    except Unavailable as error:
        if error.kind == "missing":
            return []
        raise
    names = [entry["name"] for entry in found if entry["type"] == "file"]
    return sorted({name if is_remote(name) else f"{protocol}://{name}" for name in names})


def facts(url: str, options: Options = DEFAULTS) -> Facts:
    """Size and version of an object. Raises Unavailable."""
    check(url)
    return _tries(url, options, lambda: Facts(*transport.facts(url, options.stall)))


def chunks(url: str, start: int = 0, options: Options = DEFAULTS, known: Facts | None = None) -> Iterator[bytes]:
    """The object's bytes from `start` on, in order, in pieces of at most `options.chunk` bytes.

    Failures are tried again from the byte reached. Raises Unavailable; also where the object is not, or no longer, what
    `known` says (by default, what it was at the start): at the end at the latest, so that all is to be dropped then.
    """
    check(url)
    first = known or facts(url, options)
    if start > first.size:
        raise Unavailable(f"{url}: ends at byte {first.size}, before byte {start}", "changed")
    position, progress, failures = start, 0, 0
    while position < first.size:
        try:
            # after failures smaller ranges, for links on which a whole one does not come through in time
            chunk = min(options.chunk, max(options.chunk >> 2 * failures, _LEAST))
            for piece in transport.pieces(url, position, first, chunk, options.stall):
                position, progress = position + len(piece), progress + len(piece)
                if progress >= min(_LEAST, options.chunk):
                    progress = failures = 0
                yield piece
        except Exception as error:
            failures += 1
            problem = transport.explain(error, options.stall)
            where = f" at byte {position} of {first.size}"
            _again(url, problem, failures, options, error, where if problem.kind == "failed" else "")
    # each HTTP response was of this version; elsewhere only a second look can tell
    if not transport.is_http(url) and facts(url, options) != first:
        raise Unavailable(f"{url}: changed while it was read", "changed")


def read_small(url: str, options: Options = DEFAULTS, limit: int = 64 << 20) -> bytes | None:
    """All bytes of an object of at most `limit` bytes; None where there is none, or none that we may see.

    (S3 says "forbidden" of a missing object to those who may not list its folder.) Raises Unavailable.
    """
    try:
        known = facts(url, options)
    except Unavailable as error:
        if error.kind in ("missing", "forbidden"):
            return None
        raise
    if known.size > limit:
        raise Unavailable(f"{url}: of {known.size} bytes, over the limit of {limit}", "refused")
    return b"".join(chunks(url, 0, options, known))


def write_small(url: str, data: bytes, options: Options = DEFAULTS) -> bool:
    """Writes a whole object; False where the store takes none from us: http, permission denied, hf (a commit each).

    Raises Unavailable.
    """
    check(url)
    if transport.is_http(url) or url.startswith("hf://"):
        return False
    store = transport.filesystem(url, options.stall)
    seconds = options.stall + len(data) / _LEAST
    try:
        _tries(url, options, lambda: transport.call(store, seconds, "pipe_file", store._strip_protocol(url), data))
    except Unavailable as error:
        if error.kind == "forbidden":
            return False
        raise
    return True


def _tries(url: str, options: Options, action: Callable[[], Found]) -> Found:
    failures = 0
    while True:
        try:
            return action()
        except Exception as error:
            failures += 1
            _again(url, transport.explain(error, options.stall), failures, options, error)


def _again(
    url: str, problem: transport.Problem, failures: int, options: Options, error: Exception, where: str = ""
) -> None:
    """Returns when it is time for another try. Raises Unavailable where there is none."""
    delays = [min(options.first_delay * 2**number, _LONGEST_DELAY) for number in range(failures)]
    patient = sum(delays[:-1]) < options.patience and not problem.what.startswith("stalled")  # that took its own time
    if problem.kind != "failed" or (failures >= options.tries and not patient):
        count = f" ({failures} tries)" if failures > 1 else ""
        raise Unavailable(f"{url}: {problem.what}{where}{count}", problem.kind) from error
    time.sleep(delays[-1] * _jitter.uniform(0.5, 1.0))  # so that many workers do not come back at once
