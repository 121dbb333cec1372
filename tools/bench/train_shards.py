"""Whole training from shards of JPEGs, two cores shared by loading and training: mm against open_clip_train.

Both train ViT-S-32-alt from the same weights in bf16 autocast with AdamW, batch 64, and log each step. Both live at
once, each in a process group of its own, which is stopped while the other has its turn: so they alternate in their
steady state. mm also takes the gradients' norm and keeps averaged weights, which open_clip's trainer does not.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from _common import OPEN_CLIP, ROOT, arguments, peer_python, report
from _photographs import captions, photograph_shards

MODEL, BATCH, CONFIG = "ViT-S-32-alt", 64, "configs/vit_b32_cc12m.py"
SHARDS, PER_SHARD = 8, 512
WARM = 6  # steps before the first window, compilation and the loaders' buffers among them
MARK = 1.7
TOLERANCE = 0.01  # of the loss and of the gradient's norm, in bf16
_DEADLINE = 200  # seconds for a side to start, or for a window
_RECIPE = {"lr": "1e-3", "beta1": "0.9", "beta2": "0.98", "eps": "1e-8", "wd": "0.1", "warmup": "2000"}  # CONFIG's


class Side:
    """One trainer with its workers, stopped but for its turns; its log grows by a line a step."""

    def __init__(self, command: list[str], log: Path, loss: Callable[[str], float | None], environment: dict[str, str]):
        self.log, self.loss, self.said = log, loss, log.parent.parent / f"{log.parent.name}.txt"
        with open(self.said, "w") as said:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=said, stderr=said, start_new_session=True
            )

    def losses(self) -> list[float]:
        """Of the steps so far."""
        text = self.log.read_text() if self.log.exists() else ""
        found = [self.loss(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [value for value in found if value is not None]

    def wait(self, steps: int) -> float:
        """The time at which that many steps are done. Raises RuntimeError where the trainer ended or takes too long."""
        end, size = time.perf_counter() + _DEADLINE, -1
        while True:
            now = self.log.stat().st_size if self.log.exists() else 0
            if now != size:
                size, moment = now, time.perf_counter()
                if len(self.losses()) >= steps:
                    return moment
            if self.process.poll() is not None or time.perf_counter() > end:
                raise RuntimeError(f"{self.process.args}: no step {steps}: {self.said.read_text()[-2000:]}")
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def window(self, steps: int) -> float:
        """Images a second over `steps` steps; the one in which it was stopped is not counted."""
        self.signal(signal.SIGCONT)
        done = len(self.losses())
        start = self.wait(done + 1)
        seconds = self.wait(done + 1 + steps) - start
        self.signal(signal.SIGSTOP)
        return BATCH * steps / seconds

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


def main() -> None:
    args = arguments(__doc__.splitlines()[0], rounds=5, steps=3, workers=2, threads=2, peer_workers=2, peer_compiled=0)
    shards = photograph_shards(SHARDS, PER_SHARD)
    pattern = str(shards[0]).replace("000000.tar", f"{{000000..{len(shards) - 1:06d}}}.tar")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = check(folder / "start.safetensors", pattern, folder)
        for shard in shards:
            shard.read_bytes()  # into the page cache
        sides: list[Side] = []
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of `finally`: what stands would stay for ever
        try:
            for start in (mm_trainer, open_clip_trainer):
                begun = time.perf_counter()
                sides.append(start(folder, pattern, args))
                sides[-1].wait(WARM)
                sides[-1].signal(signal.SIGSTOP)
                print(f"{start.__name__}: {WARM} steps after {time.perf_counter() - begun:.0f} s", flush=True)
            for side in sides:  # another batch than the one in memory, and the same for no two trainers
                first = side.losses()[0]
                assert abs(first - facts["loss"][0]) < 0.1, f"the first step's loss is {first}, not {facts['loss'][0]}"
            rates: tuple[list[float], list[float]] = ([], [])
            for number in range(args.rounds):
                for index in (0, 1) if number % 2 == 0 else (1, 0):
                    rates[index].append(sides[index].window(args.steps))
                print(f"round {number + 1}: mm {rates[0][-1]:.1f}, open_clip {rates[1][-1]:.1f} images/s", flush=True)
            losses = [[values[0], values[-1]] for values in (side.losses() for side in sides)]
        finally:
            for side in sides:
                side.end()
    report(
        f"training {MODEL} from JPEG shards, two cores for loading and training, against open_clip_train",
        *rates,
        unit="images/s",
        mark=MARK,
        better="higher",
        packages=("mm", "open_clip_torch", "torch", "torchvision", "pillow"),
        args=args,
        what=f"training {MODEL} from shards of JPEGs, batch {BATCH}",
        against="open_clip_train with webdataset, bf16 autocast, "
        f"{args.peer_workers} worker(s), {'compiled' if args.peer_compiled else 'eager'}",
        settings={name: getattr(args, name) for name in ("steps", "workers", "threads", "peer_workers")},
        first_and_last_loss=losses,
        **facts,
        open_clip_runs_on=list(OPEN_CLIP[1:]),
    )


def mm_flags(weights: Path, shards: str, folder: Path, args: Any = None) -> list[str]:
    """A config and overrides, as `mm train` takes them."""
    flags = {
        "start.model": f"open_clip:{MODEL}@{weights}",
        "data.train": shards,
        "data.batch_size": BATCH,
        "data.workers": args.workers if args else 0,
        "parallel.device": "cpu",
        "parallel.threads": args.threads if args else 0,
        "optim.clip": 1e9,
        "run.log_every": 1,
        "run.dir": folder / "mm",
    }
    return [CONFIG, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def mm_trainer(folder: Path, shards: str, args: Any) -> Side:
    command = [sys.executable, "-m", "mm.train", *mm_flags(folder / "start.safetensors", shards, folder, args)]
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/kernels"}
    return Side(command, folder / "mm" / "metrics.jsonl", lambda line: float(json.loads(line)["loss"]), environment)


def open_clip_trainer(folder: Path, shards: str, args: Any) -> Side:
    flags = _RECIPE | {
        "model": MODEL,
        "pretrained": str(folder / "start.safetensors"),
        "device": "cpu",
        "precision": "amp_bf16",
        "train-data": shards,
        "train-num-samples": "1000000",
        "dataset-type": "webdataset",
        "batch-size": str(BATCH),
        "workers": str(args.peer_workers),
        "epochs": "1",
        "log-every-n-steps": "1",
        "logs": str(folder),
        "name": "open_clip",
    }
    command = [peer_python(*OPEN_CLIP), "-m", "open_clip_train.main"]
    command += [part for name, value in flags.items() for part in (f"--{name}", value)]
    log = folder / "open_clip" / "out.log"
    return Side(command + ["--torchcompile"] * args.peer_compiled, log, _peer_loss, {})


def _peer_loss(line: str) -> float | None:
    found = re.search(r"Train Epoch: .* Loss: ([\d.]+)", line)
    return float(found[1]) if found else None


def check(weights: Path, shards: str, folder: Path) -> dict[str, Any]:
    """Writes the weights that both start with; both must find the same loss and gradient norm for a batch in memory."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    from mm import settings
    from mm.data.loader import Loader
    from mm.objectives.step import build_step
    from mm.train import started

    torch.manual_seed(0)
    peer = open_clip.create_model(MODEL).train()
    save_file(peer.state_dict(), str(weights))
    flags = mm_flags(weights, shards, folder)
    config = settings.override(settings.load(os.path.join(ROOT, flags[0])), flags[1:])
    start = started(config)
    assert start is not None and start.tokenizer is not None
    step = build_step(config, start.tokenizer)
    start.fill(step)
    processors = step.model.processors(train=True)
    processors.pop("target", None)
    batch = next(iter(Loader(shards, processors, batch_size=BATCH, train=True, ahead=False)))
    pixels, tokens = batch.inputs["image"], batch.inputs["text"].long()
    level = [torch.tensor(values).view(1, 3, 1, 1) for values in (config.model.image.mean, config.model.image.std)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(batch).value
        theirs = open_clip.ClipLoss()(*peer((pixels.float() / 255 - level[0]) / level[1], tokens))
    found: dict[str, tuple[float, float]] = {"loss": (ours.item(), theirs.item())}
    norms = []
    for loss, module in ((ours, step), (theirs, peer)):
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])))
    found["gradient_norm"] = (norms[0], norms[1])
    for name, (a, b) in found.items():
        assert abs(a - b) <= TOLERANCE * abs(b), f"{name} of the same batch: {a} of mm, {b} of open_clip"
    words = [len(start.tokenizer.encode(text)) for text in captions(SHARDS * PER_SHARD)]
    return {**found, "tokens_a_caption": round(mean(words), 2)}


if __name__ == "__main__":
    main()
