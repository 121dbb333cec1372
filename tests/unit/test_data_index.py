from __future__ import annotations

import io
import pickle
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from mm.config import ConfigError
from mm.data.index import ShardIndex
from mm.data.reader import Reader, read_captions
from mm.data.shards import expand


def png(color: str = "red", size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), color).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(count: int, prefix: str = "s") -> list[tuple[str, bytes]]:
    return [m for i in range(count) for m in ((f"{prefix}{i}.png", png()), (f"{prefix}{i}.txt", f"text {i}".encode()))]


def test_specs_name_folders_braces_globs_and_joins(tmp_path: Path) -> None:
    names = [str(write(tmp_path / f"a-{i:03d}.tar", pairs(1))) for i in range(8, 12)]
    assert expand(str(tmp_path)) == names
    assert expand(f"{tmp_path}/a-{{008..011}}.tar") == names
    assert expand(f"{tmp_path}/a-*.tar") == names
    assert expand(f"{tmp_path}/a-0{{08,11}}.tar") == [names[0], names[3]]
    assert expand(f"{names[2]}::{names[0]}") == [names[2], names[0]]


def test_specs_that_match_nothing_say_what_was_seen(tmp_path: Path) -> None:
    write(tmp_path / "a-000.tar", pairs(1))
    for spec in (f"{tmp_path}/b-*.tar", f"{tmp_path}/a-{{000..001}}.tar", f"{tmp_path}/none/x.tar"):
        with pytest.raises(ConfigError, match=r"no shard at .*holds a-000.tar") as caught:
            expand(spec)
        assert spec in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"is empty"):
        expand(str(tmp_path / "empty"))
    for spec in ("", "pipe:cat x.tar", "ftp://host/x.tar", f"{tmp_path}/a-000.tar::"):
        with pytest.raises(ConfigError):
            expand(spec)
    with pytest.raises(ConfigError, match=r"more than once"):
        expand(f"{tmp_path}::{tmp_path}/a-*.tar")


def test_training_cannot_reach_across_splits(openmoji_shards: Path) -> None:
    for spec in (openmoji_shards, openmoji_shards / "*.tar"):
        with pytest.raises(ConfigError, match=r"train, dev, val shards.*train-\*\.tar"):
            expand(str(spec))
    assert len(expand(str(openmoji_shards), mixed=True)) == len(list(openmoji_shards.glob("*.tar")))
    assert expand(f"{openmoji_shards}/{{dev,val}}-*.tar")  # named one by one


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_finds_the_bytes_that_tarfile_finds(tmp_path: Path, form: int) -> None:
    long = "d" * 60 + "/" + "k" * 90 if form == tarfile.USTAR_FORMAT else "d" * 120 + "/" + "ü" * 150
    members = [*pairs(3), (f"{long}.png", png("blue")), (f"{long}.txt", "größe".encode()), (f"{long}.cls", b"1")]
    index = ShardIndex([str(write(tmp_path / "x.tar", members, form))])
    assert index.keys == ["s0", "s1", "s2", long]
    assert not index.ledger
    reader = Reader(index)
    contents = dict(members)
    for number, key in enumerate(index.keys):
        assert reader.bytes(number, "image") == contents[f"{key}.png"]
        assert reader.bytes(number, "txt") == contents[f"{key}.txt"]


def test_interleaved_and_repeated_members_are_put_together(tmp_path: Path) -> None:
    members = [("a.png", png()), ("b.png", png("blue")), ("b.txt", b"b"), ("a.txt", b"a"), ("a.txt", b"second")]
    index = ShardIndex([str(write(tmp_path / "x.tar", members))])
    assert index.keys == ["a", "b"]
    assert read_captions(index)[:2] == (["a", "b"], ["a", "b"])
    assert "second member" in index.ledger[0].reason


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code of a shard ran')",)


def test_pickles_links_and_paths_outside_are_never_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in [*pairs(1), ("s0.pyd", pickle.dumps(Bomb())), ("../s1.png", png()), ("/s2.txt", b"root")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for key, kind in (("s3", tarfile.SYMTYPE), ("s4", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(f"{key}.txt")
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
            info = tarfile.TarInfo(f"{key}.png")
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
    index = ShardIndex([str(path)])
    assert index.keys == ["s0"]
    assert read_captions(index)[1] == ["text 0"]
    reasons = " ".join(entry.reason for entry in index.ledger)
    assert reasons.count("leaves the archive") == 2
    assert "symbolic link" in reasons and "hard link" in reasons


def test_a_tar_cut_anywhere_is_noticed_and_keeps_its_whole_samples(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.tar", pairs(5)).read_bytes()
    end = 5 * 4 * 512  # five samples of two members, each a header and one block
    cut = tmp_path / "cut.tar"
    for offset in [*range(2048, end, 512), *range(2049, end, 731), end]:
        cut.write_bytes(whole[:offset])
        index = ShardIndex([str(cut)])
        assert any(entry.key == "" and "cut at byte" in entry.reason for entry in index.ledger), offset
        assert len(index) == (offset + 2048 - 1542) // 2048  # a sample of 2048 bytes ends in padding
    cut.write_bytes(whole[:2048] + b"\x55" * 512 + whole[2560:])
    assert "damaged header" in ShardIndex([str(cut)]).ledger[0].reason


def test_shards_without_captions_name_the_extensions_seen(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", [(f"{i}.{ext}", png()) for i in range(3) for ext in ("png", "cls")])
    with pytest.raises(ConfigError, match=r"none of 3 samples .*extensions seen: cls, png"):
        ShardIndex([str(path)], spec="x.tar")
    (tmp_path / "y.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(ConfigError, match=r"no sample in 1 shard.*no tar file"):
        ShardIndex([str(tmp_path / "y.tar")])


def test_samples_that_lack_a_part_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.tar", [*pairs(2), ("no.txt", b"text"), ("bare.png", png()), ("void.png", b""), ("void.txt", b"t")]
    )
    index = ShardIndex([str(path)])
    assert [(entry.key, entry.reason) for entry in index.ledger] == [
        ("no", "no image"),
        ("bare", "no caption"),
        ("void", "empty image"),
    ]
    assert (index.rejected, index.seen, len(index)) == (3, 5, 2)


def test_indexing_is_fast(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", pairs(2000))
    start = time.process_time()
    ShardIndex([str(path)])
    assert time.process_time() - start < 1.0  # 0.05 s on an idle core
