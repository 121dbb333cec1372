"""A trained model measured on held-out shards by some tasks: what it is called with, and what comes out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mm.config import ConfigError, TrainConfig
from mm.evaluation import hashes, rows, samples
from mm.evaluation.data_set import DataSet, data_set
from mm.evaluation.inference import Inference
from mm.evaluation.job import Job
from mm.evaluation.outcome import Outcome
from mm.evaluation.share import SKIN, Share
from mm.evaluation.summary import headlines, summary
from mm.evaluation.task import Task, read_tasks
from mm.evaluation.versions import commit, versions
from mm.fields import suggestion
from mm.models.export import find_export, load_export
from mm.models.fingerprint import model_hash

if TYPE_CHECKING:
    from mm.models.model import Model

__all__ = ["SKIN", "Share", "commit", "evaluate", "headlines", "samples", "summary", "versions"]

TASKS = ("zero_shot", "retrieval", "generation")  # of shards with captions; each has a place of its own in a result
SHOWN = ("held_out_names", "all_names", "drawing_rank")  # of a record in a result's samples
DRAWING = {"limit": 200, "steps": 25, "guidance": 3.0, "solver": "euler", "seed": 0}  # as a result tells them
Loader = Callable[[str], "tuple[Model, dict[str, Tensor], TrainConfig, dict[str, Any]]"]


def evaluate(
    run: str | os.PathLike[str],
    *,
    data: str,
    tasks: Sequence[str] | None = None,
    candidates: str | None = None,
    out: str | os.PathLike[str] | None = None,
    records: str | os.PathLike[str] | None = None,
    resume: bool = False,
    split: str | None = None,
    limit: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    precision: Literal["bf16", "fp32"] = "bf16",
    workers: int = 0,
    progress: bool = True,
    load: Loader | None = None,
) -> dict[str, Any]:
    """Measures the model of a run folder on the held-out shards `data`; returns the result, and writes it to `out`.

    `data`: shards, or a folder in CLIP_benchmark's layout (`mm.evaluation.data_set`), `split` of it. `candidates`:
    shards whose captions and pictures are the whole label set and reference set, by default all splits beside `data`.
    `tasks`: names of shipped ones or paths of TOML files (`mm.evaluation.task`); None is what the data are for, of
    captions zero_shot and generation where the model can. `limit`, `steps`, `guidance` and `seed` change the setting of
    that name of each task that has it; `settings` do too, and one that no task has is refused. `out`: a file, or a
    folder (`mm.evaluation.rows`); `records`: a file of what is known of each sample, .jsonl or .parquet. With `resume`,
    what lies at `out` is returned as it is where tasks, model and data have the same hashes. `precision` is that of the
    model's matrix products; `workers` decode pictures. `load` reads the model where `run` is no folder of mm's.
    Deterministic, and nothing is written before all is measured. Raises ConfigError for a run, shards, a task or a
    setting that cannot be used.
    """
    if (tasks is not None and not tasks) or (limit is not None and limit < 1):
        named = None if tasks is None else list(tasks)
        raise ConfigError(f"tasks = {named}, limit = {limit}: nothing to measure; give a task and a limit of 1")
    given = {"limit": limit, "steps": steps, "guidance": guidance, "seed": seed}
    changes = {name: value for name, value in given.items() if value is not None} | dict(settings or {})
    chosen = None if tasks is None else _tasks(tasks, changes, settings)
    if records is not None:
        rows.check_records(records)
    where = data_set(data, candidates, split)
    samples.check_whole(list(dict.fromkeys([*where.reference, *where.files])))
    folder = Path(run)
    model, extras, config, note = load_export(find_export(run)) if load is None else load(os.fspath(run))
    chosen = chosen or _tasks(_usual(where, config), changes, settings)
    for task in chosen:
        for need in task.needs:
            if getattr(config.objectives, need) is None:
                raise ConfigError(f"tasks: {task.name} needs a model trained with objectives.{need}; name other tasks")
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    inference = Inference(model, config, extras)
    inference.bf16 = precision == "bf16"
    told = {name: changes.get(name, value) for name, value in DRAWING.items()} | {"precision": precision}
    job = Job(
        inference,
        files=where.files,
        reference=where.reference,
        settings=told,
        progress=progress,
        load=load,
        data=where,
        workers=workers,
    )
    name = folder.resolve().name if folder.exists() else os.fspath(run)
    step = int(note["step"]) if str(note.get("step", "")).isdigit() else None
    said = {**hashes.of_shards(where.files), "reference": hashes.of_shards(where.reference)["data"]}
    said |= {"words": where.words_hash(), "model": model_hash(inference)[: hashes.LENGTH]}
    about: dict[str, Any] = {
        "dataset": where.name,
        **_called(name, step),
        "hashes": said,
        "seeds": {"run": config.run.seed, "bootstrap": 0},
        "versions": versions(),
        "commit": commit(),
    }
    if resume and out is not None and (records is None or Path(records).is_file()):
        before = rows.unchanged(out, chosen, said, told)
        if before is not None:
            return before
    result: dict[str, Any] = {
        "run": name,
        "step": step,
        "seed": config.run.seed,
        "data": [Path(file).name for file in where.files],
        "split": where.split,
        "held_out": 0,
        "candidates": 0,
        "unusable": 0,
        "settings": told,
        "versions": about["versions"],
        "commit": about["commit"],
        "seconds": {},
        "samples": [],
        "tasks": [],
    }
    found: list[tuple[str, Outcome]] = []
    for task in chosen:
        started = time.perf_counter()
        outcome = task.run(job)
        result["seconds"][task.name] = round(time.perf_counter() - started, 2)  # apart: all else repeats itself
        own = task.name in TASKS and task.name == task.kind
        if own:
            result[task.name] = outcome.detail
        result["tasks"].append(rows.row(task, outcome, about, {} if own else None))
        found.append((task.name, outcome))
    _count(result, job, [outcome for _, outcome in found])
    if out is not None:
        rows.write_results(result, out)
    if records is not None:
        rows.write_records(records, found)
    return result


def _tasks(names: Sequence[str], changes: Mapping[str, Any], must: Mapping[str, Any] | None) -> list[Task]:
    """The tasks with what is changed of their settings; every name in `must` is one that some task has."""
    chosen = read_tasks(names, changes)
    known = list(dict.fromkeys(key for task in chosen for key in task.settings))
    for key in must or {}:
        if key not in known:
            there = ", ".join(task.name for task in chosen)
            raise ConfigError(f"{key}: {there} has no such setting{suggestion(key, known)}")
    return chosen


def _usual(where: DataSet, config: TrainConfig) -> list[str]:
    """The tasks that data are for, or of captions what the model can."""
    if where.type:
        return [where.type]
    able = {"zero_shot": config.objectives.contrastive, "generation": config.objectives.diffusion}
    return [task for task, objective in able.items() if objective is not None]


def _called(name: str, step: int | None) -> dict[str, str]:
    """`model` and `pretrained`, as open_clip names them; of a run its folder and step."""
    if name.startswith("open_clip:"):
        model, _, tag = name.removeprefix("open_clip:").partition("@")
        if not tag and not model.startswith("local-dir:"):
            model, _, tag = model.rpartition("/") if "/" in model else (model, "", "")
        if model.startswith("local-dir:"):
            model = Path(model.removeprefix("local-dir:")).name
        return {"model": model, "pretrained": Path(tag).name}
    return {"model": name, "pretrained": "" if step is None else f"step-{step}"}


def _count(result: dict[str, Any], job: Job, outcomes: Sequence[Outcome]) -> None:
    """How many samples there were, and with captions which: each once, with what tasks of captions say of it."""
    if job.has_read:
        read = job.samples
        keys, words = read.keys, read.captions
        result |= {"held_out": len(job.held_out), "candidates": len(job.candidates), "unusable": read.unusable}
        result["samples"] = [{"key": keys[place], "caption": words[place]} for place in job.held_out]
    else:
        result["held_out"] = result["candidates"] = max((len(one.records) for one in outcomes), default=0)
        result["unusable"] = max((int(one.detail.get("unusable", 0)) for one in outcomes), default=0)
        told = next((one.records for one in outcomes if one.records and "caption" in one.records[0]), [])
        result["samples"] = [{"key": record["key"], "caption": record["caption"]} for record in told]
    keys = [sample["key"] for sample in result["samples"]]
    for outcome in outcomes:
        records = [record for record in outcome.records if record.get("split") != "train"]
        if [record["key"] for record in records] == keys:
            for sample, record in zip(result["samples"], records, strict=True):
                sample |= {name: record[name] for name in SHOWN if name in record}
