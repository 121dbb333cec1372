"""Peak resident memory of training from a batch in memory: mm's step against open_clip's, each in a fresh process.

The same weights, the same batch of 64 pictures and of captions of CLIP's 77 tokens with 13.5 real ones, bf16 autocast,
AdamW, two steps whose losses must agree. Counted is what a process has at most from before the model is built, less
what its libraries took by then; the whole process' peak and the step's seconds stand beside it, and once what mm takes
with averaged weights, which open_clip's trainer does not have. `--compiled 0` runs mm's blocks eagerly, as open_clip's;
`--peer_compiled 1` compiles open_clip's model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from _clip import clip_weights
from _common import ROOT, arguments, report
from _photographs import captions

MODEL, BATCH = "ViT-S-32-alt", 64
MARK = 1 / 0.7  # open_clip's memory over mm's
STEPS = 2  # the second has the optimizer's moments
DECAYS = {"mm": 0.0, "mm with averages": 0.9999, "open_clip": 0.0}  # of averaged weights
TOLERANCE = 0.01  # of each step's loss, in bf16
RATE, BETAS, EPS, DECAY = 1e-4, (0.9, 0.98), 1e-8, 0.1
_DEADLINE = 200


def status(name: str) -> int:
    """Bytes: VmHWM, the most that this process has had, or VmRSS, what it has."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(name)).split()[1]) << 10


def forget_peak() -> None:
    """The most that this process has had is from now on what it has."""
    Path("/proc/self/clear_refs").write_text("5")


def batch() -> tuple[Any, list[str]]:
    """uint8 pictures `[64, 3, 224, 224]` and captions."""
    import torch

    torch.manual_seed(0)
    return torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8), captions(BATCH)


def mm_step(weights: str, model: str, compiled: bool, ema_decay: float = 0.0) -> Any:
    """The bytes before the model, and a function that trains one step by the parts of `mm train` and gives its loss."""
    import torch

    from mm import config as settings
    from mm.adapters.text import TextProcessor
    from mm.data.loader import Loader  # noqa: F401 (what the trainer has in memory too)
    from mm.distributed.device import autocast, pick_device
    from mm.distributed.parallelize import parallelize
    from mm.distributed.world import World
    from mm.objectives.step import build_step
    from mm.train import started
    from mm.training.ema import Ema
    from mm.training.optim import Optimizers
    from mm.types import Batch

    if compiled:
        import torch._inductor.compile_fx  # a library as the others, but else read with the first block
    forget_peak()
    before = status("VmRSS")
    config = settings.load(os.path.join(ROOT, "configs/vit_b32_cc12m.py"))
    config.start.model = f"open_clip:{model}@{weights}"
    config.optim.lr, config.optim.betas, config.optim.weight_decay = RATE, BETAS, DECAY
    config.optim.warmup, config.optim.final, config.optim.clip, config.optim.ema = 0, 1.0, 1e9, ema_decay
    config.parallel.compile, config.parallel.device = compiled, "cpu"
    start = started(config)
    assert start is not None and start.tokenizer is not None
    step = build_step(config, start.tokenizer)
    start.fill(step)
    device = pick_device(config.parallel)
    parallel = parallelize(step, config.parallel, World(), device, False)
    optimizers, ema = Optimizers(step, config.optim, STEPS), Ema(step, config.optim.ema)
    pictures, texts = batch()
    ids, lengths = (processor := TextProcessor(start.tokenizer, 77)).collate(
        [processor.prepare(text, train=True) for text in texts]
    )
    given = Batch({"image": pictures, "text": ids}, {"text": lengths}, torch.zeros(BATCH, dtype=torch.int64))

    def train() -> float:
        metrics = step.backward(given, 1, lambda: autocast(config.parallel, device), parallel.forward, parallel.sync)
        optimizers.clip()
        optimizers.step(0)
        ema.update(0)
        step.after_step()
        return metrics["loss"].item()

    return before, train


