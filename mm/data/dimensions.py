"""Width and height of a picture from its first bytes, fast enough to run for every sample while a shard is indexed."""

from __future__ import annotations

import re
from struct import Struct
from typing import Literal, NamedTuple

_FRAME = Struct(">BHHB")  # bits, height, width, colours: behind a frame header's marker and length
_PNG_SIZE = Struct(">II")
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; the three others are not frames
_BARE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
_TIFF: dict[bytes, Literal["big", "little"]] = {b"MM\0*": "big", b"II*\0": "little"}
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


class Jpeg(NamedTuple):
    """What a JPEG's header says: size as stored, EXIF orientation (1 where it has none), and of which sort it is."""

    width: int
    height: int
    orientation: int
    plain: bool  # 8 bits of grey or of three colours, baseline or progressive, Huffman-coded


def dimensions(head: bytes) -> tuple[int, int] | None:
    """Upright (width, height) of the JPEG, PNG or WebP that starts with `head`: sides swapped where EXIF turns it.

    None where `head` is none of these, or too short to tell. 64 KiB are enough for nearly every JPEG, 33 bytes for a
    PNG without EXIF; a WebP with EXIF must be whole, since EXIF follows the pixels there. Never raises.
    """
    if head[:2] == b"\xff\xd8":
        found = jpeg(head)
        width, height, orientation = (found.width, found.height, found.orientation) if found else (0, 0, 1)
    elif head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR" and len(head) >= 24:
        width, height = _PNG_SIZE.unpack_from(head, 16)
        orientation = _orientation(_chunk(head, 8, b"eXIf", "big") or b"") or 1
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) >= 30:
        width, height, turned = _webp(head)
        exif = _chunk(head, 12, b"EXIF", "little") if turned else b""
        orientation = 0 if exif is None else _orientation(exif.removeprefix(b"Exif\0\0")) or 1
    else:
        return None
    if not width or not height or (not orientation and width != height):
        return None
    return (height, width) if orientation >= 5 else (width, height)


def jpeg(head: bytes) -> Jpeg | None:
    """The frame header of a JPEG, found by walking its segments, so that no thumbnail is taken for the picture."""
    at, end, orientation, xmp = 2, len(head), 0, 0
    while at + 10 <= end:
        if head[at] != 0xFF:
            return None
        marker = head[at + 1]
        if marker == 0xFF or marker in _BARE:  # fill byte, or a marker alone
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _FRAMES:
            bits, height, width, colours = _FRAME.unpack_from(head, at + 4)
            return Jpeg(width, height, orientation or xmp or 1, marker < 0xC3 and bits == 8 and colours in (1, 3))
        size = head[at + 2] << 8 | head[at + 3]
        if size < 2 or marker < 0xC0 or marker in (0xD9, 0xDA):  # damage, or no frame before the end or the pixels
            return None
        if marker == 0xE1 and head[at + 4 : at + 10] == b"Exif\0\0":
            orientation = orientation or _orientation(head[at + 10 : at + 2 + size])
        elif marker == 0xE1 and head.startswith(_XMP, at + 4):  # Pillow asks it too, where EXIF says nothing
            said = _XMP_ORIENTATION.search(head, at + 4, at + 2 + size)
            xmp = int(said[1]) if said else 0
        at += 2 + size
    return None


def _webp(head: bytes) -> tuple[int, int, bool]:
    """Width, height, and whether EXIF follows; 0 where the header is damaged."""
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        return (head[26] | head[27] << 8) & 0x3FFF, (head[28] | head[29] << 8) & 0x3FFF, False
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, False
    if kind == b"VP8X":
        width, height = int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
        return width, height, bool(head[20] & 8)
    return 0, 0, False


def _chunk(head: bytes, at: int, name: bytes, order: Literal["big", "little"]) -> bytes | None:
    """Data of chunk `name` of a PNG (big) or WebP (little); None where `head` lacks it or has pixels before it."""
    while at + 8 <= len(head):
        first, second = head[at : at + 4], head[at + 4 : at + 8]
        kind, size = (second, first) if order == "big" else (first, second)
        end = at + 8 + int.from_bytes(size, order)
        if kind == name:
            return head[at + 8 : end] if end <= len(head) else None
        if kind == b"IDAT":
            return None
        at = end + 4 if order == "big" else end + (end & 1)  # a checksum follows, or a byte of padding
    return None


def _orientation(tiff: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 where it is anything else or EXIF is damaged, 0 where EXIF does not say."""
    order = _TIFF.get(tiff[:4])
    if order is None:
        return 1
    at = int.from_bytes(tiff[4:8], order)
    tag, short = (0x0112).to_bytes(2, order), (3).to_bytes(2, order)
    for entry in range(at + 2, at + 2 + 12 * int.from_bytes(tiff[at : at + 2], order), 12):
        if tiff[entry : entry + 2] == tag:
            value = int.from_bytes(tiff[entry + 8 : entry + 10], order)
            return value if tiff[entry + 2 : entry + 4] == short and 1 <= value <= 8 else 1
        if entry > len(tiff):
            break
    return 0
