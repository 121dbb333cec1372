"""A third modality costs one file: the one on docs/adapters.md, word for word, trained, resumed, loaded, refused."""

from __future__ import annotations

import io
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

import mm
from mm import config as settings
from mm.config import TrainConfig
from mm.data.build import openmoji
from mm.data.tar import File, Scan, open_file
from mm.evaluation.run import evaluate, summary
from mm.interop.start import resolve
from mm.objectives.step import build_step
from mm.training import prepare
from mm.training.loop import run
from runs import records, same
from tars import write

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
EXAMPLE, CONFIG = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
PAIRS = ("image-text", "image-depth", "text-depth")


def with_depth(shard: Path, out: Path) -> None:
    """The shard once more, with a grey negative of each picture as its depth."""
    source = File(open_file(str(shard)))
    parts = [(found.name, source.read(found.offset, found.size)) for found in Scan(source)]
    for name, data in list(parts):
        if name.endswith(".png"):
            stream = io.BytesIO()
            ImageOps.invert(Image.open(io.BytesIO(data)).convert("L")).save(stream, "PNG")
            parts.append((name.replace(".png", ".depth.png"), stream.getvalue()))
    write(out, sorted(parts))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with depth.py, which is on the path, and shards/."""
    folder = tmp_path_factory.mktemp("depth")
    openmoji(folder / "plain", size=32, per_shard=32, progress=False, limit=48)
    (folder / "shards").mkdir()
    for shard in (folder / "plain").glob("*.tar"):
        with_depth(shard, folder / "shards" / shard.name)
    (folder / "depth.py").write_text(EXAMPLE, encoding="utf-8")
    (folder / "config.py").write_text(CONFIG.replace("configs/debug.py", str(ROOT / "configs/debug.py")))
    sys.path.insert(0, str(folder))
    rate, prepare.matrix_rate = prepare.matrix_rate, lambda *_: 1e9  # measuring takes seconds; only mfu follows from it
    yield folder
    prepare.matrix_rate = rate
    sys.path.remove(str(folder))
    sys.modules.pop("depth", None)


def config(work: Path, name: str) -> TrainConfig:
    """The page's, with what a command line would replace."""
    flags = {"data.train": work / "shards" / "train-*.tar", "run.dir": work / name, "run.steps": 12, "optim.lr": 3e-3}
    flags |= {"checkpoint.every": 4, "checkpoint.background": False, "parallel.threads": 1}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    made = settings.override(settings.load(work / "config.py"), words)
    settings.validate(made)
    return made


@pytest.fixture(scope="module")
def finished(work: Path) -> Path:
    run(config(work, "whole"))
    return work / "whole"


def test_the_example_is_one_file_of_forty_lines() -> None:
    assert len(EXAMPLE.rstrip().splitlines()) <= 40


def test_every_pair_learns(finished: Path) -> None:
    lines = records(finished)
    for pair in PAIRS:
        losses = [line[f"loss/contrastive/{pair}"] for line in lines]
        assert mean(losses[-5:]) < mean(losses[:5]) - 0.1, pair
    last = lines[-1]
    assert last["loss/contrastive"] == pytest.approx(mean(last[f"loss/contrastive/{pair}"] for pair in PAIRS))


class Breaks:
    """A callback that ends the run as a bug would."""

    every = 5

    def part(self, context: object) -> object:
        raise RuntimeError("broken off")


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(work: Path, finished: Path) -> None:
    with pytest.raises(RuntimeError, match="broken off"):
        run(config(work, "resumed"), lambda _: [Breaks()])  # type: ignore[list-item]
    run(config(work, "resumed"))
    assert same(work / "resumed", finished)


def test_the_loaded_model_encodes_it(work: Path, finished: Path) -> None:
    model = mm.load(finished)
    with tarfile.open(work / "shards" / "train-000000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".depth.png")][:3]
        raw = [tar.extractfile(name).read() for name in names]  # type: ignore[union-attr]
    pictures = [Image.open(io.BytesIO(data)) for data in raw]
    found = model.encode(depth=raw, text=["cat"])
    assert found["depth"].shape == (3, 32) and torch.equal(found["depth"], model.encode(depth=pictures)["depth"])
    assert torch.equal(found["depth"][1:2], model.encode(depth=raw[1:2])["depth"])  # alike, whatever else is there
    with pytest.raises(ValueError, match=r"depth\[1\]: not a JPEG, PNG or WebP image"):
        model.encode(depth=[raw[0], b"no picture"])


def test_evaluation_measures_retrieval_between_every_two(work: Path, finished: Path) -> None:
    result = evaluate(finished, data=str(work / "shards" / "train-*.tar"), tasks=["retrieval"], precision="fp32")
    found = result["retrieval"]["modalities"]
    assert found["pairs"] == result["held_out"] > 40
    chance = 1 / found["pairs"]
    for one, other in (("image", "depth"), ("depth", "image"), ("text", "depth"), ("depth", "text")):
        assert found[f"{one}_to_{other}@5"] > 5 * chance, (one, other)
    plain = evaluate(finished, data=str(work / "plain" / "val-*.tar"), tasks=["retrieval"])  # without the member
    assert plain["retrieval"]["modalities"] == {"pairs": 0} and summary(plain)


def test_another_run_may_start_from_it(work: Path, finished: Path) -> None:
    made = config(work, "next")
    made.start.model = str(finished)
    start = resolve(made)
    assert start.tokenizer is not None
    step = build_step(made, start.tokenizer)
    assert "image and text and denoiser and depth from" in start.fill(step)[0]
    theirs, ours = mm.load(finished).inference.model.state_dict(), step.model.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


REFUSED_THEN_LOADED = """
import os, sys, mm
sys.path.append(sys.argv[2])
try:
    mm.load(sys.argv[1])
except ValueError as error:
    print(error, "depth" in sys.modules)
os.environ["MM_IMPORT"] = "other,depth"
print(mm.load(sys.argv[1]).encode(text=["cat"])["text"].shape, "depth" in sys.modules)
"""


def test_loading_imports_no_code_that_a_folder_names(
    finished: Path, work: Path, run_python: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MM_IMPORT", raising=False)
    done = run_python("-c", REFUSED_THEN_LOADED, str(finished), str(work))
    refused, loaded = done.stdout.splitlines() or [done.stderr, ""]
    assert "module depth is not imported" in refused and "import depth first, or set MM_IMPORT=depth" in refused
    assert refused.endswith("False") and loaded == "torch.Size([1, 32]) True"
