"""Runs that begin with another library's model: what is frozen stays, the rest moves, and the result is of use."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_clips import tiny_clip

import mm
from mm.config import (
    AdaptConfig,
    DataConfig,
    DenoiserConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    StartConfig,
    TrainConfig,
    validate,
)
from mm.data.build import openmoji
from mm.interop.release import release
from mm.interop.sources import read
from mm.interop.start import resolve
from mm.training.loop import run

STEPS = 50


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    openmoji(folder, size=32, per_shard=64, progress=False, limit=160)
    return str(folder / "train-*.tar")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("clip"))[1]


def trained(folder: Path, shards: str, start: StartConfig, adapt: AdaptConfig) -> list[dict[str, Any]]:
    config = TrainConfig(
        run=RunConfig(dir=str(folder), steps=STEPS, log_every=1),
        data=DataConfig(train=shards, batch_size=16),
        model=ModelConfig(denoiser=DenoiserConfig(patch=8, width=64, depth=2, heads=2)),
        start=start,
        adapt=adapt,
        optim=OptimConfig(lr=1e-3, warmup=5),
        parallel=ParallelConfig(precision="fp32", compile=False, device="cpu"),
    )
    begin = resolve(config)
    validate(config)
    run(config, start=begin)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fell(lines: list[dict[str, Any]], name: str) -> bool:
    return mean(line[name] for line in lines[-10:]) < mean(line[name] for line in lines[:5])


def moved(folder: Path, source: str, prefix: str) -> list[bool]:
    before, after = read(source).tensors, read(folder).tensors
    names = [name for name in before if name.startswith(prefix) and before[name].is_floating_point()]
    assert names
    return [not torch.equal(before[name], after[name]) for name in names]


def useful(folder: Path, out: Path) -> None:
    """The result classifies, draws, and is released and read back."""
    model = mm.load(folder)
    picture = model.generate(["red heart"], seeds=[0], steps=2)[0]
    assert isinstance(picture, Image.Image)
    shares = model.classifier(["red heart", "pizza"])([picture])
    assert torch.isfinite(shares).all()
    release(str(folder), out / "mm")
    again = mm.load(out / "mm").encode(text=["pizza"], image=[picture])
    for name, vector in model.encode(text=["pizza"], image=[picture]).items():
        assert torch.equal(vector, again[name])


def test_a_locked_image_tower_stays_and_the_rest_learns(clip: str, shards: str, tmp_path: Path) -> None:
    """LiT (arXiv 2111.07991), and diffusion beside it."""
    folder = tmp_path / "run"
    lines = trained(folder, shards, StartConfig(model=clip), AdaptConfig(image="locked"))
    assert not any(moved(folder, clip, "encoders.image.") + moved(folder, clip, "adapters.image."))
    assert all(moved(folder, clip, "encoders.text."))
    assert fell(lines, "loss/contrastive")
    assert fell(lines, "loss/diffusion")
    useful(folder, tmp_path)


@pytest.mark.slow
def test_both_objectives_go_on_from_an_imported_clip(clip: str, shards: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lines = trained(folder, shards, StartConfig(model=clip), AdaptConfig())
    assert all(moved(folder, clip, "encoders."))
    assert fell(lines, "loss/contrastive")
    assert fell(lines, "loss/diffusion")
    useful(folder, tmp_path)
    release(str(folder), tmp_path / "oc", format="open_clip")
    theirs = read(f"open_clip:local-dir:{tmp_path / 'oc'}").tensors
    ours = read(folder).tensors
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
