"""Members that no index knows (`KEY.depth.png`): read as bytes, in an exact order, from shards indexed before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.adapters.base import Processor
from mm.config import ConfigError
from mm.data import members as members_file
from mm.data.indexing import index
from mm.data.loader import Loader
from mm.types import Batch
from tars import header, member, png, write

COUNT = 60


class Bytes(Processor):
    """The number in a member, in training with noise, which shows the random stream."""

    def __init__(self, source: str) -> None:
        self.source = source

    def prepare(self, raw: Any, *, train: bool, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        assert isinstance(raw, bytes)
        noise = rng.integers(0, 255) if train and rng is not None else 0
        return {"x": np.array([int(raw), noise])}

    def collate(self, items: Sequence[dict[str, np.ndarray]]) -> tuple[Tensor, Tensor | None]:
        return torch.from_numpy(np.stack([item["x"] for item in items])), None


def sample(number: int, order: Sequence[str]) -> list[tuple[str, bytes]]:
    """One sample; every fifth has a name that needs headers of its own."""
    key = f"{number:05d}" if number % 5 else f"{'long/' * 30}{number:05d}"
    parts = {"png": png(number), "txt": b"text", "Depth.bin": b"%d" % number, "mask.bin": b"%d" % -number}
    return [(f"{key}.{name}", parts[name]) for name in order]


SORTED, LATE = ("Depth.bin", "mask.bin", "png", "txt"), ("txt", "png", "mask.bin", "Depth.bin")


def shards(folder: Path, order: Sequence[str] = SORTED, count: int = COUNT) -> Path:
    half = count // 2
    for name, numbers in (("a", range(half)), ("b", range(half, count))):
        write(folder / f"{name}.tar", list(itertools.chain(*(sample(number, order) for number in numbers))))
    return folder


def loader(spec: Path, **options: Any) -> Loader:
    processors: dict[str, Processor] = {"depth": Bytes("depth.bin"), "mask": Bytes("mask.bin")}
    return Loader(str(spec), processors, **{"batch_size": 12, "seed": 1, "train": True, **options})


def flat(batches: list[Batch]) -> tuple[list[str], Tensor, Tensor]:
    keys = [key for batch in batches for key in batch.keys]
    depth, mask = (torch.cat([b.inputs[name] for b in batches if b.keys]) for name in ("depth", "mask"))
    return keys, depth, mask


@pytest.mark.parametrize("order", [SORTED, LATE, ("png", "Depth.bin", "txt", "mask.bin")])
def test_each_sample_has_its_own_members_wherever_they_lie(tmp_path: Path, order: Sequence[str]) -> None:
    keys, depth, mask = flat(list(itertools.islice(loader(shards(tmp_path, order)), 10)))
    assert len(set(keys)) == COUNT
    assert depth[:, 0].tolist() == (-mask[:, 0]).tolist() == [int(key.rpartition("/")[2]) for key in keys]


def test_members_do_not_depend_on_workers_ranks_or_resume(tmp_path: Path) -> None:
    spec = shards(tmp_path)
    keys, *tensors = flat(list(itertools.islice(loader(spec), 8)))
    assert not torch.equal(tensors[0][:, 1], tensors[1][:, 1])  # each input has its own random stream
    worked = flat(list(itertools.islice(loader(spec, workers=2), 8)))
    resumed = flat(list(itertools.islice(loader(spec), 3)) + list(itertools.islice(loader(spec, start=3), 5)))
    ranks = [list(itertools.islice(loader(spec, rank=rank, world=3), 8)) for rank in range(3)]
    shared = flat([part for parts in zip(*ranks, strict=True) for part in parts])
    for other_keys, *other in (worked, resumed, shared):
        assert other_keys == keys and all(map(torch.equal, tensors, other))


def test_an_index_from_before_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = shards(tmp_path)
    index(str(spec))
    looked: list[str] = []
    scan = members_file.Scan

    class Counted(scan):
        def __iter__(self) -> Any:
            for found in super().__iter__():
                looked.append(found.name)
                yield found

    monkeypatch.setattr(members_file, "Scan", Counted)
    data = loader(spec, train=False, cache_mb=0)
    assert flat(list(data))[1][:, 0].tolist() == list(range(COUNT))
    assert len(looked) <= 5 * COUNT  # headers near a sample, not the whole shard for each


def test_members_between_those_of_other_samples_are_found(tmp_path: Path) -> None:
    first, second = sample(1, ("png", "Depth.bin", "mask.bin", "txt")), sample(2, LATE)
    write(tmp_path / "x.tar", [*first[:2], *second, *first[2:]])
    keys, depth, _ = flat(list(loader(tmp_path, train=False)))
    assert keys == ["00001", "00002"] and depth[:, 0].tolist() == [1, 2]


def test_a_sample_without_its_member_is_replaced_and_entered_in_the_ledger(tmp_path: Path) -> None:
    parts = list(itertools.chain(*(sample(number, SORTED) for number in range(COUNT))))
    write(tmp_path / "x.tar", [part for part in parts if part[0] != "00007.Depth.bin"])
    data = loader(tmp_path)
    keys = flat(list(itertools.islice(data, 5)))[0]
    assert "00007" not in keys and keys.count("00008") == 2
    assert [(entry.key, entry.reason) for entry in data.ledger] == [("00007", "no depth.bin beside its other members")]
    data = loader(tmp_path, train=False)
    assert len(flat(list(data))[0]) == COUNT - 1 and len(data.ledger) == 1


def test_a_member_that_is_a_link_or_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = b"".join(member(name, data) for name, data in sample(1, ("png", "txt", "mask.bin")))
    rest2 = b"".join(member(name, data) for name, data in sample(2, SORTED))
    (tmp_path / "x.tar").write_bytes(header("00001.depth.bin", kind=b"2") + rest + rest2 + bytes(1024))
    monkeypatch.setattr(members_file, "LARGEST", 2)
    data = loader(tmp_path, train=False, max_error_rate=1, batch_size=2)
    assert flat(list(data))[0] == ["00002"]
    assert [entry.reason for entry in data.ledger if entry.key] == ["depth.bin: symbolic link"]
    monkeypatch.setattr(members_file, "LARGEST", 0)
    data = loader(tmp_path, train=False, max_error_rate=1, batch_size=2)
    assert not [batch for batch in data if batch.keys]
    assert "depth.bin: 1 bytes is over the limit of 0" in [entry.reason for entry in data.ledger]


def test_a_source_that_no_member_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"processor 'depth': source 'Depth.PNG' must be .* such as 'depth.png'"):
        Loader(str(shards(tmp_path)), {"depth": Bytes("Depth.PNG")}, batch_size=4, train=True)
