"""What lies where a shard or its sidecar should be, and names that lead elsewhere: one clear error, or passed over."""

from __future__ import annotations

import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm.config import ConfigError
from mm.data import indexing, sidecar
from mm.data.index import ShardIndex
from mm.data.reader import Reader
from mm.data.shards import expand
from tars import END, png, sample

pytestmark = pytest.mark.timeout(20, method="thread")  # no signal wakes a thread that waits for a pipe


def reasons(index: ShardIndex) -> str:
    return "\n".join(f"{entry.key}: {entry.reason}" for entry in index.ledger)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


NO_FILES = {
    "fifo": (fifo, "not a regular file"),
    "folder": (Path.mkdir, "not a regular file"),
    "device": (link_to_a_device, "not a regular file"),
    "link to itself": (link_to_itself, "Too many levels of symbolic links"),
    "link to nothing": (link_to_nothing, "No such file"),
}


@pytest.mark.parametrize(("make", "reason"), NO_FILES.values(), ids=NO_FILES.keys())
def test_what_is_called_tar_and_is_no_file_is_one_clear_error(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    path, good = tmp_path / "x.tar", tmp_path / "good.tar"
    good.write_bytes(sample("s0") + END)
    make(path)
    with pytest.raises(ConfigError, match=rf"'{path}' cannot be read: {reason}"):
        ShardIndex(expand(str(tmp_path)))
    reports = {report.shard: report for report in indexing.index(str(tmp_path), workers=1)}
    assert reports[str(path)].failed and reason in reports[str(path)].problem
    assert not reports[str(good)].problem and Path(f"{good}.mmindex").exists()
    assert {r.shard for r in indexing.verify(str(tmp_path), workers=1) if r.problem} == {str(path)}


def test_a_shard_that_turns_into_something_else_is_lost_and_named(tmp_path: Path) -> None:
    for harm, (make, reason) in NO_FILES.items():
        folder = tmp_path / harm.replace(" ", "-")
        folder.mkdir()
        paths = [folder / "0.tar", folder / "1.tar"]
        for number, path in enumerate(paths):
            path.write_bytes(sample(f"s{number}") + END)
        indexing.index(str(folder), workers=1)
        index = ShardIndex([str(path) for path in paths])
        paths[1].unlink()
        make(paths[1])
        with pytest.raises(ValueError, match=f"shard cannot be read: {reason}"):
            Reader(index).read(1)
        again = ShardIndex([str(path) for path in paths])
        assert list(again.keys) == ["s0"] and f"cannot be read: {reason}" in reasons(again), harm
        assert (again.rejected, again.seen) == (1, 2)


def refuse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may open a file: root, who often runs tests, is refused nothing by its mode."""
    real = os.open

    def refused(name: Any, *rest: Any, **named: Any) -> int:
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(name, *rest, **named)

    monkeypatch.setattr(os, "open", refused)


def test_permission_denied_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "0.tar", tmp_path / "1.tar"]
    for number, path in enumerate(paths):
        path.write_bytes(sample(f"s{number}") + END)
    index = ShardIndex([str(path) for path in paths])
    refuse(paths[1], monkeypatch)
    with pytest.raises(ConfigError, match=r"1\.tar' cannot be read: Permission denied"):
        ShardIndex([str(path) for path in paths])
    with pytest.raises(ValueError, match="shard cannot be read: Permission denied"):
        Reader(index).read(1)


def test_a_permission_that_is_given_back_counts_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.tar" for number in range(40)]  # so many that their joined index is kept
    for path in paths:
        path.write_bytes(sample(path.stem) + END)
    indexing.index(str(tmp_path), workers=1)
    os.utime(paths[7])  # so that the sidecar alone does not do
    with monkeypatch.context() as patch:
        refuse(paths[7], patch)
        index = ShardIndex([str(path) for path in paths])
        assert (len(index), index.rejected) == (39, 1) and "cannot be read: Permission denied" in reasons(index)
    index = ShardIndex([str(path) for path in paths])
    assert len(index) == 40 and not index.ledger


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("pipe:cat x.tar", "nothing is run"),
        ("{F}/0.tar::pipe:touch {F}/marker", "nothing is run"),
        ("PIPE:touch {F}/marker", "no shard at"),
        ("ftp://host/x.tar", "ftp"),
        ("file:///etc/passwd", "file"),
        ("memory://x.tar", "memory"),
        ("zip://x.tar", "zip"),
        ("simplecache::s3://bucket/x.tar", "no shard at 'simplecache'"),
        ("{F}/{{0..999999999999}}.tar", "at most 1000000 numbers"),
        ("{F}/{{0..999999}}{{0..999999}}.tar", "more than 1000000 shards"),
        ("{F}/{{9..1}}.tar", "must run upwards"),
        ("{F}/{{0.." + "9" * 5000 + "}}.tar", "no shard at"),
        ("{F}/" + "x" * 300 + ".tar", "no shard at"),
    ],
)
def test_specs_run_nothing_and_are_refused_at_once(tmp_path: Path, spec: str, reason: str) -> None:
    (tmp_path / "0.tar").write_bytes(sample("s0") + END)
    with pytest.raises(ConfigError) as caught:
        expand(spec.format(F=tmp_path))
    assert reason in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "marker").exists()


def change(about: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Edits what a sidecar says of itself and its shard, and corrects its checksum."""

    def edit(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        head = json.loads(content[8 : 8 + size])
        said = json.loads(head["__metadata__"]["mm"])
        about(head, said["shards"][0])
        columns = {name: column for name, column in head.items() if name != "__metadata__"}
        total, body = zlib.crc32(json.dumps(said["shards"]).encode()), content[8 + size :]
        for name in sorted(columns):
            first, last = (int(number) for number in columns[name]["data_offsets"])
            total = zlib.crc32(body[first:last], zlib.crc32(name.encode(), total))
        said["sum"] = total
        head["__metadata__"]["mm"] = json.dumps(said)
        new = json.dumps(head).encode()
        return len(new).to_bytes(8, "little") + new + body

    return edit


def offsets(name: str, first: int, last: int) -> Callable[[bytes], bytes]:
    return change(lambda head, _: head[name].update(data_offsets=[first, last]))


def shard(**values: Any) -> Callable[[bytes], bytes]:
    return change(lambda _, about: about.update(values))


NEARLY_4_GIB = 0xFFFFFFF0
SIDECARS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda content: b"",
    "text": lambda content: b"not an index" * 99,
    "pickle": lambda content: pickle.dumps({"shards": []}),
    "cut": lambda content: content[:-9],
    "cut in its header": lambda content: content[:99],
    "header of 2^64 bytes": lambda content: b"\xff" * 8 + content[8:],
    "brackets": lambda content: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "another version": lambda content: content.replace(b"mm-index-1", b"mm-index-9"),
    "a flipped bit": lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    "places behind the shard": lambda content: raised(content, "image.block", 1 << 20),
    "images of 4 GiB": lambda content: raised(content, "image.size", NEARLY_4_GIB),
    "keys of 64 KiB": lambda content: raised(content, "key_sizes", 65535, width=2),
    "columns behind the file": offsets("image.block", 1 << 40, (1 << 40) + 16),
    "columns of huge offsets": offsets("keys", 10**30, 10**30 + 8),
    "columns before the file": offsets("keys", -8, 0),
    "no keys": change(lambda head, _: head.pop("keys")),
    "no key sizes": change(lambda head, _: head.pop("key_sizes")),
    "sizes without places": change(lambda head, _: head.pop("image.block")),
    "an unknown type": change(lambda head, _: head["image.size"].update(dtype="F64")),
    "more rows": shard(rows=9),
    "rows that are no number": shard(rows=4.0),
    "fewer bytes of keys": shard(key_bytes=3),
    "bytes that are no number": shard(bytes="many"),
    "lost that is no list": shard(lost=None),
    "lost without names": shard(lost=[1, 2]),
    "damage that is no text": shard(damage=5),
    "extensions that are no list": shard(extensions=5),
    "problems of one part": shard(problems=[["x"]]),
    "a field of another version": shard(colour="red"),
}


def raised(content: bytes, name: str, number: int, width: int = 4) -> bytes:
    """A sidecar whose column holds a number in every row, as if it had been written so."""
    size = int.from_bytes(content[:8], "little")
    first, last = json.loads(content[8 : 8 + size])[name]["data_offsets"]
    body = bytearray(content)
    body[8 + size + first : 8 + size + last] = number.to_bytes(width, "little") * ((last - first) // width)
    return change(lambda head, about: None)(bytes(body))


def served(path: Path) -> dict[str, tuple[bytes, bytes]]:
    index = ShardIndex([str(path)])
    reader = Reader(index)
    return {index.key(n): (reader.bytes(n, "image"), reader.bytes(n, "txt")) for n in range(len(index))}


@pytest.fixture
def indexed(tmp_path: Path) -> tuple[Path, Path]:
    """A shard of four samples, and its sidecar."""
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(sample(f"s{number}", number) for number in range(4)) + END)
    sidecar.keep(str(path), sidecar.scan(str(path), whole=True))
    return path, Path(sidecar.beside(str(path)))


@pytest.mark.parametrize("damage", SIDECARS.values(), ids=SIDECARS.keys())
def test_a_broken_sidecar_is_as_good_as_none(indexed: tuple[Path, Path], damage: Callable[[bytes], bytes]) -> None:
    path, beside = indexed
    truth = served(path)
    beside.write_bytes(damage(beside.read_bytes()))
    assert sidecar.find(str(path)) is None
    assert served(path) == truth and len(truth) == 4
    indexing.index(str(path), workers=1)
    assert sidecar.find(str(path)) is not None and served(path) == truth


@pytest.mark.parametrize("make", [fifo, Path.mkdir, link_to_a_device, link_to_itself])
def test_a_sidecar_that_is_no_file_is_passed_over(indexed: tuple[Path, Path], make: Callable[[Path], None]) -> None:
    path, beside = indexed
    truth = served(path)
    beside.unlink()
    make(beside)
    assert served(path) == truth
    sidecar.keep(str(path), sidecar.scan(str(path), whole=True))  # in the cache folder where it must
    assert sidecar.find(str(path)) is not None and served(path) == truth


def test_a_shard_whose_name_leaves_no_room_for_a_sidecars_can_be_indexed(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 249 + ".tar")
    path.write_bytes(sample("s0") + END)
    assert not indexing.index(str(path), workers=1)[0].problem
    assert sidecar.find(str(path)) is not None and len(served(path)) == 1


def test_an_index_older_than_its_shard_is_not_believed(indexed: tuple[Path, Path]) -> None:
    path, _ = indexed
    before = path.stat()
    path.write_bytes(b"".join(sample(f"new{number}", number) for number in range(4)) + END)
    assert set(served(path)) == {"new0", "new1", "new2", "new3"}
    assert "older than the shard" in reasons(ShardIndex([str(path)]))
    content = (
        b"".join(sample(f"s{number}", 9 - number) for number in range(4)) + END
    )  # same size, same keys, same places
    path.write_bytes(content)
    assert path.stat().st_size == before.st_size
    assert served(path)["s0"] == (png(9), b"text 9")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same time too: only reading it all tells
    report = indexing.verify(str(path), workers=1)[0]
    assert report.lost == 4 and "changed since it was indexed; 4 samples damaged" in report.problem
