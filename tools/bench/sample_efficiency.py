"""Samples to a given zero-shot accuracy on held-out OpenMoji: mm against open_clip's trainer, over three seeds.

    python tools/bench/sample_efficiency.py                     every run that is not done yet, then the figures
    python tools/bench/sample_efficiency.py --only mm-joint-0   one run, for at most --seconds; again: goes on with it
    python tools/bench/sample_efficiency.py --runs 0            the figures of what is done

Both sides: the demo's shards, batches of 384, crops and jitter of configs/demo.py, towers of its sizes, as many steps
in all and 40 of warm-up, cosine schedule. mm is configs/demo.py as it is ("joint") and without its diffusion objective
("contrastive"). open_clip is its own trainer (AdamW, bf16 autocast, its weight decay, gradients clipped at 1) with its
own tokenizer, which needs no more than the 17 tokens that mm's takes; its learning rate is the best of three on seed 0,
judged by the held-out names themselves. Every 9 steps (one pass over 3,538 samples, as open_clip's loader makes
them) the embeddings of the 213 held-out pictures and names are kept, mm's of the averaged weights that it evaluates
and exports; one function here makes accuracies of both. Runs are kept in the user's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from _common import OPEN_CLIP, ROOT, cache_folder, circumstances, peer_python
from _growth import save_curves
from _training import demo_shards

STEPS, EVERY, BATCH, WARMUP = 108, 9, 384, 40
RATES, SEEDS = (5e-4, 1e-3, 2e-3), (0, 1, 2)
TARGETS, MARKED, MARK = (0.3, 0.4, 0.5), 0.5, 0.6
NAMES = 213  # held out
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 17, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}
AUGMENT = ("scale=(0.9,1.0)", "color_jitter=(0.05,0.05,0.0,0.0)", "color_jitter_prob=1.0")
OUT = Path(ROOT) / "benchmarks"


def folder_of(run: str) -> Path:
    """A run's folder: its name says side, learning rate or objectives, and seed; of other `STEPS` it is another one."""
    return cache_folder("bench", "sample_efficiency", f"{STEPS}-{EVERY}", run)


def accuracy(found: dict[str, np.ndarray]) -> float:
    """The share of pictures that are nearest to their own name."""
    return float((np.argmax(found["pictures"] @ found["names"].T, axis=1) == found["truth"]).mean())


def curve(run: str) -> list[tuple[int, float]]:
    """Steps and accuracies of a run so far. Raises RuntimeError where it was asked for other names."""
    points = []
    for path in sorted(folder_of(run).glob("step-*.npz")):
        with np.load(path) as file:
            found = dict(file)
        if len(found["truth"]) != NAMES or not np.array_equal(found["truth"], np.arange(NAMES)):
            raise RuntimeError(f"{path}: not the {NAMES} held-out names, each once and in the shards' order")
        points.append((int(path.stem.removeprefix("step-")), accuracy(found)))
    return points


def done(run: str) -> bool:
    points = curve(run)
    return bool(points) and points[-1][0] == STEPS


def train_ours(run: str) -> None:
    """`mm train` with a callback that keeps embeddings; goes on with a run that was stopped."""
    from mm.config import validate
    from mm.evaluation.callbacks import ZeroShot
    from mm.settings import load
    from mm.training import loop

    class Kept(ZeroShot):
        def whole(self, context: Any, parts: list[Any]) -> dict[str, float]:
            pictures, names = (part.float().numpy() for part in parts[0])
            found = {"pictures": pictures, "names": names, "truth": np.arange(len(pictures))}
            np.savez(folder_of(run) / f"step-{context.step:05d}.npz", **found)
            return super().whole(context, parts)

    _, objectives, seed = run.split("-")
    config = load(Path(ROOT) / "configs" / "demo.py")
    config.run.dir, config.run.seed, config.run.steps = str(folder_of(run) / "run"), int(seed), STEPS
    config.run.eval_every, config.run.diagnose_every, config.checkpoint.every = EVERY, 0, EVERY
    config.data.train, config.data.val = demo_shards(), demo_shards().replace("train-", "val-")
    if objectives == "contrastive":
        config.objectives.diffusion = config.model.denoiser = None
    assert (config.data.batch_size, config.optim.warmup, config.optim.schedule) == (BATCH, WARMUP, "cosine")
    validate(config)
    with contextlib.suppress(loop.Stopped):
        loop.run(config, callbacks=lambda config: [Kept(config)])


