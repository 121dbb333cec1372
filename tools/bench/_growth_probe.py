"""One point of a curve in a process of its own: `python _growth_probe.py KIND REQUEST` prints JSON, seconds and bytes.

KIND: "step" (a training step), "attention", "labels" (classifying among so many), "texts" (encoding labels) or
"shards" (opening). Bytes of the first three are the peak of torch's CPU allocator within the work, above what was held
before it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROUNDS = 3
E = 128  # width of an embedding


def timed(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median of so many calls, after one that is not counted."""
    seconds = []
    work()
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def watched(work: Callable[[], object]) -> int:
    """Peak bytes of torch's allocator in one call, above those at its start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    total = peak = 0
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def step(batch: int, size: int, accumulate: int, joint: bool) -> dict[str, float]:
    """A step of configs/demo.py's model at `size` pixels, eager, captions of 7 tokens in the mean."""
    import torch

    from mm.config import DiffusionConfig, ObjectivesConfig, OptimConfig, TrainConfig
    from mm.distributed.device import autocast
    from mm.models.presets import tiny
    from mm.objectives.step import build_step
    from mm.training.optim import Optimizers
    from mm.types import Batch

    torch.manual_seed(0)
    model = tiny()
    model.image.size = size
    if not joint:
        model.denoiser = None
    objectives = ObjectivesConfig(diffusion=DiffusionConfig(share=0.5) if joint else None)
    config = TrainConfig(model=model, objectives=objectives, optim=OptimConfig(name="muon", accumulate=accumulate))
    vocabulary: Any = types.SimpleNamespace(vocab_size=model.text.vocab_size)
    module = build_step(config, vocabulary)
    optimizers = Optimizers(module, config.optim, 100)
    pictures = {name: torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8) for name in ("image", "target")}
    lengths = torch.randint(4, 11, (batch,))
    words = torch.randint(1, model.text.vocab_size, (batch, model.text.context_length))
    words[torch.arange(model.text.context_length) >= lengths[:, None]] = 0
    inputs = pictures | {"text": words} if joint else {"image": pictures["image"], "text": words}
    given = Batch(inputs, {"text": lengths}, torch.arange(batch))

    def work() -> None:
        module.backward(given, accumulate, lambda: autocast(config.parallel, torch.device("cpu")))
        optimizers.clip()
        optimizers.step(1)

    return {"seconds": timed(work), "bytes": watched(work)}


def attention(batch: int, tokens: int) -> dict[str, float]:
    """Forward and backward of the attention of configs/demo.py's vision encoder: 6 times 3 heads of 64, in bf16."""
    import torch

    from mm_kernels import attention as attend

    q, k, v = (torch.randn(batch, tokens, 3, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def work() -> None:
        for _ in range(6):
            attend(q, k, v).sum().backward()

    return {"seconds": timed(work), "bytes": watched(work)}


def labels(count: int) -> dict[str, float]:
    """Among `count` labels whose embeddings are given: kept, found again, compared with 32 pictures' embeddings."""
    import torch
    import torch.nn.functional as F

    from mm.evaluation.label_cache import LabelCache
    from mm.evaluation.predictions import ranked
    from mm.evaluation.zero_shot import ROWS, Classifier

    torch.manual_seed(0)
    names = [f"label {number}" for number in range(count)]
    weights, pictures = (F.normalize(torch.randn(rows, E), dim=-1) for rows in (count, ROWS))
    nothing: Any = None
    classifier = Classifier(names, weights, scale=100.0, bias=0.0, kind="softmax", inference=nothing)

    def work() -> None:
        ranked(names, classifier.probabilities(pictures), 5)

    with tempfile.TemporaryDirectory() as folder:
        store = LabelCache(Path(folder))
        kept = timed(lambda: store.write("0" * 40, weights))
        found = timed(lambda: store.read("0" * 40, (count, E)))
        assert torch.equal(store.read("0" * 40, (count, E)), weights)  # type: ignore[arg-type]
    return {"kept": kept, "found": found, "seconds": timed(work, 9) / ROWS, "bytes": watched(work) / ROWS}


def texts(count: int) -> dict[str, float]:
    """`count` labels in one template through the text tower of configs/demo.py with random weights."""
    from _random_model import random_model

    from mm.evaluation.label_weights import encode_labels

    model, names = random_model(), [f"a thing with the number {number}" for number in range(count)]
    return {"seconds": timed(lambda: encode_labels(model.inference, names, ["{}"]))}


def shards(pattern: str) -> dict[str, float]:
    """The index opened, the first batch of 64 in hand, and the memory that both take."""
    from mm.adapters.image import ImageProcessor
    from mm.data.loader import Loader
    from mm.data.sources import open_sources

    def work() -> None:
        index = open_sources(pattern).index
        for name, column in index.table.columns.items():
            if name not in ("width", "height", "crc"):
                int(column.sum(dtype="uint64"))  # every page that training reads

    before, start = resident(), time.perf_counter()
    work()
    cold, held = time.perf_counter() - start, resident() - before
    opened = timed(work)
    start = time.perf_counter()
    loader = Loader(pattern, {"image": ImageProcessor(32)}, batch_size=64, train=True, ahead=False)
    keys = next(iter(loader)).keys
    assert len(keys) == 64
    return {"cold": cold, "opened": opened, "first": time.perf_counter() - start, "bytes": held}


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) << 10


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    kinds: dict[str, Callable[..., dict[str, float]]] = {
        "step": step,
        "attention": attention,
        "labels": labels,
        "texts": texts,
        "shards": shards,
    }
    print(json.dumps(kinds[sys.argv[1]](**json.loads(sys.argv[2]))))
