"""`mm demo`: from two pip packages to a trained model, its numbers, its pictures and a page about them.

Started again, it goes on where it was: shards that are there are kept, and a run resumes from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from mm.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from mm.evaluation.gallery import Gallery


def main(minutes: float = 8.0, out: str = "runs/demo", seed: int = 0, seeds: int = 1, source: str = "") -> int:
    """Shards, training, evaluation, `grid.png`, `report.html` and `results.json` in `out`; returns 0.

    `minutes` of training for each seed, compilation included; several seeds go to `out`/seed-N and share the shards.
    `source`: a model that training goes on with, as `mm.load` takes it; empty: from nothing.
    Raises ConfigError where a package, the demo's config or the room to write is missing.
    """
    if minutes <= 0 or seeds < 1:
        raise ConfigError(f"minutes = {minutes}, seeds = {seeds}: train for more than 0 minutes and at least one seed")
    folder, shards = Path(out), Path(out) / "shards"
    config_file()  # a missing one is said before any work
    if source:
        from mm.interop.sources import read

        read(source, weights=False)  # so is a wrong one
    folder.mkdir(parents=True, exist_ok=True)
    clock, started = Clock(folder / "timings.json"), time.perf_counter()
    _say(f"mm demo: everything goes to {folder}")

    _say(f"[1/4] shards: {shards}")
    if complete(shards):
        _say("      already there")
    else:
        from mm.data.build import openmoji

        with clock.stage("drawing the data set"):
            openmoji(shards)
    facts = _machine()
    _say("      " + ", ".join(f"{name}: {fact}" for name, fact in facts.items()))

    runs = {number: folder / f"seed-{number}" if seeds > 1 else folder for number in range(seed, seed + seeds)}
    results = []
    for number, run in runs.items():
        suffix = f" (seed {number})" if seeds > 1 else ""
        beginning = f", from {source}" if source else ""
        _say(f"[2/4] training{suffix}: {minutes:g} minutes{beginning}, in {run}")
        _train(run, shards, number, minutes, clock, "training" + suffix, source)
        _say(f"[3/4] evaluation{suffix}: on the held-out emoji of {shards / 'val-*.tar'}")
        with clock.stage("evaluation" + suffix, add=False):
            results.append(_evaluate(run, shards))
    _say("[4/4] pictures and report")
    with clock.stage("pictures", add=False):
        gallery = _gallery(runs[seed], shards, results[0], folder / "grid.png")
    facts["peak memory"] = f"{peak_gigabytes():.2f} GB"
    facts["median MFU in training"] = f"{100 * _mfu(list(runs.values())):.0f} %"
    _finish(folder, results, clock.seconds, facts, gallery)
    _say(_summary(folder, results, clock.seconds, facts, time.perf_counter() - started))
    return 0


class Clock:
    """Seconds each stage took, kept in a file so that a resumed demo still knows the stages before it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        if path.is_file():
            with contextlib.suppress(ValueError):  # a file cut short by a kill: times are lost, nothing else
                self.seconds = dict(json.loads(path.read_text(encoding="utf-8")))

    @contextlib.contextmanager
    def stage(self, name: str, *, add: bool = True) -> Iterator[None]:
        """Time the block, interrupted or not; with `add`, on top of what it took before."""
        started = time.perf_counter()
        try:
            yield
        finally:
            before = self.seconds.get(name, 0.0) if add else 0.0
            self.seconds[name] = round(before + time.perf_counter() - started, 2)
            _write_json(self.path, self.seconds)


def config_file() -> Path:
    """configs/demo.py of the repository that this code runs from. Raises ConfigError where there is none."""
    path = Path(__file__).resolve().parents[1] / "configs" / "demo.py"
    if not path.is_file():
        raise ConfigError("configs/demo.py: not beside the mm package; run the demo from a clone installed with pip -e")
    return path


