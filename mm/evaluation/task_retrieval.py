"""The task `retrieval`: pictures by their captions and captions by their pictures, several captions a picture.

Pictures are read in chunks; the embeddings are kept, the similarities are not. Letters: I pictures, T captions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mm.data.captions import Captions
from mm.evaluation.added import retrieval_with
from mm.evaluation.job import Job
from mm.evaluation.outcome import Metric, Outcome
from mm.evaluation.retrieval import found_within, own_rows, recall

DEFAULTS: dict[str, Any] = {"captions": "txt", "lines": "auto", "ks": [1, 5, 10], "limit": 0}
LINES = ("auto", "yes", "no")


@dataclass
class Pairs:
    """Pictures with their captions."""

    images: Tensor  # [I, E]
    captions: list[list[str]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def retrieval(job: Job, settings: dict[str, Any]) -> Outcome:
    """`image_retrieval_recall@k`: the share of captions whose picture is among the k nearest pictures.
    `text_retrieval_recall@k`: the share of pictures one of whose captions is among the k nearest captions.

    So CLIP_benchmark and papers count it. Errors are those of a bootstrap over pictures, each with all its captions.
    `detail` has recall by its older names, and in `modalities` that of modalities which the config adds.
    """
    settings = checked({**DEFAULTS, **settings})
    pairs = read(job, settings)
    counts = [len(captions) for captions in pairs.captions]
    texts = job.texts([caption for captions in pairs.captions for caption in captions])  # [T, E]
    own_texts, own_image = own_rows(counts)
    named = zip(pairs.keys, pairs.captions, strict=True)
    outcome = Outcome({}, [{"key": key, "caption": found[0], "captions": len(found)} for key, found in named])
    by_text = found_within(texts, pairs.images, own_image, settings["ks"])
    by_image = found_within(pairs.images, texts, own_texts, settings["ks"])
    for (k, of_texts), of_images in zip(by_text.items(), by_image.values(), strict=True):
        each = of_texts.split(counts)
        sums = [int(part.sum()) for part in each]
        image, text = f"image_retrieval_recall@{k}", f"text_retrieval_recall@{k}"
        outcome.metrics[image] = Metric.ratio(sums, counts, value=_published(of_texts))
        outcome.metrics[text] = Metric.ratio(of_images.float().numpy(), value=_published(of_images))
        for record, part, hit in zip(outcome.records, each, of_images.tolist(), strict=True):
            record[image], record[text] = part.int().tolist(), int(hit)
    outcome.detail = _older(job, pairs, texts, counts, outcome)
    return outcome


def read(job: Job, settings: dict[str, Any]) -> Pairs:
    """The held-out pictures, embedded, with their captions."""
    lines = settings["lines"] == "yes" or (
        settings["lines"] == "auto" and job.data is not None and job.data.type == "retrieval"
    )
    limit = settings["limit"] or None
    if job.has_read and not lines and settings["captions"] == DEFAULTS["captions"]:
        places = job.held_out[:limit]
        read = job.samples
        texts = [[caption] for caption in job.captions(places)]
        keys, shards = ([column[place] for place in places] for column in (read.keys, read.shards))
        return Pairs(job.pictures(places), texts, keys, shards)
    pairs, parts = Pairs(torch.empty(0)), []
    stream = job.stream(captions=settings["captions"], limit=limit)
    for chunk in stream:
        parts.append(job.embed(chunk.images))
        for captions in chunk.captions:
            whole = captions if lines or settings["captions"].startswith("json") else captions[:1]
            pairs.captions.append([line for text in whole for line in text.splitlines()] if lines else whole)
        pairs.keys += chunk.keys
        pairs.shards += chunk.shards
    pairs.images = torch.cat(parts)
    pairs.lost = [f"{entry.key or entry.shard}: {entry.reason}" for entry in stream.lost]
    return pairs


def _published(hits: Tensor) -> float:
    """The mean in float32, as CLIP_benchmark prints it."""
    return hits.float().mean().item()


def _older(job: Job, pairs: Pairs, texts: Tensor, counts: list[int], outcome: Outcome) -> dict[str, Any]:
    """Recall as `image_to_text@k`: of one caption a picture a tie counts half, so that a model which says the same of
    everything finds nothing; and that of added modalities."""
    found: dict[str, Any] = {"pairs": len(pairs.keys)}
    if max(counts) == 1:
        found |= recall(pairs.images, texts)
    else:
        names = {"text_retrieval_recall": "image_to_text", "image_retrieval_recall": "text_to_image"}
        for name, metric in outcome.metrics.items():
            direction, _, k = name.partition("@")
            found[f"{names[direction]}@{k}"] = metric.value
    if job.inference.config.model.modalities:
        first = texts[torch.tensor([0, *counts[:-1]]).cumsum(0)]
        samples = list(zip(pairs.shards, pairs.keys, strict=True))
        pooled = {"image": pairs.images, "text": first}
        found["modalities"] = retrieval_with(job.inference, job.files, samples, pooled, progress=job.progress)
    found["captions"] = sum(counts)
    found["unusable"], found["reasons"] = len(pairs.lost), pairs.lost[:5]
    return found


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for a setting that cannot be meant."""
    Captions(settings["captions"])
    if settings["lines"] not in LINES:
        raise ValueError(f"lines = {settings['lines']!r}: must be one of {', '.join(LINES)}")
    ks = settings["ks"]
    if not isinstance(ks, list) or not ks or not all(isinstance(k, int) and k > 0 for k in ks):
        raise ValueError(f"ks = {ks!r}: must be a list of whole numbers above 0, such as [1, 5, 10]")
    if settings["limit"] < 0:
        raise ValueError(f"limit = {settings['limit']}: must be at least 0; 0 is all")
    return settings
