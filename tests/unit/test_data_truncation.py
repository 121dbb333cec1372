"""A tar cut anywhere, before it is indexed or after: found, its lost samples counted, the others served."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from mm.data import indexing
from mm.data.index import ShardIndex
from mm.data.reader import Reader
from tars import SAMPLES, members, write

CUTS = 200
pytestmark = pytest.mark.timeout(60)


class Whole(NamedTuple):
    """A complete shard, where the bytes of each sample's parts end, and where the last member does, padded."""

    path: Path
    ends: dict[str, dict[str, int]]  # key -> extension -> byte
    contents: dict[str, bytes]
    end: int

    def having(self, cut: int, extensions: Sequence[str]) -> list[str]:
        """Keys of samples of which these parts lie before a cut."""
        return [key for key, ends in self.ends.items() if all(ends[extension] <= cut for extension in extensions)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    path = write(tmp_path_factory.mktemp("whole") / "whole.tar", members())
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


def test_every_cut_of_a_shard_never_indexed_is_found_and_what_lies_before_is_served(
    whole: Whole, cuts: list[int], never_indexed: Path
) -> None:
    assert len(cuts) >= CUTS
    index = check_what_is_served(whole, never_indexed, cuts)
    found = {entry.shard: entry.reason for entry in index.ledger if not entry.key}
    for cut in cuts:
        if not is_complete(whole, cut):
            assert ("cut at byte" if cut else "empty file") in found[str(named(never_indexed, cut))], cut


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


def test_every_sample_lost_since_indexing_is_known_and_stays_known(
    whole: Whole, cuts: list[int], indexed: Path
) -> None:
    assert all(report.problem for report in check_what_is_lost(whole, indexed, cuts))
    indexing.index(str(indexed), workers=2)  # of the shards as they are now
    for cut, report in zip(cuts, check_what_is_lost(whole, indexed, cuts), strict=True):
        assert bool(report.problem) != is_complete(whole, cut), cut


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


def test_a_sample_cut_in_two_counts_whatever_happens_to_its_shard_next(whole: Whole, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    shutil.copy(whole.path, path)
    indexing.index(str(path), workers=1)
    os.truncate(path, whole.ends["00021"]["txt"] - 1)  # after its picture
    lost = SAMPLES - len(whole.having(path.stat().st_size, ("png", "txt", "json")))
    for _ in range(2):
        assert indexing.verify(str(path), workers=1)[0].lost == lost
        assert indexing.index(str(path), workers=1)[0].lost == lost
        os.utime(path)
    with path.open("r+b") as file:
        file.seek(whole.ends["00001"]["png"] - 20)
        file.write(b"flip")
    report = indexing.verify(str(path), workers=1)[0]
    assert report.lost == lost + 1 and "2 samples damaged (00001, 00021)" in report.problem


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
