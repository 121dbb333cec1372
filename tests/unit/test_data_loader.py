from __future__ import annotations

import gc
import io
import itertools
import tarfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mm.adapters.base import Processor
from mm.config import ConfigError
from mm.data import decode
from mm.data.loader import Loader
from mm.data.reader import read_captions
from mm.types import Batch


class Picture(Processor):
    """The pixels, in training with one noise value added, which shows the random stream."""

    source = "image"

    def prepare(self, raw: Any, *, train: bool, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        noise = rng.integers(0, 255) if train and rng is not None else 0
        return {"x": raw.crop((0, 0, *raw.size), (8, 8)) ^ np.uint8(noise)}

    def collate(self, items: Sequence[dict[str, np.ndarray]]) -> tuple[Tensor, Tensor | None]:
        return torch.from_numpy(np.stack([item["x"] for item in items])), None


class Letters(Processor):
    source = "text"

    def prepare(self, raw: Any, *, train: bool, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        if raw == "refuse":
            raise ValueError("refused by the processor")
        return {"x": np.frombuffer(raw.encode(), dtype=np.uint8)}

    def collate(self, items: Sequence[dict[str, np.ndarray]]) -> tuple[Tensor, Tensor | None]:
        padded = np.zeros((len(items), 100), dtype=np.int64)
        for row, item in zip(padded, items, strict=True):
            row[: len(item["x"])] = item["x"]
        return torch.from_numpy(padded), torch.tensor([len(item["x"]) for item in items])


PROCESSORS: dict[str, Processor] = {"image": Picture(), "text": Letters(), "view": Picture()}


def loader(spec: object, **options: Any) -> Loader:
    return Loader(str(spec), PROCESSORS, **{"batch_size": 24, "seed": 1, "train": True, **options})


def take(data: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(data, count))


def same(left: Batch, right: Batch) -> bool:
    tensors = [{"seeds": b.seeds, **b.inputs, **{f"{n}/len": t for n, t in b.lengths.items()}} for b in (left, right)]
    equal = tensors[0].keys() == tensors[1].keys() and all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())
    return left.keys == right.keys and equal


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def plain(count: int) -> dict[str, dict[str, bytes]]:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    return {f"k{i:03d}": {"png": stream.getvalue(), "txt": f"text {i}".encode()} for i in range(count)}


def test_batches_do_not_depend_on_workers(openmoji_shards: Path) -> None:
    state = torch.get_rng_state()
    spec = openmoji_shards / "train-*.tar"
    reference = take(loader(spec, caption="txt,json.aliases", shuffle_block=32), 15)  # over one epoch of 250
    for workers in (1, 2):
        got = take(loader(spec, caption="txt,json.aliases", shuffle_block=32, workers=workers), 15)
        assert all(map(same, reference, got)) and len(got) == 15
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("train", [True, False])
def test_ranks_share_out_the_same_global_batches(openmoji_shards: Path, train: bool) -> None:
    spec = openmoji_shards / "train-*.tar"
    reference = take(loader(spec, train=train), 8 if train else 100)
    ranks = [take(loader(spec, train=train, rank=rank, world=3), len(reference)) for rank in range(3)]
    assert len(reference) == len(ranks[0]) == len(ranks[2])
    for whole, *parts in zip(reference, *ranks, strict=True):
        assert whole.keys == [key for part in parts for key in part.keys]
        assert torch.equal(whole.seeds, torch.cat([part.seeds for part in parts]))
        filled = [part.inputs["image"] for part in parts if part.keys]
        assert torch.equal(whole.inputs["image"], torch.cat(filled))


def test_a_later_start_continues_the_same_stream(openmoji_shards: Path) -> None:
    spec = openmoji_shards / "train-*.tar"
    assert all(map(same, take(loader(spec), 30)[13:], take(loader(spec, start=13), 17)))


def test_a_sample_looks_different_in_each_epoch_and_run(openmoji_shards: Path) -> None:
    spec = openmoji_shards / "val-*.tar"
    data = loader(spec, batch_size=1)
    seen = [(batch.keys[0], int(batch.seeds[0])) for batch in take(data, 2 * data.samples)]
    assert sorted(k for k, _ in seen[: data.samples]) == sorted(data.index.keys)
    assert len(set(seen)) == 2 * data.samples
    assert {int(b.seeds[0]) for b in take(loader(spec, batch_size=1, seed=2), data.samples)}.isdisjoint(
        s for _, s in seen
    )


def test_two_inputs_from_one_picture_have_their_own_randomness(openmoji_shards: Path) -> None:
    batch = take(loader(openmoji_shards / "train-*.tar"), 1)[0]
    assert not torch.equal(batch.inputs["image"], batch.inputs["view"])


def test_evaluation_is_one_pass_in_order_without_randomness(openmoji_shards: Path) -> None:
    data = loader(openmoji_shards / "train-*.tar", train=False, caption="txt,json.aliases")
    batches = list(data)
    assert [key for batch in batches for key in batch.keys] == data.index.keys
    assert len(batches) == data.batches and 0 < len(batches[-1]) == data.samples % 24
    keys, captions, _ = read_captions(data.index)
    first = batches[0].inputs["text"][0, : batches[0].lengths["text"][0]]
    assert bytes(first.tolist()).decode() == captions[0] and keys == data.index.keys
    assert len(read_captions(data.index, data.captions, every=True)[1]) > len(captions)


def test_aliases_are_drawn_half_of_the_time(tmp_path: Path) -> None:
    samples = {
        key: {**parts, "txt": b"name", "json": b'{"aliases": ["one", "two"]}'} for key, parts in plain(100).items()
    }
    batches = take(loader(write(tmp_path / "x.tar", samples), caption="txt,json.aliases", batch_size=100), 20)
    words = [bytes(r[:n].tolist()) for b in batches for r, n in zip(b.inputs["text"], b.lengths["text"], strict=True)]
    assert set(words) == {b"name", b"one", b"two"}
    assert abs(words.count(b"name") / 2000 - 0.5) < 0.05  # four standard deviations
    assert abs(words.count(b"one") / 2000 - 0.25) < 0.04


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unusable_sample_is_replaced_and_entered_in_the_ledger(tmp_path: Path, workers: int) -> None:
    samples = plain(100)
    samples["k010"]["png"] = samples["k010"]["png"][:50]
    samples["k011"]["txt"] = b"\xff"
    samples["k050"]["txt"] = b"refuse"
    data = loader(write(tmp_path / "x.tar", samples), batch_size=20, workers=workers)
    keys = [key for batch in take(data, 10) for key in batch.keys]
    assert len(keys) == 200 and {"k010", "k011", "k050"}.isdisjoint(keys)
    assert (keys.count("k012"), keys.count("k051"), keys.count("k013")) == (6, 4, 2)
    reasons = {entry.key: entry.reason for entry in data.ledger}
    assert len(data.ledger) == 3 and "image" in reasons["k010"] and "UTF-8" in reasons["k011"]
    assert reasons["k050"] == "refused by the processor"


def test_evaluation_leaves_an_unusable_sample_out(tmp_path: Path) -> None:
    samples = plain(100)
    samples["k010"]["png"] = b"broken"
    data = loader(write(tmp_path / "x.tar", samples), train=False)
    assert [key for batch in data for key in batch.keys] == [key for key in data.index.keys if key != "k010"]
    assert [entry.key for entry in data.ledger] == ["k010"]


def test_too_many_unusable_samples_stop_the_run(tmp_path: Path) -> None:
    samples = plain(100)
    for i in range(6):
        samples[f"k{i * 9:03d}"]["png"] = b"broken"
    path = write(tmp_path / "x.tar", samples)
    with pytest.raises(ConfigError, match=r"6 of 100 samples cannot be used, over data.max_error_rate = 0.05"):
        take(loader(path, batch_size=50), 3)
    assert len(take(loader(path, batch_size=50, max_error_rate=0.06), 10)) == 10
    for parts in samples.values():
        parts["png"] = b"broken"
    with pytest.raises(ConfigError, match=r"100 samples in a row cannot be used"):
        take(loader(write(tmp_path / "y.tar", samples)), 1)
    for i in range(20):  # known from the index alone
        del samples[f"k{i:03d}"]["txt"]
    with pytest.raises(ConfigError, match=r"20 of 100 samples cannot be used"):
        loader(write(tmp_path / "z.tar", samples))


class Broken(Letters):
    def prepare(self, raw: Any, *, train: bool, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        raise ZeroDivisionError("a bug, not bad data")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.timeout(60)
def test_an_error_in_the_background_reaches_the_consumer(tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "x.tar", plain(10))
    with pytest.raises(ZeroDivisionError, match=r"a bug"):
        next(iter(Loader(path, {"text": Broken()}, batch_size=4, seed=0, train=True, workers=workers)))


@pytest.mark.timeout(60)
def test_the_thread_ends_with_its_iterator(openmoji_shards: Path) -> None:
    before = set(threading.enumerate())
    iterator = iter(loader(openmoji_shards / "train-*.tar"))
    next(iterator)
    assert [thread.name for thread in set(threading.enumerate()) - before] == ["mm-data"]
    time.sleep(0.2)  # the queue is full: the thread waits inside put
    del iterator
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_a_sample_is_decoded_once_where_it_fits_in_memory(
    openmoji_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    original = decode.picture

    def counted(data: bytes) -> decode.Picture:
        decoded.append(len(data))
        return original(data)

    monkeypatch.setattr(decode, "picture", counted)
    data = loader(openmoji_shards / "train-*.tar", batch_size=1)
    batches = [data._batches[n] for n in range(3 * data.samples)]
    assert len(decoded) == data.samples
    small = loader(openmoji_shards / "train-*.tar", batch_size=1, cache_mb=0)
    assert all(same(made.batch, small._batches[n].batch) for n, made in enumerate(batches))
    assert len(decoded) == 4 * data.samples


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": 10, "world": 4}, "batch_size: 10 .* use 8"),
        ({"workers": -1}, "workers: -1"),
        ({"rank": 2, "world": 2}, "rank: 2"),
        ({"caption": "xml"}, "caption = 'xml'"),
        ({"max_error_rate": 2}, "max_error_rate: 2"),
        ({"shuffle_block": 0}, "shuffle_block: 0"),
        ({"start": -1}, "start"),
    ],
)
def test_impossible_settings_name_the_field(openmoji_shards: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        loader(openmoji_shards / "train-*.tar", **options)
