"""What sharing the encoders buys: the demo with one objective, with both, and with parts of what they share cut.

    python tools/bench/ablation.py                  every run that is not done yet, then the figures
    python tools/bench/ablation.py --runs 4         at most four of them; the others another time
    python tools/bench/ablation.py --runs 0         the figures of what is done

Every run is configs/demo.py, trained for as many minutes as any other (--minutes, compilation included; so what is
cheaper a step makes more steps), measured on the 213 held-out emoji. Differences are of runs with the same seed, with
the standard error over seeds. Runs are kept in the user's cache: about seven minutes each on two cores, two hours in
all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _common import ROOT, cache_folder, circumstances
from _training import demo_shards

from mm.config import AlignConfig, TrainConfig
from mm.evaluation.images import write_whole

SEEDS = (0, 1, 2)
BOTH = "both"


def no_diffusion(config: TrainConfig) -> None:
    config.objectives.diffusion = config.model.denoiser = None


def no_contrastive(config: TrainConfig) -> None:
    config.objectives.contrastive = None


def no_text_gradient(config: TrainConfig) -> None:
    assert config.objectives.diffusion is not None
    config.objectives.diffusion.text_grad = 0.0


def no_image_gradient(config: TrainConfig) -> None:
    assert config.objectives.diffusion is not None
    config.objectives.diffusion.image_grad = 0.0


def aligned(config: TrainConfig) -> None:
    config.objectives.align = AlignConfig(warmup=50)


ARMS: dict[str, tuple[str, Callable[[TrainConfig], None] | None]] = {  # name in a run's folder -> what it is
    BOTH: ("both objectives", None),
    "contrastive": ("contrastive only", no_diffusion),
    "diffusion": ("diffusion only", no_contrastive),
    "no-text-gradient": ("both, no diffusion gradient into the text encoder", no_text_gradient),
    "no-image-gradient": ("both, no diffusion gradient into the vision encoder", no_image_gradient),
    "aligned": ("both, and alignment", aligned),
}
FIGURES = {  # name -> (title, unit, factor, better)
    "names": ("zero-shot, held-out names", "%", 100, "higher"),
    "all": ("zero-shot, all 3,963 names", "%", 100, "higher"),
    "drawn": ("drawing, training captions", "%", 100, "higher"),
    "drawn_held_out": ("drawing, held-out captions", "%", 100, "higher"),
    "denoising": ("held-out denoising loss", "", 1, "lower"),
    "caption_gain": ("… what the caption takes off it", "", 1, "higher"),
}
SHARES = {
    "names": ("zero_shot", "held_out_names", "top1"),
    "all": ("zero_shot", "all_names", "top1"),
    "drawn": ("generation", "train"),
    "drawn_held_out": ("generation", "held_out"),
}


def folder_of(run: str, minutes: float) -> Path:
    return cache_folder("bench", "ablation", f"{minutes:g}", run)


def train(run: str, minutes: float) -> None:
    """Trains and measures one run, `ARM=SEED`; what only serves to go on with it is removed in the end."""
    from mm.config import validate
    from mm.evaluation.run import evaluate
    from mm.settings import load
    from mm.training import loop

    arm, seed = run.split("=")
    folder, shards = folder_of(run, minutes), demo_shards()
    config = load(Path(ROOT) / "configs" / "demo.py")
    config.run.dir, config.run.seed, config.data.train = str(folder / "run"), int(seed), shards
    change = ARMS[arm][1]
    if change is not None:
        change(config)
    validate(config)
    loop.run(config, budget=60 * minutes)
    tasks = ["zero_shot"] if config.objectives.contrastive is not None else []
    tasks += ["generation", "denoising"] if config.objectives.diffusion is not None else []
    evaluate(folder / "run", data=shards.replace("train-", "val-"), tasks=tasks, out=folder / "evaluation.json")
    shutil.rmtree(folder / "run" / "checkpoints")


def go_on(run: str, minutes: float) -> None:
    """Raises RuntimeError with the end of what it said where a run fails."""
    folder = folder_of(run, minutes)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/kernels"}
    command = [sys.executable, __file__, "--train", run, "--minutes", str(minutes)]
    with (folder / "log.txt").open("ab") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        raise RuntimeError(f"{run} failed: {(folder / 'log.txt').read_text()[-1500:]}")
    found = result(run, minutes)
    assert found is not None
    print(f"{run}: {found['steps']} steps; " + shown(found), flush=True)


def shown(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {FIGURES[name][2] * found[name]:.3g}" for name in FIGURES if name in found)


def result(run: str, minutes: float) -> dict[str, Any] | None:
    """The steps that a run made and its figures; None where it is not done."""
    path = folder_of(run, minutes) / "evaluation.json"
    if not path.is_file():
        return None
    measured = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, Any] = {"steps": measured["step"]}
    for name, places in SHARES.items():
        node: Any = measured
        for place in places:
            node = node.get(place) if isinstance(node, dict) else None
        if node is not None:
            found[name] = node["value"]
    for row in measured["tasks"]:
        if row["name"] == "denoising":
            found["denoising"], found["caption_gain"] = row["metrics"]["loss"], row["metrics"]["caption_gain"]
    return found


def wanted() -> list[str]:
    """All runs, seed by seed, so that what is done compares."""
    return [f"{arm}={seed}" for seed in SEEDS for arm in ARMS]


def figures(minutes: float) -> dict[str, Any]:
    """What benchmarks/ablation.json holds."""
    arms: dict[str, Any] = {}
    runs = {run: result(run, minutes) for run in wanted()}
    for arm, (title, _) in ARMS.items():
        found = {seed: runs[f"{arm}={seed}"] for seed in SEEDS if runs[f"{arm}={seed}"] is not None}
        arms[arm] = {"what": title, "seeds": list(found), "steps": [one["steps"] for one in found.values()]}
        for name in FIGURES:
            values = {seed: one[name] for seed, one in found.items() if name in one}
            base = {seed: runs[f"{BOTH}={seed}"] for seed in values}
            apart = [value - base[seed][name] for seed, value in values.items() if base[seed] is not None]
            if values:
                arms[arm][name] = {"each": list(values.values()), **spread(list(values.values()))}
                if arm != BOTH and apart:
                    arms[arm][name]["against_both"] = spread(apart)
    return {
        "name": f"the demo's recipe for {minutes:g} minutes a run, one thing changed at a time",
        "figures": {name: {"what": title, "better": better} for name, (title, _, _, better) in FIGURES.items()},
        "arms": arms,
        "not_done": [run for run, found in runs.items() if found is None],
        **circumstances(("mm", "torch")),
    }


def spread(values: list[float]) -> dict[str, float | None]:
    """The mean and its standard error over seeds, None of a single one."""
    return {"mean": mean(values), "error": stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None}


def table(found: dict[str, Any]) -> str:
    """The figures as a table in Markdown: means ± standard errors."""
    lines = ["| run | steps | " + " | ".join(title for title, *_ in FIGURES.values()) + " |"]
    lines.append("|---" * (2 + len(FIGURES)) + "|")
    for arm in found["arms"].values():
        cells = [arm["what"], f"{mean(arm['steps']):.0f}" if arm["steps"] else "–"]
        for name, (_, unit, factor, _) in FIGURES.items():
            digits = 1 if unit else 4
            cell = "–"
            if name in arm:
                value, error = arm[name]["mean"], arm[name]["error"]
                cell = f"{factor * value:.{digits}f}" + (f" ± {factor * error:.{digits}f}" if error is not None else "")
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """A panel a figure, a row a kind of run: every seed a dot, the mean with its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [name for name in FIGURES if name != "caption_gain"]
    figure, axes = pyplot.subplots(1, len(chosen), figsize=(3.1 * len(chosen) + 3.4, 3.4), sharey=True)
    arms = list(found["arms"].values())
    for axis, name in zip(axes, chosen, strict=True):
        title, unit, factor, _ = FIGURES[name]
        for row, arm in enumerate(arms):
            if name not in arm:
                continue
            numbers = [factor * value for value in arm[name]["each"]]
            axis.plot(numbers, [row] * len(numbers), "o", color="0.7", markersize=4, zorder=1)
            error = factor * (arm[name]["error"] or 0.0)
            axis.errorbar(factor * arm[name]["mean"], row, xerr=error, fmt="o", color="C0", capsize=3, zorder=2)
        if name in arms[0]:
            axis.axvline(factor * arms[0][name]["mean"], color="C0", alpha=0.25, linewidth=1, zorder=0)
        axis.set(title=title, xlabel=unit)
        axis.title.set_fontsize(9)
        axis.grid(True, axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(arms)), [arm["what"].replace(", ", ",\n", 1) for arm in arms], fontsize=8)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of training a run (default: 5)")
    parser.add_argument("--runs", type=int, default=-1, help="at most so many of the runs that are not done yet")
    parser.add_argument("--train", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.minutes)
        return
    for run in [run for run in wanted() if result(run, args.minutes) is None][: args.runs if args.runs >= 0 else None]:
        go_on(run, args.minutes)
    found = figures(args.minutes)
    if not any(arm["seeds"] for arm in found["arms"].values()):
        return
    print(table(found))
    out = Path(ROOT) / "benchmarks"
    plot(found, out / "ablation.png")
    write_whole(out / "ablation.json", (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
