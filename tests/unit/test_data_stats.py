from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.config import ConfigError
from mm.data import sidecar
from mm.data import stats as module
from mm.data.stats import stats
from mm.data.stats_table import table
from mm.evaluation.shard_chart import draw
from servers import http_server

pytestmark = pytest.mark.timeout(60)


def png(color: tuple[int, int, int], width: int = 8, height: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), color).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, image: bytes, text: str | bytes) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", image), (f"{key}.txt", text if isinstance(text, bytes) else text.encode())]


def index(folder: Path) -> None:
    for shard in sorted(folder.glob("*.tar")):
        sidecar.keep(str(shard), sidecar.scan(str(shard), whole=True))


def two_splits(folder: Path) -> dict[str, bytes]:
    """Five usable samples in two shards, of which `a`, `c` and `d` show the same picture; one without caption."""
    images = {
        "a": png((255, 0, 0), 300, 300),
        "b": png((0, 255, 0), 400, 200),
        "c": png((255, 0, 0), 300, 300),
        "d": png((255, 0, 0), 300, 300),
        "e": png((9, 9, 9), 90, 160),
    }
    texts = {"a": "one", "b": "two words", "c": "one", "d": "größe drei Wörter", "e": " padded\n"}
    first = [member for key in "abc" for member in sample(key, images[key], texts[key])]
    second = [member for key in "de" for member in sample(key, images[key], texts[key])]
    write(folder / "train-000000.tar", [*first, ("a.json", b"{}"), ("bare7.png", images["a"])])
    write(folder / "val-000000.tar", second)
    return images


