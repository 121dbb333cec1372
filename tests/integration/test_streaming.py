"""Exact streaming through `mm train`: the same data in the same order, however it is read, stopped or shared out."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing
from PIL import Image

from mm.adapters.image import ImageProcessor
from mm.data.indexing import index
from mm.data.loader import Loader
from mm.data.order import order_hash
from servers import Fault, http_server, s3_server, s3_upload

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
pytestmark = pytest.mark.timeout(240)


def picture(seed: int, size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(stream, "JPEG", quality=80)
    return stream.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of three shards each: `a` with txt, `b` with json captions and pictures of many shapes."""
    folder = tmp_path_factory.mktemp("data")
    for name in "ab":
        for shard in range(3):
            with tarfile.open(folder / f"{name}-{shard:06d}.tar", "w") as tar:
                for number in range(20 + 7 * shard):
                    seed = 1000 * shard + number + (500 if name == "b" else 0)
                    size = (64, 48) if name == "a" else ((40, 80), (64, 64), (96, 48))[number % 3]
                    about = {"caption": f"a long text {seed} " + "word " * (number % 9), "width": size[0]}
                    parts = {"jpg": picture(seed, size), "json": json.dumps(about).encode()}
                    if name == "a":
                        parts["txt"] = f"text {seed}".encode()
                    for extension, content in parts.items():
                        info = tarfile.TarInfo(f"{name}{seed:06d}.{extension}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return folder


def command(run: Path, train: str, *more: str) -> list[str]:
    flags = ["--data.train", train, "--run.dir", str(run), "--run.steps", str(STEPS), "--checkpoint.every", "2"]
    return [sys.executable, "-m", "mm.train", str(ROOT / "configs/debug.py"), *flags, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "2"}


def train(run: Path, spec: str, *more: str) -> list[dict]:
    result = subprocess.run(
        command(run, spec, *more), env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    return records(run)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def orders(lines: list[dict]) -> list[str]:
    return [line["order"] for line in lines]


MIXED = ("--data.weights", "2::1", "--data.caption", "txt::json.caption")


@pytest.fixture(scope="module")
def mixed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The metrics of an uninterrupted run on a mixture, in the training process."""
    return train(tmp_path_factory.mktemp("runs") / "whole", f"{data}/a-*.tar::{data}/b-*.tar", *MIXED)


@pytest.mark.slow
def test_a_mixture_that_is_killed_and_resumed_with_other_workers_sees_the_same(
    data: Path, mixed: list[dict], tmp_path: Path
) -> None:
    run, spec = tmp_path / "run", f"{data}/a-*.tar::{data}/b-*.tar"
    first = subprocess.Popen(
        command(run, spec, *MIXED, "--data.workers", "2"), env=environment(), stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (run / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    resumed = train(run, spec, *MIXED, "--data.workers", "1")
    assert orders(resumed) == orders(mixed)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in mixed]


@pytest.mark.slow  # two runs that compile for each shape; tests/unit/test_data_buckets.py has the order
@pytest.mark.parametrize("kind", ["aspect", "text"])
def test_buckets_train_and_resume_exactly(data: Path, tmp_path: Path, kind: str) -> None:
    index(f"{data}/b-*.tar")
    options = ("--data.buckets", kind, "--data.caption", "json.caption" if kind == "aspect" else "txt")
    spec = f"{data}/{'b' if kind == 'aspect' else 'a'}-*.tar"
    whole = train(tmp_path / "whole", spec, *options)
    for checkpoint in (tmp_path / "whole/checkpoints").iterdir():
        if checkpoint.name > "step-00000006":
            shutil.rmtree(checkpoint)
    (tmp_path / "whole/latest").write_text("step-00000006\n")
    parts = train(tmp_path / "whole", spec, *options, "--data.workers", "2")
    assert len(parts) == len(whole) == STEPS
    assert orders(parts) == orders(whole)
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]


@pytest.mark.slow
def test_training_from_http_and_s3_equals_training_from_files(data: Path, tmp_path: Path) -> None:
    local = train(tmp_path / "local", f"{data}/a-*.tar")
    with http_server(data) as server:
        spec = f"{server.url}/a-{{000000..000002}}.tar"
        far = train(tmp_path / "http", spec, "--data.workers", "2")
        assert orders(far) == orders(local)
        assert [line["loss"] for line in far] == [line["loss"] for line in local]
        whole = sum(path.stat().st_size for path in data.glob("a-*.tar"))
        sent = sum(server.sent(f"/{path.name}") for path in data.glob("a-*.tar"))
        assert sent == 2 * whole  # once to index, once to train; two workers and two epochs share one copy
    with s3_server():
        bucket = s3_upload("shards", data)
        assert orders(train(tmp_path / "s3", f"{bucket}/a-*.tar")) == orders(local)


@pytest.mark.slow
def test_a_shard_whose_server_stalls_or_loses_it_is_named_and_training_goes_on(data: Path, tmp_path: Path) -> None:
    with http_server(data) as server:
        spec = f"{server.url}/a-{{000000..000002}}.tar"
        options = ("--data.stall_seconds", "0.3", "--data.max_error_rate", "0.9", "--run.steps", "3")
        train(tmp_path / "first", spec, *options)
        shutil.rmtree(tmp_path / "cache/shards")  # its index is known, its bytes must be fetched again
        server.faults = {"/a-000000.tar": Fault(stall_after=5000), "/a-000001.tar": Fault(status=404)}
        train(tmp_path / "run", spec, *options)
        ledger = [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
        reasons = {entry["shard"].rpartition("/")[2]: entry["reason"] for entry in ledger if not entry["key"]}
        assert "stalled" in reasons["a-000000.tar"] and "404 not found" in reasons["a-000001.tar"]
        assert records(tmp_path / "run")[-1]["unusable"] == 2
        server.faults["/a-000002.tar"] = Fault(status=404)
        shutil.rmtree(tmp_path / "cache/shards")
        result = subprocess.run(
            command(tmp_path / "none", spec, *options), env=environment(), capture_output=True, text=True, check=False
        )
        assert result.returncode == 2 and "404 not found" in result.stderr and "cannot be" in result.stderr


class Process:
    """One rank of some: reads its slices, and with the others' keys makes the hash of the global batches."""

    def __init__(self, spec: str, world: int, workers: int, folder: Path) -> None:
        self.spec, self.world, self.workers, self.folder = spec, world, workers, folder

    def __call__(self, rank: int) -> None:
        import torch.distributed as dist

        store = f"file://{self.folder}/store-{self.world}-{self.workers}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=self.world)
        processors = {"image": ImageProcessor(16)}
        options = {"batch_size": 24, "seed": 3, "train": True, "shuffle_block": 32}
        loader = Loader(self.spec, processors, **options, rank=rank, world=self.world, workers=self.workers)
        order = ""
        for batch, _ in zip(loader, range(12), strict=False):
            gathered: list[list[str]] = [[] for _ in range(self.world)]
            dist.all_gather_object(gathered, batch.keys)
            order = order_hash(order, [key for keys in gathered for key in keys])
        (self.folder / f"{self.world}-{self.workers}-{rank}").write_text(order)
        dist.destroy_process_group()


@pytest.mark.slow
def test_one_two_and_four_processes_see_the_same_global_batches(data: Path, tmp_path: Path) -> None:
    for world, workers in ((1, 0), (2, 1), (4, 0)):
        job = Process(f"{data}/a-*.tar", world, workers, tmp_path)
        torch.multiprocessing.start_processes(job, nprocs=world, start_method="spawn")
    found = {path.read_text() for path in tmp_path.iterdir() if not path.name.startswith("store")}
    assert len(found) == 1 and len(next(iter(found))) == 16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fetched shards and indexes of one test are no other's."""
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    yield
