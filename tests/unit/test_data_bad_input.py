"""Hostile and broken members of shards: each is named in the ledger or in one clear error, and nothing hangs."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import re
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm.adapters.image import ImageProcessor
from mm.config import ConfigError
from mm.data import indexing
from mm.data.index import ShardIndex
from mm.data.loader import Loader
from mm.data.reader import Reader
from mm.data.shards import expand
from tars import EIGHT_EIB, END, header, long, member, pax, png, sample

pytestmark = pytest.mark.timeout(20)


def reasons(index: ShardIndex) -> str:
    return "\n".join(f"{entry.key}: {entry.reason}" for entry in index.ledger)


PASSED_OVER = {
    "symbolic link": (header("x.png", 0, b"2"), "x.png refused: symbolic link"),
    "link with a size but no data": (header("x.png", 700, b"2"), "x.png refused: symbolic link"),
    "hard link": (header("x.txt", 700, b"1"), "x.txt refused: hard link"),
    "character device": (header("x.png", 0, b"3"), "character device"),
    "block device": (header("x.png", 0, b"4"), "block device"),
    "named pipe": (header("x.png", 0, b"6"), "named pipe"),
    "old GNU sparse file": (member("x.png", png(), b"S"), "sparse file"),
    "new GNU sparse file": (pax(GNU_sparse_major="1", GNU_sparse_minor="0") + member("x.png", png()), "sparse file"),
    "unknown type": (member("x.png", png(), b"Q"), "unknown type b'Q'"),
    "folder of 8 EiB": (header("folder/", 0, b"5", EIGHT_EIB) + member("x.png", png()), "x: no caption"),
    "old folder of 8 EiB": (header("folder/", 0, b"\0", EIGHT_EIB) + member("x.png", png()), "x: no caption"),
    "way out": (member("a/../../x.png", png()), "name leaves the archive"),
    "absolute name": (member("/etc/x.png", png()), "name leaves the archive"),
    "NUL in a name": (long(b"a\0b.png\0") + member("x.png", png()), "name leaves the archive"),
    "name that is not UTF-8": (member(b"\xff\xfe.png", png()), r"\xff\xfe.png refused: name is not UTF-8"),
    "wrong surrogates in a name": (pax(path=b"\xed\xa0\x80.png") + member("x.png", png()), "name is not UTF-8"),
    "duplicate key": (sample("s0", 9), "second member s0.png ignored"),
    "no caption": (member("x.png", png()), "x: no caption"),
    "no image": (member("x.txt", b"text"), "x: no image"),
    "empty image": (member("x.png", b"") + member("x.txt", b"text"), "x: empty image"),
    "huge caption": (member("x.png", png()) + member("x.txt", b"a" * 2_000_000), "x: caption of 2000000 bytes"),
    "number of 5000 digits that nothing needs": (pax(mtime="1" * 5000) + member("x.png", png()), "x: no caption"),
    "record of 10^5000 bytes": (member("pax", b"9" * 5000 + b" a=b\n", b"x") + member("x.png", png()), "x: no caption"),
    "a million empty records": (member("pax", b"5 a=\n" * 200_000, b"x") + member("x.png", png()), "x: no caption"),
}


@pytest.mark.parametrize(("hostile", "reason"), PASSED_OVER.values(), ids=PASSED_OVER.keys())
def test_a_bad_member_is_named_and_its_neighbours_are_served(tmp_path: Path, hostile: bytes, reason: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(sample("s0", 1) + hostile + sample("s1", 2) + END)
    index = ShardIndex([str(path)])
    assert list(index.keys) == ["s0", "s1"] and reason in reasons(index)
    assert [Reader(index).read(number).texts[0][0] for number in (0, 1)] == [["text 1"], ["text 2"]]
    assert (index.seen, index.rejected) == ((2, 0) if "second member" in reason else (3, 1))
    indexing.index(str(path), workers=1)
    assert ShardIndex([str(path)]).ledger == index.ledger  # the sidecar remembers


ENDS = {
    "member of 8 EiB": (header("x.png", field=EIGHT_EIB), "cut at byte .*, inside x.png"),
    "negative octal size": (header("x.png", field=b"-0000000777\0"), "damaged header at byte 2048"),
    "negative size of base 256": (header("x.png", field=b"\xff" * 12), "damaged header at byte 2048"),
    "size that is no number": (header("x.png", field=b"not a number"), "damaged header at byte 2048"),
    "pax header that makes a member longer": (pax(size="99999999") + member("x.png", png()), "inside x.png"),
    "pax header that makes a member shorter": (pax(size="9") + member("x.png", bytes([7]) * 999), "damaged header"),
    "pax header with a size of 5000 digits": (pax(size="9" * 5000) + member("x.png", png()), "inside x.png"),
    "name of 2 MiB": (long(b"n" * (2 << 20)) + member("x.png", png()), "header of 2097152 bytes"),
    "sparse map that goes on in what follows": (
        header("x.png", 0, b"S")[:482] + b"\1" + bytes(29),
        "damaged header at byte 2048",
    ),
    "zeros inside": (bytes(1024), "data after the end marker at byte 2048"),
}


@pytest.mark.parametrize(("hostile", "reason"), ENDS.values(), ids=ENDS.keys())
def test_what_cannot_be_read_past_is_named_and_what_lies_before_is_served(
    tmp_path: Path, hostile: bytes, reason: str
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(sample("s0") + hostile + sample("s1") + END)
    index = ShardIndex([str(path)])
    assert index.key(0) == "s0" and Reader(index).read(0).texts[0][0] == ["text 1"]
    assert re.search(reason, reasons(index))


NO_SHARD = {
    "zero bytes": (b"", "empty file"),
    "empty tar": (bytes(10240), "holds no sample"),
    "text": (b"<html>not found</html>" * 100, "no tar file"),
    "gzip": (gzip.compress(random.Random(0).randbytes(999)), "compressed: gunzip it"),
    "zeros": (bytes(1 << 20), "only zeros from byte 0 on"),
    "one byte": (b"s", "cut at byte 1"),
    "a tar of something else": (member("README.md", b"hello") + bytes(1024), "README: no image"),
}


@pytest.mark.parametrize(("content", "reason"), NO_SHARD.values(), ids=NO_SHARD.keys())
def test_a_shard_without_samples_is_named_beside_others_and_refused_alone(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.tar") as caught:
        ShardIndex([str(tmp_path / "bad.tar")])
    assert reason in str(caught.value) or "extensions seen: md" in str(caught.value)
    (tmp_path / "good.tar").write_bytes(sample("s0") + END)
    index = ShardIndex(expand(str(tmp_path)))
    assert list(index.keys) == ["s0"] and reason in reasons(index)


def test_odd_names_are_only_names(tmp_path: Path) -> None:
    names = [
        "new\nline",
        "back\\slash",
        "..hidden/a",
        "white space ",
        "größe/😀",
        "semi;colon$(touch x)",
        "-n",
        "%s{0}",
    ]
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(sample(name, number) for number, name in enumerate(names)) + END)
    index = ShardIndex([str(path)])
    assert sorted(index.keys) == sorted(names) and not index.ledger
    for number in range(len(names)):
        assert Reader(index).bytes(number, "txt") == f"text {names.index(index.key(number))}".encode()
    indexing.index(str(path), workers=1)
    assert ShardIndex([str(path)]).keys == index.keys
    assert set(os.listdir(tmp_path)) == {"x.tar", "x.tar.mmindex"}


def test_interleaved_samples_and_equal_keys_in_two_shards_keep_their_own_bytes(tmp_path: Path) -> None:
    paths = []
    for shard in range(2):
        parts = [(key, extension) for extension in ("png", "txt") for key in ("a", "b")]
        contents = {(k, e): png(10 * shard + ord(k)) if e == "png" else f"{k} of {shard}".encode() for k, e in parts}
        paths.append(tmp_path / f"{shard}.tar")
        paths[-1].write_bytes(b"".join(member(f"{k}.{e}", contents[k, e]) for k, e in parts) + END)
    index = ShardIndex([str(path) for path in paths])
    assert list(index.keys) == ["a", "b", "a", "b"] and not index.ledger
    for number, (shard, key) in enumerate([(0, "a"), (0, "b"), (1, "a"), (1, "b")]):
        read = Reader(index).read(number)
        assert read.image is not None and read.image.pixels()[0, 0, 0] == 10 * shard + ord(key)
        assert read.texts[0][0] == [f"{key} of {shard}"]


def test_offsets_behind_what_an_index_can_hold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as file:  # a sparse file: no space is taken
        file.write(sample("s0") + header("x.bin", field=b"\x80" + (3 << 40).to_bytes(11, "big")))
        file.seek(3 << 40, os.SEEK_CUR)
        file.write(sample("s1") + END)
    index = ShardIndex([str(path)])
    assert list(index.keys) == ["s0"] and "s1.png refused: it lies behind 2 TiB" in reasons(index)


def test_a_member_that_memory_may_not_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        file.write(sample("s0") + header("s1.png", 300 << 20))
        file.seek(300 << 20, os.SEEK_CUR)
        file.write(member("s1.txt", b"text") + END)
    index = ShardIndex([str(path)])
    assert list(index.keys) == ["s0"] and "314572800 bytes is over the limit" in reasons(index)


class Marker:
    """Unpickled anywhere, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims many pixels, and begins to hold them."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1 << 20)))]
    chunks = [
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in [*parts, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 99).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


UNREADABLE = {
    "half a JPEG": (("jpg", jpeg()[:1500]), ("txt", b"text"), "image cannot be decoded: ValueError: Premature end"),
    "half a PNG": (("png", png()[:50]), ("txt", b"text"), "image"),
    "no picture": (("png", b"hello"), ("txt", b"text"), "not a JPEG, PNG or WebP image"),
    "a GIF": (("png", b"GIF89a" + bytes(100)), ("txt", b"text"), "not a JPEG, PNG or WebP image"),
    "PNG bomb": (("png", bomb(30_000, 30_000)), ("txt", b"text"), "30000x30000 pixels is over the limit"),
    "thin PNG bomb": (("png", bomb(2_000_000_000, 1)), ("txt", b"text"), "2000000000x1 pixels is over the limit"),
    "two PNG headers": (("png", bomb(8, 8)[:33] + bomb(30_000, 30_000)[8:]), ("txt", b"text"), "image"),
    "caption not UTF-8": (
        ("png", png()),
        ("txt", b"\xff\xfe\xfd"),
        "caption is not UTF-8: invalid start byte at byte 0",
    ),
    "caption of blanks": (("png", png()), ("txt", b" \n\t"), "caption is empty"),
    "json of a million brackets": (("png", png()), ("json", b"[" * 1_000_000), "metadata is not JSON"),
    "json that is cut": (("png", png()), ("json", b'{"caption": "a te'), "metadata is not JSON"),
    "json with half a character": (("png", png()), ("json", b'{"caption": "\\ud83d"}'), "is not Unicode text"),
    "json without the field": (("png", png()), ("json", b'{"caption": {"a": 1}}'), "no text in 'caption'"),
    "json with a number of 5000 digits": (
        ("png", png()),
        ("json", b'{"a": %s}' % (b"9" * 5000)),
        "metadata is not JSON",
    ),
}


def test_damage_inside_samples_is_named_by_key_and_costs_little_memory(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = b"".join(sample(f"good{number}") for number in range(60))
    content += b"".join(
        member(f"good{n}.{e}", pickle.dumps(Marker(marker))) for n, e in enumerate(("pyd", "pyg", "pickle"))
    )
    for key, (image, caption, _) in UNREADABLE.items():
        content += member(f"{key}.{image[0]}", image[1]) + member(f"{key}.{caption[0]}", caption[1])
    path = tmp_path / "x.tar"
    path.write_bytes(content + END)
    data = Loader(
        str(path),
        {"image": ImageProcessor(8)},
        caption="txt,json.caption",
        batch_size=74,
        train=True,
        max_error_rate=0.2,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batches = iter(data)
    keys = {key for _ in range(3) for key in next(batches).keys}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; one bomb alone is 2.7 GB
    assert keys == {f"good{number}" for number in range(60)}
    found = {entry.key: entry.reason for entry in data.ledger}
    assert found.keys() == UNREADABLE.keys()
    for key, (_, _, reason) in UNREADABLE.items():
        assert reason in found[key] and "\n" not in found[key], key
    assert not marker.exists()
