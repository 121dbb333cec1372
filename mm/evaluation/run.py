"""A trained model measured on held-out shards: zero-shot classification, retrieval, and drawing from captions."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mm.config import ConfigError, TrainConfig
from mm.evaluation import samples
from mm.evaluation.added import retrieval_with
from mm.evaluation.images import pixel_rank, write_whole
from mm.evaluation.inference import Inference
from mm.evaluation.job import BATCH, Job
from mm.evaluation.retrieval import recall
from mm.fields import suggestion
from mm.models.export import find_export, load_export

if TYPE_CHECKING:
    from mm.models.model import Model

SKIN = "skin tone"  # in a caption: a variant that differs from its neighbours in one colour
NEAR = 10  # a drawing is right when its picture is among so many nearest


@dataclass
class Share:
    """A share of `n` yes-or-no outcomes with its binomial standard error."""

    value: float
    error: float
    n: int

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Share:
        right = [bool(outcome) for outcome in outcomes]
        value = sum(right) / len(right) if right else math.nan
        return cls(value, math.sqrt(value * (1 - value) / len(right)) if right else math.nan, len(right))


def evaluate(
    run: str | os.PathLike[str],
    *,
    data: str,
    tasks: Sequence[str] | None = ("zero_shot", "generation"),
    candidates: str | None = None,
    out: str | os.PathLike[str] | None = None,
    limit: int = 200,
    steps: int = 25,
    guidance: float = 3.0,
    seed: int = 0,
    precision: Literal["bf16", "fp32"] = "bf16",
    progress: bool = True,
    load: Callable[[str], tuple[Model, dict[str, Tensor], TrainConfig, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Measures the model of a run folder on the held-out shards `data`; returns the result, and writes it to `out`.

    `candidates`: shards whose captions and pictures are the whole label set and reference set, by default all splits
    beside `data`. `tasks`: any of zero_shot, retrieval, generation; None is zero_shot and generation where the model
    can. Generation draws the held-out captions and, where there are train shards, `limit` of theirs, drawing i with
    seed `seed` + i. Deterministic. `precision` is that of the model's matrix products. `load` reads the model where
    `run` is no folder of mm's. Raises ConfigError for a run, shards or a task that cannot be used.
    """
    for task in tasks or ():
        if task not in TASKS:
            raise ConfigError(f"tasks: no task {task!r}{suggestion(task, TASKS)}; there are {', '.join(TASKS)}")
    if tasks is not None and (not tasks or limit < 1):
        raise ConfigError(f"tasks = {list(tasks)}, limit = {limit}: nothing to measure; give a task and a limit of 1")
    folder = Path(run)
    model, extras, config, note = load_export(find_export(run)) if load is None else load(os.fspath(run))
    if tasks is None:
        able = {"zero_shot": config.objectives.contrastive, "generation": config.objectives.diffusion}
        tasks = [task for task, objective in able.items() if objective is not None]
    for task in tasks:
        needs = "diffusion" if task == "generation" else "contrastive"
        if getattr(config.objectives, needs) is None:
            raise ConfigError(f"tasks: {task} needs a model trained with objectives.{needs}; name other tasks")
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    inference = Inference(model, config, extras)
    inference.bf16 = precision == "bf16"
    held_out, reference = samples.around(data, candidates)
    job = Job(
        inference,
        files=held_out,
        reference=reference,
        settings={"limit": limit, "steps": steps, "guidance": guidance, "solver": "euler", "seed": seed}
        | {"precision": precision},
        progress=progress,
    )
    read = job.samples
    result: dict[str, Any] = {
        "run": folder.resolve().name if folder.exists() else os.fspath(run),
        "step": int(note["step"]) if str(note.get("step", "")).isdigit() else None,
        "seed": config.run.seed,
        "data": [Path(file).name for file in held_out],
        "held_out": len(job.held_out),
        "candidates": len(job.candidates),
        "unusable": read.unusable,
        "settings": job.settings,
        "versions": versions(),
        "commit": commit(),
        "seconds": {},
        "samples": [{"key": read.keys[place], "caption": read.captions[place]} for place in job.held_out],
    }
    for task in dict.fromkeys(tasks):
        started = time.perf_counter()
        result[task] = TASKS[task](job, result["samples"])
        result["seconds"][task] = round(time.perf_counter() - started, 2)
    if out is not None:
        write_whole(out, (json.dumps(result, indent=1) + "\n").encode())
    return result


