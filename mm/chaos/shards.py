"""Shards that are damaged: a run on them goes around the damage and says so, twice in the same way."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mm.chaos.launch import Wrong
from mm.chaos.pictures import samples
from mm.chaos.pictures import shards as write
from mm.chaos.suite import Finding, Scenario, Stage

Member = tuple[str, bytes]
Damage = Callable[[list[Member]], tuple[bytes, list[str]]]  # a shard's bytes, and the keys that it has lost
BOMB_SIDE = 60_000  # pixels; its rows would be 10 GB
TWICE = "finished; a second run on the same damage ended bitwise the same"
NOTHING_LOST = "finished, bitwise the run on whole shards"


def scenarios() -> Iterator[Scenario]:
    """Each damage to one of two shards, and more of it than the config allows."""
    for name, (what, damage) in DAMAGES.items():
        yield Scenario(f"shard-{name}", f"a shard with {what}", partial(_goes_around, damage), 1)
    yield Scenario("shard-over-limit", "a shard cut at a quarter, data.max_error_rate = 0.05", _over_limit, 1)


def _cut(share: float, inside: int, members: list[Member]) -> tuple[bytes, list[str]]:
    """Cut so many bytes behind the beginning of a sample's first header; the keys from there on are lost."""
    keys = list(dict.fromkeys(key_of(name) for name, _ in members))
    first = int(len(keys) * share)
    before = tar([member for member in members if key_of(member[0]) in keys[:first]], end=False)
    return tar(members)[: len(before) + inside], keys[first:]


def _replaced(suffix: str, by: list[Member], members: list[Member]) -> tuple[bytes, list[str]]:
    """One part of the tenth sample is another, or several, or gone; `by` names them by their extension."""
    key = key_of(members[20][0])
    found: list[Member] = []
    for name, data in members:
        found += [(f"{key}{end}", other) for end, other in by] if name == key + suffix else [(name, data)]
    return tar(found), [key]


def _twice(members: list[Member]) -> tuple[bytes, list[str]]:
    """The tenth sample comes again at the end."""
    return tar(members + members[20:22]), [key_of(members[20][0])]


def _interleaved(members: list[Member]) -> tuple[bytes, list[str]]:
    """All pictures of ten samples, then all their captions."""
    first = members[:20]
    return tar([*first[::2], *first[1::2], *members[20:]]), []  # they are put together


def _empty(members: list[Member]) -> tuple[bytes, list[str]]:
    return b"", list(dict.fromkeys(key_of(name) for name, _ in members))


def _link(members: list[Member]) -> tuple[bytes, list[str]]:
    """The tenth sample's picture is a symbolic link to a file of the machine."""
    key = key_of(members[20][0])
    return tar(members, links={f"{key}.png": "/etc/hostname"}), [key]


def bomb() -> bytes:
    """A PNG of a few bytes that says it has billions of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(range(256)) * 4
DAMAGES: dict[str, tuple[str, Damage]] = {
    "cut-in-data": ("its last three quarters gone, cut inside a picture", partial(_cut, 0.25, 700)),
    "cut-in-header": ("its second half gone, cut inside a header", partial(_cut, 0.5, 100)),
    "cut-between": ("its last quarter gone, cut between two samples", partial(_cut, 0.75, 0)),
    "empty": ("no byte in it", _empty),
    "bad-jpeg": ("a JPEG of noise", partial(_replaced, ".png", [(".jpg", JPEG)])),
    "bad-utf8": ("a caption that is not UTF-8", partial(_replaced, ".txt", [(".txt", b"\xff\xfe caption")])),
    "no-caption": ("a picture without a caption", partial(_replaced, ".txt", [])),
    "same-key-twice": ("a key that comes twice", _twice),
    "interleaved": ("the parts of ten samples interleaved", _interleaved),
    "bomb": ("a PNG of 60,000 x 60,000 pixels", partial(_replaced, ".png", [(".png", bomb())])),
    "link": ("a symbolic link for a picture", _link),
}


def _goes_around(damage: Damage, stage: Stage) -> Finding:
    shard, lost = _damaged(stage, damage)
    first = stage.run
    stage.done(stage.train())
    lines = (first / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [entry for entry in map(json.loads, lines) if Path(entry["shard"]) == shard]
    missed = set(lost) - {entry["key"] for entry in entries}
    if missed or not entries:
        raise Wrong(f"ledger.jsonl names {len(lost) - len(missed)} of {len(lost)} samples; {entries[:2]}")
    about = [entry for entry in entries if not entry["key"] and "index is older" not in entry["reason"]]
    told = [*about, *(entry for entry in entries if entry["key"] in lost), *entries][0]
    what = told["key"] or (f"{len(lost)} samples" if lost else "nothing lost")
    seen = f"ledger.jsonl: {shard.name}: {what}: {told['reason']}"
    if not lost:
        stage.ends_like(stage.suite.kept("whole-shards", 1, _undamaged))
        return Finding(seen, NOTHING_LOST)
    stage.run = stage.folder / "again"
    stage.done(stage.train())
    stage.ends_like(first)
    return Finding(seen, TWICE)


def _undamaged(stage: Stage) -> None:
    _damaged(stage, lambda members: (tar(members), []))
    stage.done(stage.train())


def _over_limit(stage: Stage) -> Finding:
    _damaged(stage, partial(_cut, 0.25, 700))
    stage.flags += ["--data.max_error_rate", "0.05"]  # the last one counts
    return Finding(stage.refused(stage.train(), r"data\.max_error_rate = 0\.05"), "stopped by one error")


def _damaged(stage: Stage, damage: Damage) -> tuple[Path, list[str]]:
    """Two shards, indexed when they were whole, of which the first is not any more; and the keys that it lost.

    A run of one epoch and a half on them, whatever the user's config says of data.
    """
    suite, folder = stage.suite, stage.folder / "shards"
    batch = suite.config.data.batch_size
    clean = suite.out / "clean"
    if not clean.exists():
        write(clean, 4 * max(batch, 8))
    shutil.copytree(clean, folder)
    pictures = samples(4 * max(batch, 8))
    own = [(f"{key}.{end}", data) for key, parts in pictures[: len(pictures) // 2] for end, data in parts.items()]
    shard = folder / "train-000000.tar"
    content, lost = damage(own)
    shard.write_bytes(content)
    stage.flags += ["--data.train", str(folder / "train-*.tar"), "--data.caption", "txt", "--data.weights="]
    stage.flags += ["--data.max_error_rate", "0.9", "--data.max_consecutive_errors", "100000"]
    stage.flags += ["--run.steps", str(6 * max(batch, 8) // batch), "--checkpoint.every", "0"]
    return shard, lost


def key_of(name: str) -> str:
    """A member's sample."""
    return name.partition(".")[0]


def tar(members: list[Member], end: bool = True, links: dict[str, str] | None = None) -> bytes:
    """The bytes of a tar file, as ShardWriter writes it; `links`: members that are symbolic links, and to what."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            if name in (links or {}):
                info.type, info.linkname, info.size = tarfile.SYMTYPE, (links or {})[name], 0
            archive.addfile(info, io.BytesIO(data))
        size = archive.offset
    return stream.getvalue() if end else stream.getvalue()[:size]
