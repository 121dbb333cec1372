"""The task `zero_shot`: held-out pictures named with captions as labels, those held out or all that there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mm.evaluation import hashes
from mm.evaluation.job import Job
from mm.evaluation.outcome import Metric, Outcome
from mm.evaluation.share import Share, without_skin

DEFAULTS: dict[str, Any] = {}
TOP = (1, 5)


def zero_shot(job: Job, settings: dict[str, Any]) -> Outcome:
    """acc1 and acc5 among all captions, and `held_out_acc1`, `held_out_acc5` among the held-out ones.

    Equal captions are one label. `detail` has the shares that reports show, also without skin tones; a record has the
    five likeliest captions of either list.
    """
    embeddings, truth = job.pictures(job.held_out), job.captions(job.held_out)
    keys = [job.samples.keys[place] for place in job.held_out]
    records: list[dict[str, Any]] = [{"key": key, "caption": word} for key, word in zip(keys, truth, strict=True)]
    found: dict[str, Any] = {}
    outcome = Outcome({}, records, found)
    for name, places in (("held_out_names", job.held_out), ("all_names", job.candidates)):
        others = job.left_out if name == "all_names" else []
        labels = list(dict.fromkeys([*job.captions(places), *truth, *others]))
        guesses = (embeddings @ job.texts(labels).T).topk(min(5, len(labels)), dim=1).indices.tolist()
        for record, row in zip(records, guesses, strict=True):
            record[name] = [labels[guess] for guess in row]
        hits = {k: [record["caption"] in record[name][:k] for record in records] for k in TOP}
        found[name] = {"labels": len(labels), **{f"top{k}": asdict(Share.of(hit)) for k, hit in hits.items()}}
        found[f"{name}_without_skin_tones"] = {
            "labels": len(labels),  # all of them: only pictures are left out
            **{f"top{k}": asdict(without_skin(hit, truth)) for k, hit in hits.items()},
        }
        _measure(outcome, "" if name == "all_names" else "held_out_", hits)
        outcome.hashes["labels"] = hashes.of_words(labels)  # the last: of all names
    outcome.hashes["templates"] = hashes.of_words(["{}"])
    return outcome


def _measure(outcome: Outcome, prefix: str, hits: dict[int, Sequence[bool]] | dict[int, list[bool]]) -> None:
    for k, right in hits.items():
        outcome.metrics[f"{prefix}acc{k}"] = Metric.ratio([float(hit) for hit in right])
        for record, hit in zip(outcome.records, right, strict=True):
            record[f"{prefix}acc{k}"] = int(hit)
