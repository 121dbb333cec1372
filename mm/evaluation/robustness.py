"""Robustness: zero-shot classification of pictures made worse, by corruption and severity (arXiv 1903.12261).

The pictures are corrupted at the model's size, in memory, right before they are encoded. The paper divides errors by
those of AlexNet; here the share that is right is reported as it is, and how much of the clean one is lost.

Letters: n pictures, C corruptions, S severities, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mm.config import ConfigError
from mm.evaluation.corruptions import CORRUPTIONS, SEVERITIES, check, corrupted
from mm.evaluation.job import Job
from mm.evaluation.labels import BESIDE, Label, check_words, class_names, read_label, words
from mm.evaluation.outcome import RESAMPLES, Metric, Outcome
from mm.evaluation.samples import evenly
from mm.evaluation.stream import Chunk
from mm.evaluation.zero_shot import classifier

CHUNK = 100  # pictures whose corrupted versions are held at once
DEFAULTS: dict[str, Any] = {
    "label": "",
    "captions": "txt",
    "classes": BESIDE,
    "templates": BESIDE,
    "corruptions": [],
    "severities": list(SEVERITIES),
    "limit": 200,
    "seed": 0,
}


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """All settings. Raises ValueError for one that cannot be used."""
    settings = DEFAULTS | settings
    names, severities = _lists(settings)
    for name in names:
        check(name)
    for severity in severities:
        check(names[0], severity)
    if not severities or len(set(severities)) < len(severities) or len(set(names)) < len(names):
        raise ValueError(f"severities = {severities}, corruptions = {names}: give at least one, and each once")
    for name in ("limit", "seed"):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} = {value!r}: must be a whole number of at least 0")
    Label(settings["label"] or "caption", settings["captions"])
    for name in ("classes", "templates"):
        check_words(name, settings[name])
    return settings


def robustness(job: Job, settings: dict[str, Any]) -> Outcome:
    """Top-1 accuracy of the held-out pictures, clean and corrupted; settings as in tasks/robustness.toml.

    Metrics: `acc1`; `acc1_corrupted`, its mean over corruptions and severities; `acc1_NAME` by corruption and
    `acc1_severity_S` by severity; `relative_drop`, the share of `acc1` that is lost. Errors are standard deviations
    over bootstrap draws of pictures. Raises ConfigError where the shards have no classes, ValueError for a wrong
    setting.
    """
    settings = checked(settings)
    names, severities = _lists(settings)
    label = read_label(settings["label"], job.files, settings["captions"])
    found = label.survey(job.files)
    labelled = [number for number, one in enumerate(found) if one is not None]
    if not labelled:
        raise ConfigError(f"label = {label.spec!r}: no sample of {job.files[0]} has one; name another")
    given = words(settings["classes"], "classnames.txt", job.files)
    named = class_names(label, [one for one in found if one is not None], given)
    guess = _zero_shot(job, list(named.values()), _templates(job, label, settings["templates"]))
    place = {one: number for number, one in enumerate(named)}
    stream = job.stream(
        captions=label.captions,
        members=label.members,
        numbers=evenly(labelled, settings["limit"] or len(labelled)),
        chunk=CHUNK,
        progress="",
    )
    keys, truths, guesses = list[str](), list[int](), list[Tensor]()
    total = len(stream) * (1 + len(names) * len(severities))
    quiet = None if job.progress else True  # None: shown on a terminal only
    with tqdm(total=total, desc="corrupting pictures", unit="picture", disable=quiet, leave=False) as bar:
        for chunk in stream:
            truths += [place[label(*row)] for row in zip(chunk.captions, chunk.members, strict=True)]
            keys += chunk.keys
            guesses.append(_guesses(chunk, guess, names, severities, settings["seed"], bar.update))
    right = torch.cat(guesses) == torch.tensor(truths)[:, None]  # [n, 1 + C S]
    classes = list(named)
    clean = torch.cat(guesses)[:, 0].tolist()
    outcome = measured(right.numpy(), names, severities, seed=settings["seed"])
    table = right[:, 1:].unflatten(1, (len(names), len(severities)))  # [n, C, S]
    outcome.records = [
        {
            "key": key,
            "truth": classes[truth],
            "guess": classes[one],
            "acc1": int(truth == one),
            "acc1_corrupted": float(rows.double().mean()),
            **{f"acc1_{name}": row.int().tolist() for name, row in zip(names, rows, strict=True)},
            **{f"acc1_severity_{s}": row.int().tolist() for s, row in zip(severities, rows.T, strict=True)},
        }
        for key, truth, one, rows in zip(keys, truths, clean, table, strict=True)
    ]
    outcome.detail |= {
        "label": label.spec,
        "classes": len(classes),
        "unlabelled": len(found) - len(labelled),
        "unusable": len(stream.lost),
    }
    return outcome


def measured(right: np.ndarray, names: Sequence[str], severities: Sequence[int], *, seed: int = 0) -> Outcome:
    """What `robustness` reports of yes-or-no outcomes `[n, 1 + C S]`, of which the first column is of clean pictures.

    `detail["table"]`: the share that is right by corruption, one number a severity.
    """
    clean, worse = right[:, :1].astype(float), right[:, 1:].reshape(-1, len(names), len(severities)).astype(float)
    columns = np.concatenate([clean, worse.mean((1, 2))[:, None], worse.mean(2), worse.mean(1)], axis=1)
    titles = ["acc1", "acc1_corrupted", *(f"acc1_{name}" for name in names)]
    titles += [f"acc1_severity_{severity}" for severity in severities]
    values, draws = columns.mean(0), _resampled(columns, seed)  # [M], [R, M]
    count = len(right)
    errors = draws.std(0, ddof=1) if count > 1 else np.full(len(titles), math.nan)
    metrics = {
        title: Metric(float(value), float(error), count)
        for title, value, error in zip(titles, values, errors, strict=True)
    }
    drops = [1 - row[1] / row[0] for row in draws if row[0] > 0]
    drop = 1 - float(values[1] / values[0]) if values[0] > 0 else math.nan
    metrics["relative_drop"] = Metric(
        drop, float(np.std(drops, ddof=1)) if count > 1 and len(drops) > 1 else math.nan, count
    )
    shares = worse.mean(0).tolist()
    table = {"severities": list(severities), "table": dict(zip(names, shares, strict=True))}
    return Outcome(metrics, detail=table)


def _resampled(columns: np.ndarray, seed: int) -> np.ndarray:
    """Means `[RESAMPLES, M]` of rows drawn with replacement, the same rows for all columns (Efron, 1979)."""
    rng, n = np.random.default_rng(seed), len(columns)
    return np.stack([np.bincount(rng.integers(0, n, n), minlength=n) @ columns / n for _ in range(RESAMPLES)])


def _guesses(
    chunk: Chunk,
    guess: Callable[[Tensor], Tensor],
    names: Sequence[str],
    severities: Sequence[int],
    seed: int,
    done: Callable[[int], Any],
) -> Tensor:
    """int64 `[n, 1 + C S]`: the class of each picture as it is, then of each corruption at each severity."""
    columns = [guess(chunk.images)[:, None]]
    done(len(chunk))
    for name in names:  # all severities together: full micro-batches
        worse = [corrupted(chunk.images, chunk.keys, name, severity, seed=seed) for severity in severities]
        columns.append(guess(torch.cat(worse)).unflatten(0, (len(severities), len(chunk))).T)
        done(len(chunk) * len(severities))
    return torch.cat(columns, dim=1)


def _zero_shot(job: Job, names: Sequence[str], templates: Sequence[str]) -> Callable[[Tensor], Tensor]:
    """Uint8 pictures `[n, 3, H, W]` to the places of their nearest names; of equal names the first."""
    unique = list(dict.fromkeys(names))
    weights = classifier(job.inference, unique, templates, progress=job.progress).weights
    weights = weights[[unique.index(name) for name in names]]  # [K, E]
    return lambda images: (job.inference.embed("image", (images,), micro_batch=CHUNK) @ weights.T).argmax(1)


def _templates(job: Job, label: Label, given: str | Sequence[str]) -> list[str]:
    """Those given, or beside shards with classes; of none, and for captions unless they are given, the bare name."""
    if given == BESIDE and not label.members:
        return ["{}"]
    lines = words(given, "zeroshot_classification_templates.txt", job.files)
    return [line.replace("{c}", "{}") for line in lines] or ["{}"]


def _lists(settings: dict[str, Any]) -> tuple[list[str], list[int]]:
    names, severities = settings["corruptions"], settings["severities"]
    for name, given in (("corruptions", names), ("severities", severities)):
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"{name} = {given!r}: must be a list; write [{given!r}]")
    return list(names) or list(CORRUPTIONS), list(severities)