def train_theirs(run: str) -> subprocess.Popen[bytes]:
    """open_clip's trainer, from the start."""
    _, rate, seed = run.split("=")
    folder = folder_of(run)
    for old in folder.glob("step-*.npz"):
        old.unlink()
    model = folder / "ViT-openmoji.json"  # ViT: its trainer chooses betas by the name
    model.write_text(json.dumps(MODEL))
    shards = demo_shards()
    train = sorted(map(str, Path(shards).parent.glob("train-*.tar")))
    request = {
        "model": str(model),
        "train": train[0].replace("000000", f"{{000000..{len(train) - 1:06d}}}"),
        "val": train[0].replace("train-", "val-"),
        "names": NAMES,
        "batch": BATCH,
        "every": EVERY,
        "steps": STEPS,
        "lr": float(rate),
        "warmup": WARMUP,
        "seed": int(seed),
        "augment": AUGMENT,
        "out": str(folder),
    }
    script = Path(__file__).parent / "peers" / "train_open_clip.py"
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [peer_python(*OPEN_CLIP), str(script), json.dumps(request)], stdout=log, stderr=subprocess.STDOUT
        )


def go_on(run: str, seconds: float) -> None:
    """Trains a run, or goes on with it; one of mm's is stopped after so many seconds, and keeps what it has.

    Raises RuntimeError with the end of what it said where it fails.
    """
    folder = folder_of(run)
    folder.mkdir(parents=True, exist_ok=True)
    if run.startswith("open_clip"):
        process = train_theirs(run)
        process.wait()
    else:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/kernels"}
        with (folder / "log.txt").open("ab") as log:
            command = [sys.executable, __file__, "--train", run]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            process.wait(seconds or None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{run} failed: {(folder / 'log.txt').read_text()[-1500:]}")
    points = curve(run)
    print(f"{run}: step {points[-1][0]} of {STEPS}, {100 * points[-1][1]:.1f} %" if points else f"{run}: begun")


def samples_to(points: Sequence[tuple[int, float]], target: float) -> float | None:
    """Samples at which the line through the points first reaches the target; None where it does not."""
    before = (0, 0.0)
    for step, value in points:
        if value >= target:
            part = (target - before[1]) / (value - before[1])
            return BATCH * (before[0] + part * (step - before[0]))
        before = (step, value)
    return None


def best_rate() -> float:
    """open_clip's learning rate with the fewest samples to the marked target; of those that miss it, the best end."""

    def key(rate: float) -> tuple[float, float]:
        points = curve(theirs(rate, SEEDS[0])) or [(0, 0.0)]
        return samples_to(points, MARKED) or float("inf"), -points[-1][1]

    return min(RATES, key=key)


def theirs(rate: float, seed: int) -> str:
    return f"open_clip={rate}={seed}"


def wanted() -> list[str]:
    """All runs, those by which the learning rate is chosen first."""
    chosen = [theirs(rate, SEEDS[0]) for rate in RATES]
    runs = chosen + [f"mm-{objectives}-{seed}" for seed in SEEDS for objectives in ("contrastive", "joint")]
    if all(done(run) for run in chosen):
        runs[3:3] = [theirs(best_rate(), seed) for seed in SEEDS[1:]]
    return runs


def figures() -> dict[str, Any]:
    """What benchmarks/sample_efficiency.json holds."""
    rate = best_rate()
    sides = {"open_clip": [theirs(rate, seed) for seed in SEEDS]}
    sides |= {f"mm, {name}": [f"mm-{name}-{seed}" for seed in SEEDS] for name in ("contrastive", "joint")}
    found: dict[str, Any] = {}
    for side, runs in sides.items():  # a run that is not done gives what there is
        points = {run: curve(run) for run in runs}
        reached = {f"{target:g}": [samples_to(points[run], target) for run in runs] for target in TARGETS}
        found[side] = {
            "steps": [points[run][-1][0] if points[run] else 0 for run in runs],
            "last": [points[run][-1][1] if points[run] else None for run in runs],
            "best": [max((value for _, value in points[run]), default=None) for run in runs],
            "samples_to": reached,
            "curves": {str(seed): points[run] for seed, run in zip(SEEDS, runs, strict=True)},
        }
    ratios = {}
    for side in list(found)[1:]:
        ratios[side] = {}
        for target in found[side]["samples_to"]:
            ours, peer = found[side]["samples_to"][target], found["open_clip"]["samples_to"][target]
            whole = all(number is not None for number in [*ours, *peer])
            ratios[side][target] = mean(ours) / mean(peer) if whole else None
    tried = ", ".join(f"{one:g}" for one in RATES)
    rates = {f"{one:g}": curve(theirs(one, SEEDS[0])) for one in RATES}
    return {
        "name": "samples to a held-out zero-shot accuracy on OpenMoji",
        "what": f"samples to {100 * MARKED:.0f} % of {NAMES} held-out names, {len(SEEDS)} seeds",
        "against": f"open_clip_train, same towers, learning rate {rate:g}, the best of {tried}",
        "ratio": {side: ratio[f"{MARKED:g}"] for side, ratio in ratios.items()},
        "mark": MARK,
        "better": "lower",
        "unit": "share of open_clip's samples",
        "ratios": ratios,
        "sides": found,
        "rate": rate,
        "rates_seed_0": {one: {"samples_to": samples_to(p, MARKED), "last": p[-1][1]} for one, p in rates.items() if p},
        "steps": STEPS,
        "batch": BATCH,
        "not_done": [run for run in wanted() if not done(run)],
        **circumstances(("mm", "torch")),
        "peer": OPEN_CLIP[0],
    }


def show(found: dict[str, Any]) -> None:
    """The figures as lines, and the plot."""
    for side, numbers in found["sides"].items():
        reached = {
            target: " ".join("-" if number is None else f"{number:,.0f}" for number in row)
            for target, row in numbers["samples_to"].items()
        }
        ends = " ".join("-" if value is None else f"{100 * value:.1f}" for value in numbers["last"])
        print(f"{side}: samples to " + "; ".join(f"{t}: {r}" for t, r in reached.items()) + f"; at the end {ends} %")
    for side, ratio in found["ratios"].items():
        words = "; ".join(f"{t}: {'-' if r is None else f'{r:.2f}'}" for t, r in ratio.items())
        print(f"{side}: share of open_clip's samples (mark {MARK} at {MARKED}): {words}")
    lines = {}
    for side, numbers in found["sides"].items():
        runs = [dict(points) for points in numbers["curves"].values() if points]
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        lines[side] = [(BATCH * step, 100 * median(run[step] for run in runs)) for step in steps]
    for run in found["not_done"]:
        print(f"not done: {run}")
    title = f"Held-out zero-shot accuracy, {NAMES} OpenMoji names, median over seeds"
    save_curves(OUT / "sample_efficiency.png", {title: lines}, "samples seen", "%", logarithmic=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="one run")
    parser.add_argument("--runs", type=int, default=-1, help="at most so many of the runs that are not done yet")
    parser.add_argument("--seconds", type=float, default=0.0, help="of one of mm's runs; then it stops, to go on later")
    parser.add_argument("--train", default="", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args()
    if args.train:
        train_ours(args.train)
        return
    left = args.runs
    while left and (runs := [run for run in ([args.only] if args.only else wanted()) if not done(run)]):
        go_on(runs[0], args.seconds)
        left -= 1
    if args.only or not any(done(theirs(rate, SEEDS[0])) for rate in RATES):
        return
    found = figures()
    show(found)
    with tempfile.NamedTemporaryFile("w", dir=OUT, delete=False) as file:
        json.dump(found, file, indent=1)
    os.chmod(file.name, 0o644)
    os.replace(file.name, OUT / "sample_efficiency.json")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