def test_figures_of_a_small_set_are_exact(tmp_path: Path) -> None:
    images = two_splits(tmp_path)
    index(tmp_path)
    found = stats(str(tmp_path), progress=False)
    sizes = sorted(len(image) for image in images.values())
    files = sorted(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert [found[name] for name in ("shards", "samples", "usable", "rejected")] == [2, 6, 5, 1]
    assert found["bytes"] == {"total": sum(files), "per_shard": {"min": files[0], "median": files[0], "max": files[1]}}
    assert found["samples_per_shard"] == {"min": 2, "median": 2, "max": 3}
    assert found["extensions"] == {"png": 2, "txt": 2, "json": 1}
    assert [found["image_bytes"][mark] for mark in ("p1", "p50", "p99")] == [sizes[0], sizes[2], sizes[-1]]
    assert found["image_bytes"]["mean"] == sum(sizes) / 5
    assert found["ledger"] == {"no caption": 1}
    assert found["img2dataset"] is None
    captions = found["captions"]
    assert (captions["read"], captions["of"], captions["empty"], captions["unreadable"]) == (5, 5, 0, 0)
    assert captions["characters"] == {"p1": 3, "p25": 3, "p50": 6, "p75": 9, "p99": 17, "mean": 7.6}
    assert captions["words"] == {"p1": 1, "p25": 1, "p50": 1, "p75": 2, "p99": 3, "mean": 1.6}
    assert (captions["identical"], captions["identical_share"]) == (2, 0.4)
    pictures = found["pictures"]
    assert (pictures["known"], pictures["unknown"]) == (5, 0)
    assert {name: n for name, n in pictures["aspect"].items() if n} == {"9:16": 1, "1:1": 3, "2:1": 1}
    assert (pictures["small"], pictures["small_share"]) == (2, 0.4)
    assert (pictures["width"]["p1"], pictures["width"]["p99"], pictures["height"]["p99"]) == (90, 400, 300)
    assert json.loads(json.dumps(found)) == found


def test_histograms_count_every_sample_once(tmp_path: Path) -> None:
    texts = ["word " * count for count in (1, 1, 2, 100)]
    write(tmp_path / "x.tar", [m for i, text in enumerate(texts) for m in sample(f"s{i}", png((i, 0, 0)), text)])
    histograms = stats(str(tmp_path), progress=False)["histograms"]
    assert [sum(histogram["counts"]) for histogram in histograms.values()] == [4, 4, 1]
    words = histograms["caption_words"]
    assert np.diff(words["edges"]).tolist() == [3] * 34  # 0 to 101
    assert (words["counts"][0], words["counts"][-1], words["above"]) == (3, 1, 0)
    assert histograms["samples_per_shard"] == {"edges": [4, 5], "counts": [1], "above": 0}


def test_one_very_long_caption_is_counted_beyond_the_last_edge(tmp_path: Path) -> None:
    lengths = [*[3] * 299, 5000]
    members = [m for i, n in enumerate(lengths) for m in sample(f"s{i}", b"same", "word " * n)]
    write(tmp_path / "x.tar", members)
    words = stats(str(tmp_path), progress=False)["histograms"]["caption_words"]
    assert words == {"edges": [0, 1, 2, 3, 4], "counts": [0, 0, 0, 300], "above": 1}


@pytest.mark.parametrize("indexed", ["neither", "one", "both"])
def test_duplicates_across_shards_are_found_with_and_without_an_index(tmp_path: Path, indexed: str) -> None:
    two_splits(tmp_path)
    train, val = str(tmp_path / "train-000000.tar"), str(tmp_path / "val-000000.tar")
    for shard in {"neither": [], "one": [train], "both": [train, val]}[indexed]:
        sidecar.keep(shard, sidecar.scan(shard, whole=True))
    found = stats(str(tmp_path), progress=False)
    assert found["duplicates"] == {
        "groups": 1,
        "surplus": 2,
        "unread": 0,
        "first": [{"copies": 3, "samples": [[train, "a"], [train, "c"], [val, "d"]]}],
    }
    assert found["pictures"]["unknown"] == {"neither": 5, "one": 2, "both": 0}[indexed]


def test_images_of_one_size_and_crc_are_no_duplicates_where_their_bytes_differ(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", [*sample("a", b"bytes", "text"), *sample("b", b"other", "text")])
    kept = sidecar.scan(str(path), whole=True)
    kept.columns["crc"] = np.full(2, 12345, np.uint32)  # as if they collided
    sidecar.keep(str(path), kept)
    assert stats(str(path), progress=False)["duplicates"]["groups"] == 0


def test_indexed_and_unindexed_shards_agree_on_all_but_picture_sizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shard in range(3):
        colours = rng.integers(0, 6, (20, 3)).tolist()
        members = [m for i, c in enumerate(colours) for m in sample(f"{shard}-{i}", png(tuple(c)), f"{c[0]} word")]
        write(tmp_path / f"x-{shard}.tar", members)
    before = stats(str(tmp_path), progress=False)
    index(tmp_path)
    after = stats(str(tmp_path), progress=False)
    assert before["duplicates"]["groups"] > 0
    assert (before.pop("pictures")["unknown"], after.pop("pictures")["unknown"]) == (60, 0)
    assert before == after


def test_captions_that_cannot_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    texts = [b"good", b"  \n", b"\xff1", b"a\xff2", b""]
    write(tmp_path / "x.tar", [m for i, text in enumerate(texts) for m in sample(f"s{i}", png((i, 0, 0)), text)])
    found = stats(str(tmp_path), progress=False)
    captions = found["captions"]
    assert (captions["read"], captions["empty"], captions["unreadable"]) == (4, 1, 2)
    assert captions["problems"] == {
        "caption is not UTF-8: invalid start byte at byte 0": 1,
        "caption is not UTF-8: invalid start byte at byte N": 1,
    }
    assert captions["words"]["mean"] == 1
    assert found["ledger"] == {"caption of 0 bytes": 1}


def test_each_source_has_its_own_caption_field(tmp_path: Path) -> None:
    one, two = tmp_path / "one.tar", tmp_path / "two.tar"
    write(one, sample("a", png((1, 0, 0)), "from text"))
    write(two, [("b.png", png((2, 0, 0))), ("b.json", b'{"caption": "from json over here"}')])
    captions = stats(f"{one}::{two}", caption="txt::json.caption", progress=False)["captions"]
    assert (captions["read"], captions["words"]["p1"], captions["words"]["p99"]) == (2, 2, 4)
    with pytest.raises(ConfigError, match=r"none of 1 samples"):
        stats(str(two), progress=False)


def test_reasons_are_told_without_their_numbers_and_names(tmp_path: Path) -> None:
    bad = [(f"../up{i}.png", b"x") for i in range(3)]
    twice = [(f"s{i % 2}.txt", b"again") for i in range(3)]
    good = [m for i in range(2) for m in sample(f"s{i}", png((i, 0, 0)), "text")]
    path = write(tmp_path / "x.tar", [*good, *bad, *twice])
    path.write_bytes(path.read_bytes()[: 10 * 1024 - 510])  # two bytes into the last of ten members
    ledger = stats(str(path), progress=False)["ledger"]
    assert [count for reason, count in ledger.items() if reason.startswith("member … refused: ")] == [3]
    assert ledger["second member … ignored"] == 2
    assert all(not any(digit in reason for digit in "123456789") for reason in ledger)
    assert ledger["cut at byte N, inside …"] == 1


def test_at_most_ten_reasons_are_told_and_the_rest_summed() -> None:
    counts = module._top(module.Counter({f"reason {'x' * n}": n for n in range(1, 14)}))
    assert len(counts) == 11
    assert counts["other reasons"] == 1 + 2 + 3


def test_of_many_captions_evenly_spaced_ones_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_CAPTIONS", 3)
    write(tmp_path / "x.tar", [m for i in range(9) for m in sample(f"s{i}", png((i, 0, 0)), "x" * (i + 1))])
    captions = stats(str(tmp_path), progress=False)["captions"]
    assert (captions["read"], captions["of"]) == (3, 9)
    assert [captions["characters"][mark] for mark in ("p1", "p50", "p99")] == [1, 4, 7]


def img2dataset(folder: Path, name: str, samples: int, successes: int, why: dict[str, int]) -> None:
    """A shard and the statistics that img2dataset writes beside it."""
    write(folder / f"{name}.tar", [m for i in range(samples) for m in sample(f"{name}{i}", png((i, 0, 0)), "text")])
    said = {
        "count": successes + sum(why.values()),
        "successes": successes,
        "failed_to_download": sum(why.values()) - why.get("image decoding error", 0),
        "failed_to_resize": why.get("image decoding error", 0),
        "duration": 1.5,
        "status_dict": {"success": successes, **why},
    }
    (folder / f"{name}_stats.json").write_text(json.dumps(said))


def test_statistics_of_img2dataset_are_summed_and_compared(tmp_path: Path) -> None:
    img2dataset(tmp_path, "00000", 3, 3, {"HTTP Error 404: Not Found": 2, "image decoding error": 1})
    img2dataset(tmp_path, "00001", 2, 4, {"HTTP Error 404: Not Found": 5})
    write(tmp_path / "00002.tar", sample("z", png((1, 1, 1)), "text"))
    said = stats(str(tmp_path), progress=False)["img2dataset"]
    counts = [said[name] for name in ("shards", "attempted", "successes", "failed_to_download", "failed_to_resize")]
    assert counts == [2, 15, 7, 7, 1]
    assert said["reasons"] == {"HTTP Error 404: Not Found": 7, "image decoding error": 1}
    assert said["first_different"] == [{"shard": str(tmp_path / "00001.tar"), "says": 4, "holds": 2}]
    assert said["unreadable"] == 0


@pytest.mark.parametrize("text", ["", "[]", "null", '{"count": 1}', '{"count": "x", "successes": {}}'])
def test_statistics_that_are_no_statistics_are_named_and_stop_nothing(tmp_path: Path, text: str) -> None:
    img2dataset(tmp_path, "00000", 1, 1, {})
    img2dataset(tmp_path, "00001", 1, 1, {})
    (tmp_path / "00001_stats.json").write_text(text)
    found = stats(str(tmp_path), progress=False)
    said = found["img2dataset"]
    assert (said["shards"], said["attempted"], said["unreadable"]) == (1, 1, 1)
    assert str(tmp_path / "00001_stats.json") in said["first_unreadable"][0]
    assert "00001_stats.json" in table(found)


def test_parquet_of_img2dataset_goes_before_its_statistics(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    img2dataset(tmp_path, "00000", 2, 2, {"timed out": 9})
    img2dataset(tmp_path, "00001", 2, 2, {})
    status = ["success", "failed_to_download", "success", "failed_to_resize", "success"]
    keys = [f"0000000{place}" for place in range(5)]
    parquet.write_table(pyarrow.table({"key": keys, "status": status}), tmp_path / "00000.parquet")
    (tmp_path / "00001.parquet").write_bytes(b"no parquet")
    said = stats(str(tmp_path), progress=False)["img2dataset"]
    assert said["status"] == {"success": 5, "failed_to_download": 1, "failed_to_resize": 1}
    assert (said["attempted"], said["reasons"]) == (7, {"timed out": 9})
    assert said["first_different"] == [{"shard": str(tmp_path / "00000.tar"), "says": 3, "holds": 2}]
    assert "00001.parquet" in said["first_unreadable"][0]


def test_shards_of_a_server_have_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    img2dataset(tmp_path / "set", "00000", 3, 4, {"timed out": 2})
    img2dataset(tmp_path / "set", "00001", 2, 2, {})
    (tmp_path / "set" / "00001_stats.json").unlink()
    with http_server(tmp_path / "set") as server:
        there = stats(f"{server.url}/{{00000..00001}}.tar", progress=False)
    index(tmp_path / "set")  # a server's shards are read whole to index them
    here = stats(str(tmp_path / "set"), progress=False)
    assert (there["img2dataset"]["shards"], there["img2dataset"]["first_different"][0]["says"]) == (1, 4)
    assert there["duplicates"]["groups"] == 2
    for found in (here, there):
        del found["spec"], found["img2dataset"]["first_different"], found["duplicates"]["first"]
    assert here == there


def worst(folder: Path) -> dict[str, Any]:
    """Figures with something in every part, and long names everywhere."""
    folder = folder / ("long" * 30)
    folder.mkdir()
    shared = png((0, 0, 0), 5, 100)
    for shard in range(4):
        name = f"{shard:05d}" + "n" * 60
        img2dataset(folder, name, 0, 5, {f"{'why ' * 40}{place}": 100 + place for place in range(20)})
        members = [m for i in range(3) for m in sample("k" * 30 + str(i), png((i, 0, 0)), "text")]
        members += [m for i in range(9) for m in sample(f"d{i}", shared, b"\xff" if i else b" ")]
        members += [(f"x{i}.{'e' * (i + 1)}", b"x") for i in range(20)] + [("big.png", b"")]
        write(folder / f"{name}.tar", members)
    index(folder)
    found = stats(str(folder), progress=False)
    found["ledger"] = {f"{'reason ' * 30}{place}": 10**6 for place in range(10)} | {"other reasons": 3}
    found["captions"]["problems"] = found["ledger"]
    found["img2dataset"]["first_unreadable"] = ["file " * 40]
    found["duplicates"]["unread"] = 12
    found["pictures"]["unknown"] = 10**9
    return found


def test_the_table_stays_within_forty_lines_of_110_characters(tmp_path: Path) -> None:
    lines = table(worst(tmp_path)).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110
    assert any("could not be read" in line for line in lines)


def test_the_table_says_what_was_found(tmp_path: Path) -> None:
    two_splits(tmp_path)
    unindexed = table(stats(str(tmp_path), progress=False))
    assert "5 pictures (mm shards index looks at them)" in unindexed
    index(tmp_path)
    text = table(stats(str(tmp_path), progress=False))
    assert "size unknown" not in text
    for words in (
        "6 samples: 5 usable, 1 rejected",
        "train-000000.tar/a = train-000000.tar/c = val-000000.tar/d",
        "1 groups, 2 surplus samples",
        "2 (40.0 %) the same as another",
        "2 pictures, 40.0 %",
        "1 no caption",
    ):
        assert words in text


def test_without_progress_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    two_splits(tmp_path)
    stats(str(tmp_path), progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("indexed", [False, True])
def test_the_picture_is_a_png_with_four_named_panels(tmp_path: Path, indexed: bool) -> None:
    pytest.importorskip("matplotlib")
    two_splits(tmp_path)
    if indexed:
        index(tmp_path)
    draw(stats(str(tmp_path), progress=False), tmp_path / "stats.png")
    with Image.open(tmp_path / "stats.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1200, 840))
        shades = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    bars = (shades == (0x3B, 0x6F, 0xB6)).all(axis=1).mean()
    assert bars > (0.05 if indexed else 0.03)  # the aspect ratios have none without an index


def test_without_matplotlib_the_picture_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install matplotlib"):
        draw({}, tmp_path / "stats.png")
