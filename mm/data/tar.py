"""Tar headers, read without `tarfile`: microseconds a member, damage is reported, nothing is unpacked or unpickled."""

from __future__ import annotations

import os
from typing import NamedTuple

BLOCK = 512
_ZERO = bytes(BLOCK)
_GZIP = b"\x1f\x8b"
_LARGEST_NAME = 1 << 20  # bytes of a long-name or pax header: more is damage, or an attack
_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "named pipe",
    b"S": "sparse file",
}


class Member(NamedTuple):
    """One entry of a tar file: where its bytes lie, and why it must not be read ("" for a plain file)."""

    name: str
    offset: int
    size: int
    problem: str


def scan(path: str) -> tuple[list[Member], str]:
    """Every member of the tar at `path` except folders, in order, and what is wrong with the file as a whole or "".

    A file that is cut anywhere, at a member's end too, is told by its missing end marker; what lies before the cut
    is returned. Raises OSError where the file cannot be read at all.
    """
    members: list[Member] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        return members, _scan(fd, os.fstat(fd).st_size, members)
    finally:
        os.close(fd)


def _scan(fd: int, end: int, members: list[Member]) -> str:
    position, long_name = 0, b""
    pax: dict[bytes, bytes] = {}
    while True:
        header = os.pread(fd, BLOCK, position)
        if len(header) < BLOCK:
            return f"cut at byte {end}: no end-of-archive marker" if end else "empty file"
        if header == _ZERO:
            rest = os.pread(fd, 1 << 16, position + BLOCK)
            return f"data after the end marker at byte {position}" if rest.strip(b"\0") else ""
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
        if kind == b"S":
            start = _after_sparse(fd, header, start)
        if kind in (b"0", b"\0", b"7"):  # of these only, a pax header may hold the true size
            size = _decimal(pax.get(b"size"), size)
        position = start + -(-size // BLOCK) * BLOCK
        if kind in (b"L", b"K", b"x", b"g", b"X"):
            if size > _LARGEST_NAME or start + size > end:
                return f"header of {size} bytes at byte {start} is cut or too long"
            data = os.pread(fd, size, start)
            if kind == b"L":
                long_name = data.rstrip(b"\0")
            elif kind in (b"x", b"X"):
                pax = _records(data)
            continue
        raw = pax.get(b"path") or long_name or _name(header)
        sparse = any(key.startswith(b"GNU.sparse") for key in pax)
        long_name, pax = b"", {}
        if kind == b"5" or (kind == b"\0" and raw.endswith(b"/")):
            continue
        name = raw.decode("utf-8", "backslashreplace")
        if start + size > end:
            return f"cut at byte {end}, inside {name}"
        members.append(Member(name, start, size, "sparse file" if sparse else _problem(raw, name, kind)))


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
    counted = header[:148] + b" " * 8 + header[156:]
    if expected != sum(counted) and expected != sum(byte - 256 * (byte > 127) for byte in counted):
        return None  # old writers summed signed bytes
    field = header[124:136]
    if field[0] == 0x80:  # base 256, for 8 GiB and more
        return int.from_bytes(field[1:], "big")
    try:
        return max(int(field.strip(b" \0") or b"0", 8), 0)
    except ValueError:
        return None


def _decimal(value: bytes | None, otherwise: int) -> int:
    return int(value) if value and value.isdigit() else otherwise


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU's own magic uses these bytes for something else
        prefix = header[345:500].split(b"\0", 1)[0]
        return prefix + b"/" + name if prefix else name
    return name


def _after_sparse(fd: int, header: bytes, start: int) -> int:
    """Where the data of an old GNU sparse member begins: further maps may follow the header."""
    more = header[482]
    while more:
        block = os.pread(fd, BLOCK, start)
        more, start = (block[504] if len(block) == BLOCK else 0), start + BLOCK
    return start


def _records(data: bytes) -> dict[bytes, bytes]:
    """A pax header's `LENGTH KEY=VALUE\\n` records."""
    records, position = {}, 0
    while position < len(data):
        length, _, _ = data[position:].partition(b" ")
        if not length.isdigit() or int(length) <= len(length):
            break
        key, _, value = data[position + len(length) + 1 : position + int(length) - 1].partition(b"=")
        records[key] = value
        position += int(length)
    return records