def _zero_shot(job: Job, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Top-1 and top-5 of the held-out pictures, labels being the held-out names or all names; equal names are one."""
    embeddings, truth = job.pictures(job.held_out), job.captions(job.held_out)
    found: dict[str, Any] = {}
    for name, places in (("held_out_names", job.held_out), ("all_names", job.candidates)):
        others = job.left_out if name == "all_names" else []
        labels = list(dict.fromkeys([*job.captions(places), *truth, *others]))
        guesses = (embeddings @ job.texts(labels).T).topk(min(5, len(labels)), dim=1).indices.tolist()
        for record, row in zip(records, guesses, strict=True):
            record[name] = [labels[guess] for guess in row]
        hits = {k: [record["caption"] in record[name][:k] for record in records] for k in (1, 5)}
        found[name] = {"labels": len(labels), **{f"top{k}": asdict(Share.of(hit)) for k, hit in hits.items()}}
        found[f"{name}_without_skin_tones"] = {
            "labels": len(labels),  # all of them: only pictures are left out
            **{f"top{k}": asdict(_without_skin(hit, truth)) for k, hit in hits.items()},
        }
    return found


def _retrieval(job: Job, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Recall among the held-out pairs, both ways; in `modalities` also of those that the config adds."""
    pooled = {"image": job.pictures(job.held_out), "text": job.texts(job.captions(job.held_out))}
    found: dict[str, Any] = {"pairs": len(job.held_out), **recall(pooled["image"], pooled["text"])}
    if job.inference.config.model.modalities:
        names = [(job.samples.shards[place], job.samples.keys[place]) for place in job.held_out]
        found["modalities"] = retrieval_with(job.inference, job.files, names, pooled, progress=job.progress)
    return found


def _generation(job: Job, records: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the right picture is among the nearest to what is drawn from its caption."""
    train = samples.evenly(job.train, job.settings["limit"])
    wanted = [*train, *job.held_out]
    bank = list(dict.fromkeys([*job.candidates, *job.held_out]))
    settings = job.settings
    drawn = job.inference.generate(
        job.captions(wanted),
        seeds=range(settings["seed"], settings["seed"] + len(wanted)),
        steps=settings["steps"],
        guidance=settings["guidance"],
        micro_batch=BATCH["draw"],
        progress=job.progress,
    )
    ranks = pixel_rank(drawn, job.samples.images[bank], samples.index_of(wanted, bank)).tolist()
    for record, rank in zip(records, ranks[len(train) :], strict=True):
        record["drawing_rank"] = rank
    near = [rank < NEAR for rank in ranks]
    ours, theirs = near[: len(train)], near[len(train) :]
    found: dict[str, Any] = {"references": len(bank), "near": NEAR}
    for name, hits, places in (("train", ours, train), ("held_out", theirs, job.held_out)):
        if places:
            found[name] = asdict(Share.of(hits))
            found[f"{name}_without_skin_tones"] = asdict(_without_skin(hits, job.captions(places)))
    return found


TASKS = {"zero_shot": _zero_shot, "retrieval": _retrieval, "generation": _generation}


def _without_skin(hits: Sequence[bool], captions: Sequence[str]) -> Share:
    return Share.of(hit for hit, caption in zip(hits, captions, strict=True) if SKIN not in caption)


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    try:
        ours = importlib.metadata.version("mm")
    except importlib.metadata.PackageNotFoundError:
        ours = "not installed"
    return {"mm": ours, "python": platform.python_version(), "torch": torch.__version__}


def commit() -> str | None:
    """The commit of this code where it runs from a git checkout, "-dirty" if files differ from it; else None."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def headlines(result: dict[str, Any]) -> dict[str, Share]:
    """The shares of a result that are worth a line each, by what they say."""
    wanted = {
        "zero-shot top-1, held-out names": ("zero_shot", "held_out_names", "top1"),
        "zero-shot top-1, all names": ("zero_shot", "all_names", "top1"),
        "… held-out names, without skin tones": ("zero_shot", "held_out_names_without_skin_tones", "top1"),
        "… all names, without skin tones": ("zero_shot", "all_names_without_skin_tones", "top1"),
        "drawing, training captions": ("generation", "train"),
        "drawing, held-out captions": ("generation", "held_out"),
        "… held-out captions, without skin tones": ("generation", "held_out_without_skin_tones"),
    }
    found = {}
    for title, path in wanted.items():
        node: Any = result
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            found[title] = Share(**node)
    return found


def summary(result: dict[str, Any]) -> str:
    """A result as a few lines for a terminal."""
    lines = [
        f"{title:<40} {100 * share.value:5.1f} % ± {100 * share.error:.1f}  (n = {share.n})"
        for title, share in headlines(result).items()
    ]
    retrieval = result.get("retrieval", {})
    recalls = {**retrieval, **retrieval.get("modalities", {})}
    lines += [f"{name:<40} {100 * value:5.1f} %" for name, value in recalls.items() if "@" in name]
    return "\n".join(lines)