def complete(shards: Path) -> bool:
    """Whether a whole build lies there: its manifest is written last, and every shard of it must exist."""
    try:
        manifest = json.loads((shards / "shards.json").read_text(encoding="utf-8"))
        return bool(manifest["shards"]) and all((shards / name).is_file() for name in manifest["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def demo_config(run: Path, shards: Path, seed: int, source: str = "") -> TrainConfig:
    """configs/demo.py for this folder and seed; it is watched on dev, so that val is looked at only in the end.

    What begins as `source` has been trained before, and moves a third as fast.
    """
    from mm.settings import load

    config = load(config_file())
    if source:
        config.start.model = source
        config.optim.lr, config.optim.muon_lr = config.optim.lr / 3, config.optim.muon_lr / 3
    config.run.dir, config.run.seed = str(run), seed
    config.data.train, config.data.val = str(shards / "train-*.tar"), str(shards / "dev-*.tar")
    return config


def _train(run: Path, shards: Path, seed: int, minutes: float, clock: Clock, stage: str, source: str) -> None:
    from mm.config import validate
    from mm.evaluation.callbacks import callbacks
    from mm.interop.start import resolve
    from mm.training import loop

    config = demo_config(run, shards, seed, source)
    start = resolve(config) if source else None
    validate(config)
    before = dict(clock.seconds)
    with clock.stage(stage):
        try:
            done = loop.run(config, callbacks=callbacks, budget=minutes * 60, start=start)
        except loop.Stopped as stopped:
            print(f"mm: {stopped}", file=sys.stderr)
            raise SystemExit(stopped.exit_code) from None
    if not done["seconds"] and stage in before:  # it was finished before: finding that out is not training
        clock.seconds[stage] = before[stage]


def _evaluate(run: Path, shards: Path) -> dict[str, Any]:
    from mm.evaluation.run import evaluate, summary

    tasks = ("zero_shot", "retrieval", "generation")
    result = evaluate(run, data=str(shards / "val-*.tar"), tasks=tasks, out=run / "evaluation.json")
    _say(summary(result))
    return result


def _gallery(run: Path, shards: Path, result: dict[str, Any], path: Path) -> Gallery:
    """The pictures of the first seed's model, those from prompts also as one PNG."""
    from mm.api import load
    from mm.evaluation.gallery import make_gallery, sheet
    from mm.evaluation.images import png_bytes, write_whole

    files = {split: sorted(map(str, shards.glob(f"{split}-*.tar"))) for split in ("train", "val")}
    gallery = make_gallery(
        load(run).inference, files["train"], files["val"], result["samples"], progress=sys.stderr.isatty()
    )
    write_whole(path, png_bytes(sheet(gallery.drawings)))
    return gallery


def _finish(
    folder: Path, results: list[dict[str, Any]], seconds: dict[str, float], facts: dict[str, str], gallery: Gallery
) -> None:
    from mm.evaluation.report import write_report
    from mm.evaluation.run import headlines

    heads = [headlines(result) for result in results]
    means = {name: mean(head[name].value for head in heads) for name in heads[0]}
    each = {name: [head[name].value for head in heads] for name in heads[0]}
    numbers = {"mean": means, "each": each, "seconds": seconds, "machine": facts, "results": results}
    _write_json(folder / "results.json", numbers)
    timings = {**seconds, "in all": sum(seconds.values())}
    write_report(folder, results, timings, folder / "report.html", gallery=gallery, machine=facts)


def _summary(
    folder: Path, results: list[dict[str, Any]], seconds: dict[str, float], facts: dict[str, str], total: float
) -> str:
    """The table at the end."""
    from mm.evaluation.report import duration, spread
    from mm.evaluation.run import headlines

    heads = [headlines(result) for result in results]
    lines = ["", f"{'seeds' if len(results) > 1 else 'seed'} {', '.join(str(result['seed']) for result in results)}"]
    for name in heads[0]:
        value, around = spread([head[name] for head in heads])
        lines.append(f"  {name:<40} {value:5.1f} %   {around}")
    lines += [f"  {name:<40} {duration(took):>11}" for name, took in seconds.items()]
    lines += [f"  {name:<40} {fact}" for name, fact in facts.items()]
    lines.append(f"  {'this command':<40} {duration(total):>11}")
    lines += [f"  {name:<40} {folder / name}" for name in ("report.html", "grid.png", "results.json")]
    return "\n".join(lines)


def _machine() -> dict[str, str]:
    """What a reader needs to tell a slow machine from a slow program, measured before training."""
    import torch

    from mm.training.metrics import matrix_rate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    rate = matrix_rate(device, torch.bfloat16)
    cores = str(len(os.sched_getaffinity(0)))
    return {"device": f"{device.type} ({name})", "CPU cores": cores, "bf16 matrix rate": f"{rate / 1e9:,.0f} GFLOP/s"}


def _mfu(runs: Sequence[Path]) -> float:
    """The median over all logged steps; NaN where none logged it."""
    from mm.evaluation.report import read_metrics

    found = [line["mfu"] for run in runs for line in read_metrics(run / "metrics.jsonl") if "mfu" in line]
    return median(found) if found else float("nan")


def peak_gigabytes() -> float:
    """The most memory that this process, or any process it started, has held at once."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(peaks) * unit / 1e9


def _write_json(path: Path, value: Any) -> None:
    from mm.evaluation.images import write_whole

    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def _say(line: str) -> None:
    print(line, flush=True)
