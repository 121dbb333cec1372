"""One try at a remote store, which always ends: fsspec's calls with a time limit, HTTP streams, errors in words.

`mm/data/remote.py` makes several tries of one. HTTP is read by requests of our own, on fsspec's session: its
`cat_file` loads the whole object where the server does not know ranges, and forgets what arrived before a cut.
"""

from __future__ import annotations

import asyncio
import errno
import queue
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

_SLOWEST = 1024  # bytes a second, below which a connection is as good as none
_VERSIONS = ("etag", "blobid", "lastmodified", "updated", "mtime")  # what stores call it, best first
_WORDS = {"missing": "not found", "forbidden": "permission denied"}
_STATUS = {401: "forbidden", 403: "forbidden", 404: "missing", 410: "missing"}
_TRANSIENT = (408, 425, 429)  # and all of 5xx; other statuses are not tried again
_CUT = ("payload", "incompleteread", "disconnected", "connectionreset", "connectionclosed", "protocolerror")
_PERMANENT = (errno.EINVAL, errno.EPERM, errno.ENOSYS)  # what s3fs makes of requests that S3 will never accept
_BUGS = (ValueError, TypeError, AttributeError, LookupError, NotImplementedError, ImportError)


class Problem(Exception):
    """What a try met, in words. `kind`: "missing", "forbidden", "changed", "refused", or "failed": may work yet."""

    def __init__(self, what: str, kind: str = "failed") -> None:
        super().__init__(what)
        self.what, self.kind = what, kind


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def filesystem(url: str, stall: float) -> Any:
    """fsspec's filesystem of a URL, one an interpreter, without caches of listings or retries of its own."""
    import fsspec

    settings: dict[str, Any] = {"use_listings_cache": False}
    if is_http(url):
        import aiohttp

        # aiohttp would end every download after five minutes; proxies come from the usual environment variables
        settings["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None), "trust_env": True}
    elif url.startswith("s3://"):
        settings["config_kwargs"] = {
            "connect_timeout": stall,
            "read_timeout": stall,
            "retries": {"total_max_attempts": 1},
        }
    made = fsspec.filesystem(url.partition("://")[0], **settings)
    if url.startswith("s3://"):
        made.retries = 1
    return made


def call(made: Any, seconds: float, name: str, *args: Any, **kwargs: Any) -> Any:
    """`made.<name>(...)` of a filesystem. Raises TimeoutError after so many seconds."""
    if made.async_impl:
        return _wait(made, getattr(made, f"_{name}")(*args, **kwargs), seconds)
    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((getattr(made, name)(*args, **kwargs), None))
        except Exception as error:  # raised again where it was waited for
            answers.put((None, error))

    threading.Thread(target=run, name="mm-remote", daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


def _wait(made: Any, coroutine: Coroutine[Any, Any, Any], seconds: float) -> Any:
    future = asyncio.run_coroutine_threadsafe(coroutine, made.loop)
    try:
        return future.result(seconds)
    finally:
        future.cancel()  # of no effect on what is done; else it closes the connection


def facts(url: str, stall: float) -> tuple[int, str]:
    """Size and version of an object."""
    made = filesystem(url, stall)
    if is_http(url):
        return _wait(made, _head(made, url), stall)
    extra = {"refresh": True, "expand_info": True} if url.startswith("hf://") else {}  # else without a version
    info = call(made, stall, "info", made._strip_protocol(url), **extra)
    if info["type"] != "file":
        raise Problem("it is a folder", "missing")
    plain = {key.lower().replace("-", "").replace("_", ""): value for key, value in info.items()}
    return int(info["size"]), next((str(plain[key]) for key in _VERSIONS if plain.get(key)), "")


def pieces(url: str, start: int, known: tuple[int, str], chunk: int, stall: float) -> Iterator[bytes]:
    """The bytes from `start` to the end that `known` tells, in pieces of at most `chunk`; one try."""
    made = filesystem(url, stall)
    if is_http(url):
        yield from _stream(made, url, start, known, chunk, stall)
        return
    path = made._strip_protocol(url)
    extra = {} if made.async_impl else {"cache_type": "none"}  # or it reads ahead of the range
    while start < known[0]:
        end = min(start + chunk, known[0])
        data = call(made, stall, "cat_file", path, start=start, end=end, **extra)
        if len(data) > end - start:
            raise Problem(f"{len(data)} bytes came for a range of {end - start}", "refused")
        yield data
        start += len(data)
        if start < end:
            raise Problem("connection cut")


async def _head(made: Any, url: str) -> tuple[int, str]:
    session = await made.set_session()
    # some servers, and signed URLs, answer GET only
    for method, headers in (("HEAD", {}), ("GET", {"Range": "bytes=0-0"})):
        async with session.request(method, made.encode_url(url), **_request(made, headers)) as response:
            size = _total(response)
            if method == "HEAD" and (response.status in (400, 403, 405, 501) or size is None):
                continue
            if response.status != 416:
                _check_status(response)
            if size is None:
                raise Problem("the server does not say how large it is (no Content-Length)", "refused")
            etag, changed = _versions(response)
            return size, etag or changed
    raise AssertionError("the second request returns or raises")


def _stream(made: Any, url: str, start: int, known: tuple[int, str], chunk: int, stall: float) -> Iterator[bytes]:
    response = _wait(made, _open(made, url, start), stall)
    try:
        total, seen = _total(response), _versions(response)
        if response.status == 416 and total != known[0]:
            raise Problem(f"ends at byte {total}, not {known[0]}", "changed")
        _check_status(response)
        if total not in (known[0], None) or (seen[0] and known[1] and known[1] not in seen):
            raise Problem("changed while it was read", "changed")
        position = _first(response)
        if position not in (0, start):
            raise Problem(f"bytes from {position} on came for a range from {start} on", "refused")
        while position < known[0]:
            ahead = start - position if position < start else known[0] - position  # without ranges, what is known comes
            size = min(ahead, chunk)
            data, error = _wait(made, _fill(response, size, stall), 2 * stall + size / _SLOWEST)
            position += len(data)
            if data and position > start:
                yield data
            if error is not None:
                raise error
    finally:
        made.loop.call_soon_threadsafe(response.close)


async def _open(made: Any, url: str, start: int) -> Any:
    session = await made.set_session()
    headers = {"Range": f"bytes={start}-"} if start else {}
    return await session.get(made.encode_url(url), read_bufsize=1 << 20, **_request(made, headers))


async def _fill(response: Any, size: int, stall: float) -> tuple[bytes, Exception | None]:
    """Up to `size` bytes, and why there are not more: what came before a cut is kept."""
    content = response.content
    parts: list[bytes] = []
    have = in_time = 0
    try:
        async with asyncio.timeout(stall) as limit:
            while have < size:
                part = await content.read(size - have)
                if not part:
                    return b"".join(parts), Problem("connection cut")
                parts.append(part)
                have, in_time = have + len(part), in_time + len(part)
                if in_time >= _SLOWEST * stall:
                    in_time = 0
                    limit.reschedule(asyncio.get_running_loop().time() + stall)
    except TimeoutError:
        return b"".join(parts), Problem(f"stalled: {f'only {in_time} bytes' if in_time else 'no byte'} for {stall:g} s")
    except Exception as error:  # raised by the caller, after what it has got
        content.set_exception(None)  # or aiohttp does not give out what it has got
        parts.append(content.read_nowait(size - have))
        content.set_exception(error)
        have += len(parts[-1])
        return b"".join(parts), error if have < size else None
    return b"".join(parts), None


def _request(made: Any, headers: dict[str, str]) -> dict[str, Any]:
    own = dict(made.kwargs)
    return {
        **own,
        "headers": {**own.get("headers", {}), "Accept-Encoding": "identity", **headers},
        "allow_redirects": True,
    }


def _check_status(response: Any) -> None:
    if response.status not in (200, 206):
        raise _status(response.status, response.reason or "")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() not in ("identity", ""):
        raise Problem(f"sent with Content-Encoding {encoding!r}; store it as it is", "refused")


def _first(response: Any) -> int:
    """The first byte that a response holds."""
    if response.status != 206:
        return 0
    return int(response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0])


def _total(response: Any) -> int | None:
    """Bytes of the whole object, where a response says so."""
    if response.status in (206, 416):
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return int(total) if total.isdecimal() else None


def _versions(response: Any) -> tuple[str, str]:
    return response.headers.get("ETag", "").removeprefix("W/"), response.headers.get("Last-Modified", "")


def _status(status: int, reason: str) -> Problem:
    kind = _STATUS.get(status, "failed" if status >= 500 or status in _TRANSIENT else "refused")
    return Problem(f"{status} {_WORDS.get(kind, reason)}".strip(), kind)


def explain(error: Exception, stall: float) -> Problem:
    """What any exception of a filesystem means: its own, fsspec's, aiohttp's, botocore's."""
    if isinstance(error, Problem):
        return error
    name, text = type(error).__name__, " ".join(str(getattr(error, "message", error)).split())[:200]
    holders = (error, getattr(error, "response", None))
    found = (getattr(holder, key, None) for holder in holders for key in ("status", "status_code", "code"))
    status = next((value for value in found if isinstance(value, int)), None)
    if isinstance(error, TimeoutError) or "timeout" in name.lower():
        return Problem(f"stalled: no answer for {stall:g} s")
    if isinstance(error, FileNotFoundError):
        return Problem("404 not found", "missing")
    if isinstance(error, PermissionError) or text.startswith("Forbidden:"):  # gcsfs raises a plain OSError
        return Problem(f"permission denied ({text})", "forbidden")
    if "Credentials" in name:
        return Problem(f"permission denied ({text}; see AWS_ACCESS_KEY_ID, or FSSPEC_S3 for public data)", "forbidden")
    if status is not None:
        return _status(status, text)
    if any(word in name.lower() for word in _CUT):
        return Problem("connection cut")
    if isinstance(error, _BUGS) or (isinstance(error, OSError) and error.errno in _PERMANENT):
        return Problem(f"{name}: {text}", "refused")
    return Problem(text or name)