def open_clip_step(weights: str, model: str, compiled: bool, _: float) -> Any:
    """The same of open_clip, as its `train_one_epoch` has it."""
    import math

    import open_clip
    import open_clip_train.train  # noqa: F401 (what its trainer has in memory)
    import torch

    if compiled:
        import torch._inductor.compile_fx
    forget_peak()
    before = status("VmRSS")
    peer, _, _ = open_clip.create_model_and_transforms(model, weights, precision="amp_bf16", output_dict=True)
    peer.train()
    tokens = open_clip.get_tokenizer(model)(batch()[1])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (peer.visual.image_mean, peer.visual.image_std))
    images = (batch()[0].float() / 255 - mean) / std
    few = [p for p in peer.parameters() if p.ndim < 2]
    rest = [p for p in peer.parameters() if p.ndim >= 2]
    groups = [{"params": few, "weight_decay": 0.0}, {"params": rest, "weight_decay": DECAY}]
    optimizer, loss = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS), open_clip.ClipLoss()
    call = torch.compile(peer) if compiled else peer

    def train() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            total = loss(**call(images, tokens), output_dict=True)["contrastive_loss"]
        total.backward()
        optimizer.step()
        with torch.no_grad():
            peer.logit_scale.clamp_(0, math.log(100))
        return total.item()

    return before, train


def measure(side: str, weights: str, model: str, compiled: bool) -> None:
    """Prints JSON of a fresh process: bytes before the model, at most, and at most in the last step alone."""
    before, train = (open_clip_step if side == "open_clip" else mm_step)(weights, model, compiled, DECAYS[side])
    losses, seconds, peaks = [], [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        losses.append(train())
        seconds.append(time.perf_counter() - start)
        peaks.append(status("VmHWM"))
        forget_peak()
    found = {"before": before, "peak": max(peaks), "last": peaks[-1], "losses": losses, "seconds": seconds[-1]}
    print(json.dumps(found))


def run(side: str, weights: Path, model: str, compiled: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", side, str(weights), model, str(int(compiled))]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/kernels"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_DEADLINE)
    if done.returncode:
        raise RuntimeError(f"{side} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5] == "1")
        return
    args = arguments(__doc__.splitlines()[0], rounds=5, compiled=1, peer_compiled=0)
    compiled = {"mm": bool(args.compiled), "open_clip": bool(args.peer_compiled)}
    weights = clip_weights(MODEL)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in compiled}
    averages = run("mm with averages", weights, MODEL, compiled["mm"])
    for number in range(args.rounds):
        for side in list(compiled)[:: 1 if number % 2 else -1]:
            found[side].append(run(side, weights, MODEL, compiled[side]))
        if not number:
            _check(*(found[side][0]["losses"] for side in compiled))
    extra = {side: [(row["peak"] - row["before"]) / 1e9 for row in rows] for side, rows in found.items()}
    whole = {side: median(row["peak"] for row in rows) / 1e9 for side, rows in found.items()}
    print(f"whole process at most: mm {whole['mm']:.2f}, open_clip {whole['open_clip']:.2f} GB")
    report(
        f"peak memory of training {MODEL}, batch {BATCH}, beyond libraries, against open_clip",
        extra["mm"],
        extra["open_clip"],
        unit="GB",
        mark=MARK,
        better="lower",
        packages=("mm", "open_clip_torch", "torch"),
        args=args,
        what=f"peak memory of training {MODEL}, batch {BATCH}",
        against=f"open_clip, bf16 autocast, AdamW, {'compiled' if args.peer_compiled else 'eager'}",
        compiled=compiled,
        whole_process=whole,
        last_step={side: median(row["last"] - row["before"] for row in rows) / 1e9 for side, rows in found.items()},
        seconds_a_step={side: median(row["seconds"] for row in rows) for side, rows in found.items()},
        with_averages=(averages["peak"] - averages["before"]) / 1e9,
        losses={side: rows[0]["losses"] for side, rows in found.items()},
    )


def _check(ours: list[float], theirs: list[float]) -> None:
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(a - b) <= TOLERANCE * b, f"loss of step {number + 1}: {a} of mm, {b} of open_clip"


if __name__ == "__main__":
    main()
