"""Shards that are cut, written over, replaced or deleted while a run reads them: nothing wrong is ever served."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.adapters.base import Processor
from mm.config import ConfigError
from mm.data.indexing import index
from mm.data.loader import Loader
from tars import SAMPLES, members, write

pytestmark = pytest.mark.timeout(60)


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


def test_a_member_that_came_after_the_index_and_is_ignored_is_in_the_ledger(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", members())
    index(str(tmp_path), workers=1)
    write(shard, [*members(), members()[2 * 3]])  # all samples are where they were
    entries = [entry for entry in loader(tmp_path).ledger if entry.key]
    assert [(entry.key, entry.reason) for entry in entries] == [("00002", "second member 00002.png ignored")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_while_it_is_read_is_replaced_sample_by_sample(four: list[Path], workers: int) -> None:
    data = loader(four[0].parent, workers=workers, max_consecutive_errors=8)  # fewer than are lost in a row
    batches = iter(data)
    assert len(set(numbers_of(batches, 10))) == 160
    cut_at_half(four[1])
    after = numbers_of(batches, 30)[-160:]  # an epoch, long after what a worker had made ahead
    whole = set(range(160)) - {int(entry.key.rpartition("/")[2]) for entry in data.ledger}
    assert set(after) <= whole and len(data.ledger) == 160 - len(whole)
    assert 15 <= len(data.ledger) <= 25 and {entry.shard for entry in data.ledger} == {str(four[1])}
    assert all("lost since it was indexed: cut at byte" in entry.reason for entry in data.ledger)


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


def rewrite_and_cut(path: Path) -> None:
    rewrite(path)
    cut_at_half(path)


def rewrite_alike(path: Path) -> None:
    """Samples of the same keys, at places of their own."""
    contents = members(SAMPLES)
    write(path, [*contents[3:], *contents[:3]])


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (rewrite, "it changed since it was indexed"),
        (rewrite_and_cut, "it changed since it was indexed"),
        (rewrite_alike, "it changed since it was indexed"),
        (lambda path: path.write_text("a page of text\n" * 50_000), "lost since it was indexed: no tar file"),
        (lambda path: path.write_bytes(bytes(os.path.getsize(path))), "lost since it was indexed: only zeros"),
        (lambda path: path.write_bytes(b""), "lost since it was indexed: empty file"),
        (lambda path: path.write_bytes(path.read_bytes()[:512] * 2), "lost since it was indexed: "),
    ],
)
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


def test_a_shard_that_is_deleted_or_renamed_over_while_it_is_open_is_read_to_its_end(four: list[Path]) -> None:
    data = loader(four[0].parent)
    batches = iter(data)
    numbers_of(batches, 10)
    four[0].unlink()
    os.replace(write(four[1].with_suffix(".new"), members(9000)), four[1])
    assert sorted(numbers_of(batches, 10)) == list(range(160)) and not data.ledger


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


def test_a_run_whose_shards_are_all_gone_ends_with_the_reason(four: list[Path]) -> None:
    data = loader(four[0].parent, max_error_rate=1.0)
    for path in four:
        path.unlink()
    with pytest.raises(ConfigError, match=r"4 in a row cannot be read; the last, .*\.tar: .*No such file"):
        numbers_of(data, 1)
