"""A linear probe: how well a straight line through the frozen vision embeddings tells classes apart.

As in CLIP's paper (arXiv 2103.00020, A.3), but for the features: the paper's are those before the projection into the
shared space, which a model of ours does not give out. `features = "pooled"` are its unit-norm embeddings, "tokens" the
mean of the encoder's final tokens, before pooling and projection.

Letters: B pictures of a chunk, N pictures, E embedding, D width of the encoder, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.config import ConfigError
from mm.data.remote import is_remote
from mm.data.shards import expand
from mm.evaluation.job import BATCH, Job
from mm.evaluation.labels import Label, ordered
from mm.evaluation.outcome import Metric, Outcome
from mm.evaluation.regression import MOST_ITERATIONS, few, linear_probe
from mm.evaluation.samples import is_train
from mm.evaluation.stream import Chunk, Stream
from mm.types import Batch

FEATURES = ("pooled", "tokens")
DEFAULTS: dict[str, Any] = {
    "label": "cls",
    "captions": "txt",
    "train": "",
    "features": "pooled",
    "shots": 0,
    "validation": 0.2,
    "c": 0.0,
    "iterations": MOST_ITERATIONS,
    "seed": 0,
}


@dataclass
class Features:
    """Row i of each belongs to picture i."""

    rows: np.ndarray  # float32 [N, E] or [N, D]
    labels: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    unusable: int = 0  # samples left out: no picture, or no label


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """All settings. Raises ValueError for one that cannot be used."""
    given = DEFAULTS | settings
    if given["features"] not in FEATURES:
        raise ValueError(f"features = {given['features']!r}: must be one of {', '.join(FEATURES)}")
    for name, kind, low, high in (
        ("shots", int, 0, math.inf),
        ("iterations", int, 1, math.inf),
        ("seed", int, 0, math.inf),
        ("validation", (int, float), 0.01, 0.9),
        ("c", (int, float), 0, 1e12),
    ):
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            what = f"{'a whole number' if kind is int else 'a number'} from {low}"
            raise ValueError(f"{name} = {value!r}: must be {what}{'' if high == math.inf else f' to {high:g}'}")
    if given["label"] == "caption":
        raise ValueError("label = 'caption': each is a class of its own; give json.FIELD or caption:PATTERN")
    Label(given["label"], given["captions"])
    return given


def probe(job: Job, settings: dict[str, Any]) -> Outcome:
    """Logistic regression from the training pictures' embeddings to classes, on the held-out pictures.

    Settings as in tasks/probe.toml. Metrics: `acc1`, `acc5` where there are five classes, `mean_per_class_recall` over
    the classes of the held-out pictures. `detail` has the regularisation that was chosen and what every other one
    reached on the held-out training pictures. Raises ConfigError for shards without classes or without training
    pictures, ValueError for a wrong setting.
    """
    settings = checked(settings)
    files = training_files(job.files, job.reference, settings["train"])
    label = Label(settings["label"], settings["captions"])
    train = _read(job, files, label, settings, "reading training pictures", settings["shots"])
    classes = ordered(train.labels)
    test = _read(job, job.files, label, settings, "reading held-out pictures")
    place = {one: number for number, one in enumerate(classes)}
    truth = np.array([place.get(one, -1) for one in test.labels])  # -1: never seen, and never guessed
    if (truth < 0).all():
        raise ConfigError(f"label = {label.spec!r}: no class of {job.files[0]} is among the training classes")
    fit = linear_probe(
        train.rows,
        np.array([place[one] for one in train.labels]),
        test.rows,
        c=settings["c"] or None,
        held_out=settings["validation"],
        seed=settings["seed"],
        most=settings["iterations"],
    )
    order = np.argsort(-fit.scores, axis=1, kind="stable")[:, :5]  # [M, 5]
    hits = order == truth[:, None]
    metrics = _metrics(hits, test.labels, len(classes), settings["seed"])
    hit = {name: hits[:, : int(name[3:])].any(1) for name in ("acc1", "acc5") if name in metrics}
    return Outcome(
        metrics,
        [
            {"key": key, "truth": one, "guess": classes[row[0]], "top": [classes[other] for other in row]}
            | {name: int(hit[name][number]) for name in hit}
            for number, (key, one, row) in enumerate(zip(test.keys, test.labels, order, strict=True))
        ],
        {
            "label": label.spec,
            "features": settings["features"],
            "standardised": True,
            "classes": len(classes),
            "training_pictures": len(train.labels),
            "validation_pictures": fit.validation,
            "c": fit.c,
            "validation_acc1_by_c": {f"{c:.3g}": share for c, share in fit.curve.items()},
            "iterations": fit.iterations,
            "converged": fit.converged,
            "unusable": test.unusable,
            "unusable_training": train.unusable,
            "unseen_classes": len(set(test.labels) - set(classes)),
        },
    )


def _metrics(hits: np.ndarray, labels: Sequence[str], classes: int, seed: int) -> dict[str, Metric]:
    """Of which of five guesses is right, bool `[M, 5]`; recalls are of the classes that the held-out pictures have, as
    in CLIP_benchmark."""
    right = hits[:, 0].astype(float)
    metrics = {"acc1": Metric.mean(right)}
    if classes >= 5:
        metrics["acc5"] = Metric.mean(hits.any(1).astype(float))
    groups = np.unique(labels, return_inverse=True)[1]

    def recall(places: np.ndarray) -> float:
        there = np.bincount(groups[places])
        found = np.bincount(groups[places], right[places])
        return float((found[there > 0] / there[there > 0]).mean())

    metrics["mean_per_class_recall"] = Metric.bootstrap(recall, len(labels), seed=seed)
    return metrics


def training_files(held_out: Sequence[str], reference: Sequence[str], spec: str = "") -> list[str]:
    """The shards that `spec` names; of "" the train- ones of `reference`, or those of the folder `train` beside the
    held-out shards' own. Raises ConfigError where there are none, or where one is held out."""
    if spec:
        files = expand(spec, mixed=True)
        both = sorted(set(files) & set(held_out))
        if both:
            raise ConfigError(f"train = {spec!r}: {both[0]} is held out too; leave it out")
        return files
    away = set(held_out)
    files = [file for file in reference if is_train(file) and file not in away]
    if files:
        return files
    folders = {Path(file).resolve().parent for file in held_out if not is_remote(file)}
    for folder in sorted(folders):
        if folder.name != "train":
            files += sorted(str(path) for path in (folder.parent / "train").glob("*.tar"))
    files = [file for file in dict.fromkeys(files) if file not in away]
    if not files:
        raise ConfigError(f"train = '': no train-*.tar and no folder train beside {held_out[0]}; name training shards")
    return files


