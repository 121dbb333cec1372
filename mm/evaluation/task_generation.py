"""The task `generation`: whether the right picture is among the nearest to what is drawn from its caption."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mm.evaluation import samples
from mm.evaluation.images import pixel_rank
from mm.evaluation.job import BATCH, Job
from mm.evaluation.outcome import Metric, Outcome
from mm.evaluation.share import Share, without_skin

DEFAULTS: dict[str, Any] = {"limit": 200, "steps": 25, "guidance": 3.0, "seed": 0, "near": 10}


def generation(job: Job, settings: dict[str, Any]) -> Outcome:
    """`near10`: the share of drawings whose picture is among the ten nearest of all, and `train/near10`.

    The held-out captions are drawn and, where there are train shards, `limit` of theirs; drawing i has the seed
    `seed` + i. Nearness is that of `mm.evaluation.images.pixel_rank`.
    """
    train = samples.evenly(job.train, settings["limit"])
    wanted = [*train, *job.held_out]
    bank = list(dict.fromkeys([*job.candidates, *job.held_out]))
    seeds = range(settings["seed"], settings["seed"] + len(wanted))
    drawn = job.inference.generate(
        job.captions(wanted),
        seeds=seeds,
        steps=settings["steps"],
        guidance=settings["guidance"],
        micro_batch=BATCH["draw"],
        progress=job.progress,
    )
    ranks = pixel_rank(drawn, job.samples.images[bank], samples.index_of(wanted, bank)).tolist()
    near = [rank < settings["near"] for rank in ranks]
    name = f"near{settings['near']}"
    found: dict[str, Any] = {"references": len(bank), "near": settings["near"]}
    outcome = Outcome({}, detail=found)
    for split, places, first in (("train", train, 0), ("held_out", job.held_out, len(train))):
        if not places:
            continue
        hits = near[first : first + len(places)]
        found[split] = asdict(Share.of(hits))
        found[f"{split}_without_skin_tones"] = asdict(without_skin(hits, job.captions(places)))
        metric = name if split == "held_out" else f"{split}/{name}"
        outcome.metrics[metric] = Metric.ratio([float(hit) for hit in hits])
        for place, number in zip(places, range(first, first + len(places)), strict=True):
            key, caption = job.samples.keys[place], job.samples.captions[place]
            record = {"key": key, "caption": caption, "split": split, "seed": seeds[number]}
            outcome.records.append({**record, "drawing_rank": ranks[number], metric: int(near[number])})
    return outcome


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for numbers with which nothing can be drawn or found."""
    for key, least in (("limit", 1), ("steps", 1), ("near", 1), ("seed", 0)):
        if settings[key] < least:
            raise ValueError(f"{key} = {settings[key]}: must be at least {least}")
    return settings
