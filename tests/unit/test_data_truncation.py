"""A tar cut anywhere, before it is indexed, after, and while it is read: found, counted, and never read wrongly."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mm.adapters.base import Processor
from mm.config import ConfigError
from mm.data import indexing
from mm.data.index import ShardIndex
from mm.data.loader import Loader
from mm.data.reader import Reader

SAMPLES, CUTS = 40, 200


def png(number: int) -> bytes:
    """A picture that says which sample it is of."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(stream, "PNG")
    return stream.getvalue()


def members(first: int = 0, count: int = SAMPLES) -> list[tuple[str, bytes]]:
    """png, txt and json of some samples; every fifth has a name that needs headers of its own."""
    found = []
    for number in range(first, first + count):
        key = f"{number:05d}" if number % 5 else f"{'long/' * 30}{number:05d}"
        about = json.dumps({"number": number, "more": "x" * (number * 37 % 1200)}).encode()
        found += [(f"{key}.png", png(number)), (f"{key}.txt", f"text {number}".encode()), (f"{key}.json", about)]
    return found


def write(path: Path, contents: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in contents:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


class Whole(NamedTuple):
    """A complete shard, where the bytes of each sample's parts end, and where the last member does, padded."""

    path: Path
    ends: dict[str, dict[str, int]]  # key -> extension -> byte
    contents: dict[str, bytes]
    end: int

    def having(self, cut: int, extensions: Sequence[str]) -> list[str]:
        """Keys of samples of which these parts lie before a cut."""
        return [key for key, ends in self.ends.items() if all(ends[extension] <= cut for extension in extensions)]


@pytest.fixture(scope="module", params=[tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    path = write(tmp_path_factory.mktemp("whole") / "whole.tar", members(), request.param)
    ends: dict[str, dict[str, int]] = defaultdict(dict)
    with tarfile.open(path) as tar:
        for info in tar:
            key, _, extension = info.name.rpartition(".")
            ends[key][extension] = info.offset_data + info.size
        last = -(-ends[key][extension] // 512) * 512
    return Whole(path, dict(ends), dict(members()), last)


@pytest.fixture(scope="module")
def cuts(whole: Whole) -> list[int]:
    """Evenly spread, at and beside block edges, in the end marker and the padding behind it, and anywhere."""
    size, rng = os.path.getsize(whole.path), random.Random(3)
    edges = [512 * rng.randrange(1, whole.end // 512) + beside for beside in (-1, 0, 1) for _ in range(20)]
    tail = [*range(whole.end - 2, whole.end + 3), *range(whole.end + 511, size, 512), whole.end + 1024, size - 1]
    chosen = {0, 1, 511, 512, 513, *(whole.end * place // 70 for place in range(70)), *edges, *tail}
    while len(chosen) < CUTS:
        chosen.add(rng.randrange(size))
    return sorted(chosen)


def named(folder: Path, cut: int) -> Path:
    return folder / f"cut-{cut:06d}.tar"


@pytest.fixture(scope="module")
def never_indexed(whole: Whole, cuts: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, data = tmp_path_factory.mktemp("before"), whole.path.read_bytes()
    for cut in cuts:
        named(folder, cut).write_bytes(data[:cut])
    return folder


@pytest.fixture(scope="module")
def indexed(whole: Whole, cuts: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexed whole, and cut since."""
    folder = tmp_path_factory.mktemp("after")
    for cut in cuts:
        shutil.copy(whole.path, named(folder, cut))
    assert not any(report.problem for report in indexing.index(str(folder), workers=2))
    for cut in cuts:
        os.truncate(named(folder, cut), cut)
    return folder


def opened(whole: Whole, folder: Path, cuts: list[int]) -> tuple[ShardIndex, dict[str, list[int]]]:
    """One index over the whole shard and all that are cut, and the samples of each shard."""
    index = ShardIndex([str(whole.path), *(str(named(folder, cut)) for cut in cuts)])
    numbers = defaultdict(list)
    for number in range(len(index)):
        numbers[index.shards[index.shard_of(number)]].append(number)
    return index, numbers


def check_what_is_served(whole: Whole, folder: Path, cuts: list[int]) -> ShardIndex:
    index, numbers = opened(whole, folder, cuts)
    reader = Reader(index)
    for cut in cuts:
        served = numbers[str(named(folder, cut))]
        assert [index.key(number) for number in served] == whole.having(cut, ("png", "txt")), cut
        for number in served:
            key = index.key(number)
            assert reader.bytes(number, "image") == whole.contents[f"{key}.png"]
            assert reader.bytes(number, "txt") == whole.contents[f"{key}.txt"]
            if key in whole.having(cut, ("json",)):
                assert reader.bytes(number, "json") == whole.contents[f"{key}.json"]
    return index


def is_complete(whole: Whole, cut: int) -> bool:
    """Whether a cut leaves a tar that ends as it should: right after the two blocks of zeros that end it."""
    return cut == whole.end + 1024


@pytest.mark.timeout(60)
def test_every_cut_of_a_shard_never_indexed_is_found_and_what_lies_before_is_served(
    whole: Whole, cuts: list[int], never_indexed: Path
) -> None:
    assert len(cuts) >= CUTS
    index = check_what_is_served(whole, never_indexed, cuts)
    found = {entry.shard: entry.reason for entry in index.ledger if not entry.key}
    for cut in cuts:
        if not is_complete(whole, cut):
            assert ("cut at byte" if cut else "empty file") in found[str(named(never_indexed, cut))], cut


@pytest.mark.timeout(60)
def test_verify_finds_every_cut_of_a_shard_never_indexed(whole: Whole, cuts: list[int], never_indexed: Path) -> None:
    reports = {report.shard: report for report in indexing.verify(str(never_indexed), workers=2)}
    assert len(reports) == len(cuts)
    for cut in cuts:
        problem = reports[str(named(never_indexed, cut))].problem
        assert ("cut at byte" in problem or problem == "empty file") != is_complete(whole, cut), cut


def check_what_is_lost(whole: Whole, folder: Path, cuts: list[int]) -> list[indexing.Report]:
    """In the ledger, in the index's counts, and in what `verify` reports, which it returns."""
    index = check_what_is_served(whole, folder, cuts)
    keys = defaultdict(list)
    for entry in index.ledger:
        keys[entry.shard] += [entry.key] if entry.key else []
    lost = {cut: set(whole.ends) - set(whole.having(cut, ("png", "txt"))) for cut in cuts}
    for cut in cuts:
        assert sorted(keys[str(named(folder, cut))]) == sorted(lost[cut]), cut
    assert index.seen == SAMPLES * (len(cuts) + 1)
    assert index.rejected == sum(map(len, lost.values()))
    reports = indexing.verify(str(folder), workers=2)
    for cut, report in zip(cuts, reports, strict=True):
        assert report.lost == SAMPLES - len(whole.having(cut, ("png", "txt", "json"))), cut
        assert bool(report.lost) == ("samples lost" in report.problem or "samples damaged" in report.problem), cut
    return reports


@pytest.mark.timeout(60)
def test_every_sample_lost_since_indexing_is_known_and_stays_known(
    whole: Whole, cuts: list[int], indexed: Path
) -> None:
    assert all(report.problem for report in check_what_is_lost(whole, indexed, cuts))
    indexing.index(str(indexed), workers=2)  # of the shards as they are now
    for cut, report in zip(cuts, check_what_is_lost(whole, indexed, cuts), strict=True):
        assert bool(report.problem) != is_complete(whole, cut), cut


@pytest.mark.timeout(30)
def test_what_was_lost_in_two_cuts_is_known_until_the_shard_is_whole_again(whole: Whole, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for cut in (None, whole.end * 2 // 3, whole.end // 3):
        shutil.copy(whole.path, path)
        if cut:
            os.truncate(path, cut)
        indexing.index(str(path), workers=1)
    there = whole.having(whole.end // 3, ("png", "txt"))
    index = ShardIndex([str(path)])
    assert index.keys == there
    assert {entry.key for entry in index.ledger} == {"", *whole.ends} - set(there)
    shutil.copy(whole.path, path)
    assert [(entry.key, "older than the shard" in entry.reason) for entry in ShardIndex([str(path)]).ledger] == [
        ("", True)
    ]
    indexing.index(str(path), workers=1)
    assert not ShardIndex([str(path)]).ledger and not indexing.verify(str(path), workers=1)[0].problem


@pytest.mark.timeout(60)
def test_a_cut_shard_of_img2dataset_is_counted_by_its_statistics(tmp_path: Path) -> None:
    contents = [(name, data) for _, three in itertools.groupby(members(), _key) for name, data in sorted(three)]
    source = write(tmp_path / "whole", contents)
    with tarfile.open(source) as tar:
        ends = [info.offset_data + info.size for info in tar][2::3]  # of each sample's last member
    folder = tmp_path / "shards"
    folder.mkdir()
    cuts = [random.Random(5).randrange(ends[0], ends[-1]) for _ in range(30)]
    for cut in cuts:
        named(folder, cut).write_bytes(source.read_bytes()[:cut])
        Path(f"{str(named(folder, cut)).removesuffix('.tar')}_stats.json").write_text(
            json.dumps({"count": 99, "successes": SAMPLES, "failed_to_download": 59, "status_dict": {}})
        )
    index = ShardIndex([str(named(folder, cut)) for cut in cuts])
    whole = [sum(end <= cut for end in ends) for cut in cuts]
    assert (index.seen, index.rejected) == (SAMPLES * len(cuts), SAMPLES * len(cuts) - sum(whole))
    for report in indexing.verify(str(folder), workers=2):
        assert report.lost == SAMPLES - whole[cuts.index(int(report.shard[-10:-4]))]


def _key(member: tuple[str, bytes]) -> str:
    return member[0].rpartition(".")[0]


class Number(Processor):
    """The number that a picture, or a caption, says."""

    def __init__(self, source: str) -> None:
        self.source = source

    def prepare(self, raw: Any, *, train: bool, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        if self.source == "text":
            return {"x": np.int64(raw.removeprefix("text "))}
        red, green, _ = raw.pixels()[0, 0].tolist()
        return {"x": np.int64(red + 256 * green)}

    def collate(self, items: Sequence[dict[str, np.ndarray]]) -> tuple[Tensor, Tensor | None]:
        return torch.from_numpy(np.stack([item["x"] for item in items])), None


def loader(folder: Path, **options: Any) -> Loader:
    settings = {"batch_size": 16, "train": True, "cache_mb": 0, "ahead": False, "max_error_rate": 0.3}
    return Loader(str(folder), {"image": Number("image"), "text": Number("text")}, **{**settings, **options})


def numbers_of(batches: Any, count: int) -> list[int]:
    """The samples of the next batches; each holds the picture and the caption of its key."""
    found: list[int] = []
    for batch in itertools.islice(batches, count):
        expected = [int(key.rpartition("/")[2]) for key in batch.keys]
        assert batch.inputs["image"].tolist() == batch.inputs["text"].tolist() == expected
        found += expected
    return found


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    """Four shards of 40 samples: 0 to 39, 40 to 79, and so on."""
    return [write(tmp_path / f"{n}.tar", members(SAMPLES * n)) for n in range(4)]


def cut_at_half(path: Path) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.timeout(60)
def test_a_shard_cut_while_it_is_read_is_replaced_sample_by_sample(four: list[Path], workers: int) -> None:
    data = loader(four[0].parent, workers=workers)
    batches = iter(data)
    assert len(set(numbers_of(batches, 10))) == 160
    cut_at_half(four[1])
    after = numbers_of(batches, 30)[-160:]  # an epoch, long after what a worker had made ahead
    whole = set(range(160)) - {int(entry.key.rpartition("/")[2]) for entry in data.ledger}
    assert set(after) <= whole and len(data.ledger) == 160 - len(whole)
    assert 15 <= len(data.ledger) <= 25 and {entry.shard for entry in data.ledger} == {str(four[1])}
    assert all("lost since it was indexed: cut at byte" in entry.reason for entry in data.ledger)


@pytest.mark.timeout(30)
def test_a_shard_cut_while_it_is_read_stops_the_run_over_the_limit(four: list[Path]) -> None:
    batches = iter(loader(four[0].parent, max_error_rate=0.05))
    numbers_of(batches, 10)
    cut_at_half(four[1])
    with pytest.raises(ConfigError, match=r"\d+ of 160 samples cannot be used.*1\.tar: lost since it was indexed"):
        numbers_of(batches, 20)


def rewrite(path: Path) -> None:
    """Other samples in the same file, as `cp` writes them: who has it open sees them."""
    other = write(path.with_suffix(".new"), members(9000, 50)).read_bytes()
    path.write_bytes(other)


def rewrite_alike(path: Path) -> None:
    """Samples of the same keys, at places of their own."""
    members_there = members(SAMPLES)
    write(path, [*members_there[3:], *members_there[:3]])


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (rewrite, "it changed since it was indexed"),
        (rewrite_alike, "it changed since it was indexed"),
        (lambda path: path.write_text("a page of text\n" * 50_000), "lost since it was indexed: no tar file"),
        (lambda path: path.write_bytes(bytes(os.path.getsize(path))), "lost since it was indexed: only zeros"),
        (lambda path: path.write_bytes(b""), "lost since it was indexed: empty file"),
        (lambda path: path.write_bytes(path.read_bytes()[:512] * 2), "lost since it was indexed: "),
    ],
)
@pytest.mark.timeout(30)
def test_a_shard_written_over_while_it_is_read_never_gives_other_bytes(
    four: list[Path], harm: Any, reason: str
) -> None:
    data = loader(four[0].parent)
    batches = iter(data)
    assert len(set(numbers_of(batches, 10))) == 160
    harm(four[1])
    assert set(numbers_of(batches, 10)) <= {*range(40), *range(80, 160)}
    assert {entry.shard for entry in data.ledger} == {str(four[1])}
    assert all(reason in entry.reason for entry in data.ledger)


@pytest.mark.timeout(30)
def test_a_shard_that_is_deleted_or_renamed_over_while_it_is_open_is_read_to_its_end(four: list[Path]) -> None:
    data = loader(four[0].parent)
    batches = iter(data)
    numbers_of(batches, 10)
    four[0].unlink()
    os.replace(write(four[1].with_suffix(".new"), members(9000)), four[1])
    assert sorted(numbers_of(batches, 10)) == list(range(160)) and not data.ledger


@pytest.mark.timeout(30)
def test_a_shard_gone_before_it_is_opened_is_lost_as_a_whole(four: list[Path]) -> None:
    data = loader(four[0].parent)
    four[0].unlink()
    os.replace(write(four[1].with_suffix(".new"), members(9000)), four[1])
    with pytest.raises(ConfigError, match=r"80 of 160 samples cannot be used.*tar: shard cannot be read: "):
        numbers_of(data, 20)
    data = loader(four[2].parent, max_error_rate=0.6)
    four[2].unlink()
    assert set(numbers_of(data, 30)) == {*range(120, 160), *range(9000, 9040)}
    assert [tuple(entry) for entry in data.ledger] == [
        (str(four[2]), "", "shard cannot be read: No such file or directory")
    ]


@pytest.mark.timeout(30)
def test_a_run_whose_shards_are_all_gone_ends_with_the_reason(four: list[Path]) -> None:
    data = loader(four[0].parent, max_error_rate=1.0)
    for path in four:
        path.unlink()
    with pytest.raises(ConfigError, match=r"4 in a row cannot be read; the last, .*\.tar: .*No such file"):
        numbers_of(data, 1)