def _read(
    job: Job, files: Sequence[str], label: Label, settings: dict[str, Any], title: str, shots: int = 0
) -> Features:
    """The features of labelled samples, a chunk at a time; with `shots` of so many of each class."""
    numbers = None
    if shots:
        found = label.survey(files)
        known = [number for number, one in enumerate(found) if one is not None]
        if not known:
            raise ConfigError(f"label = {label.spec!r}: no sample of {files[0]} has one; name another")
        numbers = [known[place] for place in few(np.array([found[n] for n in known]), shots, settings["seed"])]
    stream = job.stream(
        files,
        captions=label.captions,
        members=label.members,
        numbers=numbers,
        progress=title if job.progress else "",
    )
    result, parts, unlabelled = Features(np.zeros((0, 0), np.float32)), list[np.ndarray](), 0
    for chunk in _told(stream, label):
        rows = []
        for row, (captions, members) in enumerate(zip(chunk.captions, chunk.members, strict=True)):
            try:
                result.labels.append(label(captions, members))
            except ValueError:  # counted, and told in the result
                unlabelled += 1
                continue
            result.keys.append(chunk.keys[row])
            rows.append(row)
        if rows:
            parts.append(_features(job, chunk.images[rows], settings["features"]).numpy())
    if not parts:
        raise ConfigError(f"label = {label.spec!r}: no sample of {files[0]} has one; name another")
    result.rows, result.unusable = np.concatenate(parts), len(stream.lost) + unlabelled
    return result


def _told(stream: Stream, label: Label) -> Iterator[Chunk]:
    """The chunks of a stream, which of shards without labels says that this is what they lack."""
    try:
        yield from stream
    except ConfigError as error:
        raise ConfigError(f"label = {label.spec!r}: {error}; name a label that the shards have") from error


def _features(job: Job, images: Tensor, kind: str) -> Tensor:
    """float32 `[B, E]` or `[B, D]` on the CPU, of uint8 `[B, 3, H, W]`."""
    if kind == "pooled":
        return job.inference.embed("image", (images,), micro_batch=BATCH["image"])
    inference, model, size = job.inference, job.inference.model, BATCH["image"]
    parts = []
    with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=inference.bf16):
        for start in range(0, len(images), size):
            some = images[start : start + size]
            whole = torch.cat([some, some[:1].expand(size - len(some), *some.shape[1:])])  # as in `Inference`
            tokens = model.encode(Batch({"image": whole}).to(model.device))["image"].tokens.x  # [B, N, D]
            parts.append(tokens.float().mean(1)[: len(some)].cpu())
    return torch.cat(parts)
