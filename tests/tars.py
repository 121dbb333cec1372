"""Tars made block by block, so that a test may put anything into them."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

from PIL import Image

SAMPLES = 40
END = bytes(1024)
EIGHT_EIB = b"\x80\x7f" + b"\xff" * 10


def png(number: int = 1) -> bytes:
    """A picture that says which sample it is of, in red and green."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(stream, "PNG")
    return stream.getvalue()


def header(name: str | bytes, size: int = 0, kind: bytes = b"0", field: bytes | None = None) -> bytes:
    """One block with a right checksum, whatever else it says."""
    raw = name.encode() if isinstance(name, str) else name
    block = bytearray(raw.ljust(100, b"\0") + bytes(24) + (field or b"%011o\0" % size) + bytes(12 + 8) + kind)
    block += bytes(100) + b"ustar\00000" + bytes(247)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str | bytes, data: bytes, kind: bytes = b"0", field: bytes | None = None) -> bytes:
    return header(name, len(data), kind, field) + data + bytes(-len(data) % 512)


def sample(key: str, number: int = 1) -> bytes:
    return member(f"{key}.png", png(number)) + member(f"{key}.txt", f"text {number}".encode())


def pax(**records: str | bytes) -> bytes:
    """An extended header; the length of each record counts its own digits."""
    data = b""
    for key, value in records.items():
        rest = b" %s=%s\n" % (key.replace("_", ".").encode(), value.encode() if isinstance(value, str) else value)
        length = next(n for n in range(len(rest), len(rest) + 8) if len(str(n)) + len(rest) == n)
        data += str(length).encode() + rest
    return member("pax", data, b"x")


def long(name: bytes) -> bytes:
    return member("././@LongLink", name, b"L")


def members(first: int = 0, count: int = SAMPLES) -> list[tuple[str, bytes]]:
    """png, txt and json of some samples; every fifth has a name that needs headers of its own."""
    found = []
    for number in range(first, first + count):
        key = f"{number:05d}" if number % 5 else f"{'long/' * 30}{number:05d}"
        about = json.dumps({"number": number, "more": "x" * (number * 37 % 1200)}).encode()
        found += [(f"{key}.png", png(number)), (f"{key}.txt", f"text {number}".encode()), (f"{key}.json", about)]
    return found


def write(path: Path, contents: list[tuple[str, bytes]]) -> Path:
    """A tar as `tarfile` writes it, long names in turn as GNU and as pax write them."""
    with tarfile.open(path, "w") as tar:
        for (name, data), form in zip(contents, itertools.cycle([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])):
            tar.format = form
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
