"""A tar with any bytes changed: samples that parse, or one clear error, and never a byte from elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm.config import ConfigError
from mm.data import sidecar, tar
from mm.data.decode import Picture
from mm.data.index import ShardIndex
from mm.data.reader import Reader
from mm.data.table import Shard, build, same_samples
from tars import long, member, pax, png, sample

pytestmark = pytest.mark.timeout(60)
VALID = b"".join(sample(f"s{n}", n) for n in range(3)) + member("s3.png", png(3)) + long(b"l/" * 90 + b"s4.txt\0")
VALID += member("l", b"text 4") + pax(path="p/" * 90 + "s5.png") + member("p", png(5)) + bytes(2048)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A tar with a few bytes or blocks flipped, deleted, inserted or doubled, or only noise."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=2000))
    data = bytearray(VALID)
    for _ in range(draw(st.integers(1, 3))):
        grid = draw(st.sampled_from([1, 512]))
        at = draw(st.integers(0, len(data) // grid)) * grid
        size = draw(st.sampled_from([1, 12, 512, 1024]))
        kind = draw(st.sampled_from(["flip", "delete", "insert", "double", "header"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "delete":
            del data[at : at + size]
        elif kind == "insert":
            data[at:at] = (
                draw(st.binary(min_size=1, max_size=20)) if grid == 1 else draw(st.binary(max_size=9)).ljust(512)
            )
        elif kind == "double":
            data[at:at] = data[at : at + size]
        elif kind == "header" and grid == 512 and at + 512 <= len(data):  # any field, with a right checksum
            data[at + draw(st.integers(0, 511))] = draw(st.integers(0, 255))
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


@given(content=mutated())
@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_samples_that_parse_or_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    try:
        index = ShardIndex([str(path)])
    except ConfigError:
        return
    reader = Reader(index)
    for number in range(len(index)):
        for part in ("image", "txt"):
            offset, size = index.span(number, part)
            assert offset > 0 and offset + size <= len(content)
            assert reader.bytes(number, part) == content[offset : offset + size]
        try:
            read = reader.read(number)
        except ValueError:
            continue
        assert isinstance(read.image, Picture) and read.image.pixels().shape[2] == 3
        assert all(isinstance(text, str) and text for strings, _ in read.texts for text in strings)


@given(content=mutated(), piece=st.integers(1, 1500))
@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tar_is_the_same_read_in_pieces_and_anywhere(tmp_path: Path, content: bytes, piece: int) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    fd = tar.open_file(str(path))
    anywhere = build(Shard("x", len(content)), tar.Scan(tar.File(fd)))
    os.close(fd)
    pieces = (content[start : start + piece] for start in range(0, len(content), piece))
    streamed = build(Shard("x", len(content)), tar.Scan(tar.Stream(pieces, len(content))))
    assert same_samples(anywhere, streamed) and anywhere.shards == streamed.shards


@given(at=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(["flip", "cut", "double"]), size=st.integers(1, 40))
@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sidecar_with_other_bytes_never_leads_to_other_samples(
    tmp_path: Path, at: float, kind: str, size: int
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(VALID)
    beside = Path(sidecar.keep(str(path), sidecar.scan(str(path), whole=True)))
    content = beside.read_bytes()
    place = int(at * len(content))
    part = content[place : place + size]
    if kind == "flip":
        part = bytes([part[0] ^ 1 << size % 8]) + part[1:]
    beside.write_bytes(content[:place] + {"flip": part, "cut": b"", "double": part * 2}[kind] + content[place + size :])
    index = ShardIndex([str(path)])
    assert [index.key(number)[-2:] for number in range(len(index))] == ["s0", "s1", "s2"]
    assert [Reader(index).bytes(number, "image") for number in range(3)] == [png(0), png(1), png(2)]
