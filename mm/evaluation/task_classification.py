"""The task `classification`: pictures with a label each, named by the classes' names in templates.

The protocol is CLIP_benchmark's, on its layout of shards as it is. Samples are read in chunks: what is kept of each is
a few numbers. Letters: B pictures, L classes, E embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm.config import ConfigError
from mm.evaluation import hashes
from mm.evaluation.classification import BINS, calibration_statistic, confusion, mean_per_class_recall
from mm.evaluation.files import read_lines
from mm.evaluation.job import Job
from mm.evaluation.outcome import Metric, Outcome
from mm.evaluation.zero_shot import classifier
from mm.fields import suggestion

DEFAULTS: dict[str, Any] = {
    "classes": "shards",
    "label": "cls",
    "templates": "shards",
    "temperature": 1.0,
    "bins": BINS,
    "limit": 0,
}
BESIDE = "shards"  # class names or templates: the files beside the shards
SETS = {"classes": ("imagenet",), "templates": ("openai", "simple")}  # published ones, by name
TOP = 5
LONGEST = 1000  # bytes of a label


def classification(job: Job, settings: dict[str, Any]) -> Outcome:
    """acc1, acc5 (of five classes and more), mean_per_class_recall and ece; the confusion matrix in `detail`.

    Accuracy is argmax over cosines with each class's weights: normalised over the templates, averaged, normalised.
    `ece` is the calibration error of the model's own probabilities, softmax or sigmoid, at `temperature`. Errors are
    those of a bootstrap. Raises ConfigError where names, templates or a sample's label cannot be used.
    """
    settings = checked({**DEFAULTS, **settings})
    names, templates = words(job, "classes", settings), words(job, "templates", settings)
    label_of = reader(settings["label"], names)
    unique = list(dict.fromkeys(names))  # two of ImageNet's names stand for two classes each
    found = classifier(job.inference, unique, templates, progress=job.progress)
    place = {name: row for row, name in enumerate(unique)}
    weights = found.weights[[place[name] for name in names]]  # [L, E]
    stream = job.stream(members=[settings["label"].split(".")[0]], limit=settings["limit"] or None)
    keys: list[str] = []
    truths: list[Tensor] = []
    guesses: list[Tensor] = []
    hits: list[Tensor] = []
    confidences: list[Tensor] = []
    for chunk in stream:
        cosines = job.embed(chunk.images) @ weights.T  # [B, L]
        labels = [label_of(members, key) for key, members in zip(chunk.keys, chunk.members, strict=True)]
        true = torch.tensor(labels)
        top = cosines.topk(min(TOP, len(names)), 1, True, True)[1]
        logits = (found.scale * cosines + found.bias) / settings["temperature"]
        keys += chunk.keys
        truths.append(true)
        guesses.append(cosines.argmax(1))
        hits.append(top == true[:, None])  # [B, 5]
        confidences.append(_confidence(logits, found.kind))
    truth, guess, confidence = (joined(parts) for parts in (truths, guesses, confidences))
    first = torch.cat(hits)
    right, top1, top5 = np.equal(guess, truth), first[:, 0].numpy(), first.any(1).numpy()
    n = len(truth)
    metrics = {"acc1": Metric.ratio(top1, value=int(top1.sum()) / n)}
    if len(names) >= TOP:
        metrics["acc5"] = Metric.ratio(top5, value=int(top5.sum()) / n)
    metrics["mean_per_class_recall"] = mean_per_class_recall(truth, right)
    calibration = calibration_statistic(confidence, right, settings["bins"])
    metrics["ece"] = Metric.resampled(calibration, np.ones(n, np.int64))
    records = []
    for row, key in enumerate(keys):
        record = {"key": key, "truth": int(truth[row]), "guess": int(guess[row]), "guess_name": names[guess[row]]}
        record |= {"confidence": round(float(confidence[row]), 7), "acc1": int(top1[row])}
        records.append(record | ({"acc5": int(top5[row])} if "acc5" in metrics else {}))
    detail = {
        "classes": len(names),
        "templates": len(templates),
        "bins": settings["bins"],
        "confusion": confusion(truth, guess, names),
        "unusable": len(stream.lost),
        "reasons": [f"{entry.key or entry.shard}: {entry.reason}" for entry in stream.lost[:5]],
    }
    said = {"labels": hashes.of_words(names), "templates": hashes.of_words(templates)}
    said["truth"] = hashes.of_words([str(label) for label in truth.tolist()])
    return Outcome(metrics, records, detail, said)


def joined(parts: Sequence[Tensor]) -> NDArray[Any]:
    return torch.cat(list(parts)).numpy()


def words(job: Job, what: str, settings: dict[str, Any]) -> list[str]:
    """Class names or templates: those beside the shards, a published set, the lines of a file, or a list as it is."""
    given = settings[what]
    if not isinstance(given, str):
        return list(given)
    if given == BESIDE:
        if job.data is None:
            raise ConfigError(f'{what} = "{BESIDE}": these shards have no folder; give a list or a file')
        return job.data.classes() if what == "classes" else job.data.templates()
    if given in SETS[what]:
        from mm.evaluation.vocabulary import read_labels, read_templates

        return read_labels(given, repeats=True) if what == "classes" else read_templates(given)
    if what == "templates" and "{" in given:
        return [given.replace("{c}", "{}")]
    return [line.replace("{c}", "{}") if what == "templates" else line for line in read_lines(given, f"one of {what}")]


def reader(label: str, names: Sequence[str]) -> Callable[[dict[str, bytes], str], int]:
    """Takes a sample's members and key to its class. Raises ConfigError for a label that is none of the classes."""
    member, _, path = label.partition(".")
    place = {name: row for row, name in reversed(list(enumerate(names)))}

    def read(members: dict[str, bytes], key: str) -> int:
        if path:
            try:
                value: Any = json.loads(members[member])
            except (ValueError, RecursionError):
                value = None
            for field in path.split("."):
                value = value.get(field) if isinstance(value, dict) else None
        else:  # a number as webdataset reads it ("07" is 7), or a class's name
            value = members[member][:LONGEST].decode("utf-8", "replace").strip()
            value = int(value) if value.isdecimal() and value not in place else value
        number = place.get(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(names):
            near = suggestion(value, names) if isinstance(value, str) else ""
            shown = repr(value)[:40]
            raise ConfigError(f"{key}: {label} = {shown}: is none of the {len(names)} classes{near}; check their list")
        return number

    return read


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for a setting that cannot be meant, and files of words that are not there."""
    for what in SETS:
        given = settings[what]
        if isinstance(given, str):
            known = (BESIDE, *SETS[what])
            if given in known or (what == "templates" and "{" in given) or Path(given).expanduser().is_file():
                continue
            raise ValueError(
                f"{what} = {given!r}: no such file{suggestion(given, known)}; give {', '.join(known)}, a file or a list"
            )
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(word, str) for word in given):
            raise ValueError(f"{what} = {given!r}: must be a list of texts, at least one")
        bad = next((word for word in given if what == "templates" and "{}" not in word.replace("{c}", "{}")), None)
        if bad is not None:
            raise ValueError(f"templates: {bad!r}: has no {{}} where the class name goes")
    settings["templates"] = _holes(settings["templates"])
    label = settings["label"]
    if label != "cls" and not (isinstance(label, str) and label.startswith("json.") and all(label.split("."))):
        raise ValueError(f"label = {label!r}: must be cls, or a field such as json.label")
    if not settings["temperature"] > 0 or settings["temperature"] == float("inf"):
        raise ValueError(f"temperature = {settings['temperature']}: must be a number above 0")
    if settings["bins"] < 1 or settings["limit"] < 0:
        raise ValueError(f"bins = {settings['bins']}, limit = {settings['limit']}: must be at least 1 and 0")
    return settings


def _holes(templates: Any) -> Any:
    """A list of templates with mm's own sign for where the name goes, in place of CLIP_benchmark's."""
    return [line.replace("{c}", "{}") for line in templates] if isinstance(templates, (list, tuple)) else templates


def _confidence(logits: Tensor, kind: str) -> Tensor:
    """The probability `[B]` of the likeliest class."""
    return (logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)).amax(1)
