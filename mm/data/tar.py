"""Tar headers, read without `tarfile`: microseconds a member, damage is reported, nothing is unpacked or unpickled."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Generator, Iterator
from typing import NamedTuple, Protocol

BLOCK = 512
_RECORD = 20 * BLOCK  # tar and tarfile pad to whole records; some writers stop at the two zero blocks
_ZERO = bytes(BLOCK)
_GZIP = b"\x1f\x8b"
_LARGEST_NAME = 1 << 20  # bytes of a long-name or pax header: more is damage, or an attack
_DIGITS = 20  # of a number in a pax header: 64 bits
_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "named pipe",
    b"S": "sparse file",
}
_EMPTY = (
    b"1",
    b"2",
    b"3",
    b"4",
    b"6",
)  # no bytes follow these, whatever their size says: GNU tar's rule, and tarfile's


class Member(NamedTuple):
    """One entry of a tar file: where its bytes lie, and why it must not be read ("" for a plain file)."""

    name: str
    offset: int
    size: int
    problem: str


def open_file(path: str) -> int:
    """A descriptor of a regular file. Raises OSError for anything else: a pipe would be waited for, for ever."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return fd


class Source(Protocol):
    """`end` bytes; `read` returns `size` of them at `offset`, fewer at the end."""

    end: int

    def read(self, offset: int, size: int) -> bytes: ...


class File:
    """A local file, read anywhere."""

    def __init__(self, fd: int) -> None:
        self._fd, self.end = fd, os.fstat(fd).st_size

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)


class Stream:
    """Consecutive pieces of `end` bytes in all, each hashed as it comes; read forwards, within what is still held."""

    def __init__(self, pieces: Iterator[bytes], end: int) -> None:
        self._pieces, self.end = pieces, end
        self._held, self._start = b"", 0
        self._sha256 = hashlib.sha256()

    def read(self, offset: int, size: int) -> bytes:
        assert offset >= self._start, "a stream is read forwards only"
        while offset + size > self._start + len(self._held) and (piece := next(self._pieces, b"")):
            self._sha256.update(piece)
            gone = min(offset - self._start, len(self._held))
            self._held, self._start = self._held[gone:] + piece, self._start + gone
        return self._held[offset - self._start : offset - self._start + size]

    def finish(self) -> tuple[int, str]:
        """Passes over the rest; bytes seen in all, and their SHA-256."""
        seen = self._start + len(self._held)
        for piece in self._pieces:
            self._sha256.update(piece)
            seen += len(piece)
        return seen, self._sha256.hexdigest()


class Scan:
    """Iterate for every member of a tar except folders, in order; then `damage` says what is wrong with the file or "".

    A file that is cut anywhere, at a member's end too, is told by its end: two zero blocks, and padding to whole
    records where there is more. What lies before the cut is yielded, and may be read from `source` until the next.
    `start`: where to begin, right behind a member.
    """

    def __init__(self, source: Source, start: int = 0) -> None:
        self.source, self.damage, self._start = source, "", start

    def __iter__(self) -> Iterator[Member]:
        self.damage = yield from _members(self.source, self._start)


def _members(source: Source, position: int = 0) -> Generator[Member, None, str]:
    long_name, end = b"", source.end
    pax: dict[bytes, bytes] = {}
    while True:
        header = source.read(position, BLOCK)
        if len(header) < BLOCK:
            return f"cut at byte {end}: no end-of-archive marker" if end else "empty file"
        if header == _ZERO:
            return _after_end(source, position)
        size = _size(header)
        if size is None:
            if position:
                return f"damaged header at byte {position}"
            return (
                "compressed: gunzip it, so that samples can be read in any order"
                if header[:2] == _GZIP
                else "no tar file"
            )
        kind, start = header[156:157], position + BLOCK
        raw = pax.get(b"path") or long_name or _name(header)
        folder = kind == b"5" or (kind == b"\0" and raw.endswith(b"/"))
        if kind == b"S":
            start = _after_sparse(source, header, start)
        if folder or kind in _EMPTY:
            size = 0
        elif kind in (b"0", b"\0", b"7"):  # of these only, a pax header may hold the true size
            size = _decimal(pax.get(b"size"), size)
        position = start + -(-size // BLOCK) * BLOCK
        if kind in (b"L", b"K", b"x", b"g", b"X"):
            if size > _LARGEST_NAME or start + size > end:
                return f"cut at byte {end}, inside a header" if start + size > end else f"header of {size} bytes"
            data = source.read(start, size)
            if kind == b"L":
                long_name = data.rstrip(b"\0")
            elif kind in (b"x", b"X"):
                pax = _records(data)
            continue
        sparse = any(key.startswith(b"GNU.sparse") for key in pax)
        long_name, pax = b"", {}
        if folder:
            continue
        name = raw.decode("utf-8", "backslashreplace")
        if start + size > end:
            return f"cut at byte {end}, inside {name}"
        yield Member(name, start, size, "sparse file" if sparse else _problem(raw, name, kind))


def _after_end(source: Source, position: int) -> str:
    """What is wrong with a file whose first zero block lies at `position`."""
    rest = source.read(position + BLOCK, 1 << 16)
    if rest.strip(b"\0"):
        return f"data after the end marker at byte {position}"
    if len(rest) < BLOCK:
        return f"cut at byte {source.end}, inside the end-of-archive marker"
    if source.end - position > _RECORD + BLOCK:
        return f"only zeros from byte {position} on, more than padding: what was there is lost"
    if len(rest) > BLOCK and source.end % _RECORD:
        return f"cut at byte {source.end}, inside the padding after the last member: no sample is lost"
    return ""


def _problem(raw: bytes, name: str, kind: bytes) -> str:
    if kind not in (b"0", b"\0", b"7"):
        return _KINDS.get(kind, f"unknown type {kind!r}")
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return "name leaves the archive"
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return "name is not UTF-8"
    return ""


def _size(header: bytes) -> int | None:
    """The size field, or None where the header's checksum or the field is wrong."""
    try:
        expected = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    counted = sum(header) - sum(header[148:156]) + 8 * 32  # its own field counts as spaces
    if expected != counted:
        high = sum(byte > 127 for byte in header[:148] + header[156:])
        if expected != counted - 256 * high:  # old writers summed signed bytes
            return None
    field = header[124:136]
    if field[0] == 0x80:  # base 256, for 8 GiB and more
        return int.from_bytes(field[1:], "big")
    try:
        size = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    return size if size >= 0 else None


def _decimal(value: bytes | None, otherwise: int) -> int:
    return int(value.lstrip(b"0")[:_DIGITS] or b"0") if value and value.isdigit() else otherwise


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU's own magic uses these bytes for something else
        prefix = header[345:500].split(b"\0", 1)[0]
        return prefix + b"/" + name if prefix else name
    return name


def _after_sparse(source: Source, header: bytes, start: int) -> int:
    """Where the data of an old GNU sparse member begins: further maps may follow the header."""
    more = header[482]
    while more:
        block = source.read(start, BLOCK)
        more, start = (block[504] if len(block) == BLOCK else 0), start + BLOCK
    return start


def _records(data: bytes) -> dict[bytes, bytes]:
    """A pax header's `LENGTH KEY=VALUE\\n` records."""
    records, position = {}, 0
    while position < len(data):
        length, _, _ = data[position : position + _DIGITS].partition(b" ")
        if not length.isdigit() or int(length) <= len(length):
            break
        key, _, value = data[position + len(length) + 1 : position + int(length) - 1].partition(b"=")
        records[key] = value
        position += int(length)
    return records
