"""webdataset stays the interchange: it reads what is written here, and what it writes is read here."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from mm.data.captions import Captions
from mm.data.index import ShardIndex
from mm.data.indexing import index, verify
from mm.data.pack import ShardWriter
from mm.data.reader import Reader, read_captions
from mm.data.shards import expand

pytestmark = pytest.mark.timeout(60)


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), (number, 2 * number, 0)).save(stream, "PNG")
    return stream.getvalue()


def test_webdataset_reads_what_is_written_here(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, per_shard=4) as writer:
        for number in range(10):
            parts = {"png": picture(number), "txt": f"größe {number}".encode(), "json": b'{"a": 1}'}
            writer.add("train", f"{number:05d}", parts)
        writer.finish({})
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    found = list(
        webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "txt", "json")
    )
    assert [key for key, *_ in found] == [f"{number:05d}" for number in range(10)]
    assert [text for _, _, text, _ in found] == [f"größe {number}" for number in range(10)]
    assert all(
        image.getpixel((0, 0)) == (n, 2 * n, 0) and about == {"a": 1} for n, (_, image, _, about) in enumerate(found)
    )


def test_what_webdataset_writes_is_read_here(tmp_path: Path) -> None:
    with webdataset.ShardWriter(f"{tmp_path}/%06d.tar", maxcount=4, verbose=0) as sink:
        for number in range(10):
            about = {"caption": f"caption {number}"}
            sample = {
                "png": Image.new("RGB", (12, 8), (number, 0, 0)),
                "txt": f"text {number}",
                "json": about,
                "cls": 3,
            }
            sink.write({"__key__": f"folder/sample{number}", **sample})
    index(str(tmp_path))
    assert not any(report.problem for report in verify(str(tmp_path)))
    read = ShardIndex(expand(f"{tmp_path}/{{000000..000002}}.tar"), parts=("json", "txt"))
    assert read.keys == [f"folder/sample{number}" for number in range(10)] and not read.ledger
    assert read_captions(read, Captions("json.caption"))[1] == [f"caption {number}" for number in range(10)]
    reader = Reader(read, Captions("txt"))
    for number in range(10):
        sample = reader.read(number)
        assert sample.texts == [([f"text {number}"], 1.0)]
        assert sample.image is not None and sample.image.pixels()[0, 0].tolist() == [number, 0, 0]


def test_what_img2dataset_writes_is_taken_as_it_is(tmp_path: Path) -> None:
    """Its layout: 00000.tar with jpg, txt and json, failed downloads missing, and two tables beside it."""
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = []
    with webdataset.TarWriter(f"{tmp_path}/00000.tar") as sink:
        for number in range(8):
            key, fine = f"{number:09d}", number != 3
            rows.append(
                {"key": key, "status": "success" if fine else "failed_to_download", "caption": f"text {number}"}
            )
            if fine:
                about = {"key": key, "caption": f"text {number}", "status": "success", "width": 12, "height": 8}
                sink.write({"__key__": key, "jpg": Image.new("RGB", (12, 8)), "txt": f"text {number}", "json": about})
    parquet.write_table(table.Table.from_pylist(rows), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 8, "successes": 7}))
    read = ShardIndex(expand(str(tmp_path)))
    assert len(read) == 7 and not read.ledger
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[: len(whole) // 2])  # cut before anybody indexed it
    lost = [entry.key for entry in ShardIndex(expand(str(tmp_path))).ledger if entry.key]
    assert lost == [row["key"] for row in rows if row["status"] == "success"][-len(lost) :] and lost
    assert verify(str(tmp_path))[0].lost == len(lost)
