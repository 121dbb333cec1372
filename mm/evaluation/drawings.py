"""The task `fidelity`: how good drawings are, by distances between drawn and real pictures and by their captions.

Every drawing is made from a caption of the shards with a seed of its own, and each split that is drawn from is
compared with its own real pictures. Beside it stand, with the same numbers of pictures, a floor, real pictures of the
other split in the drawings' place, and a ceiling, noise in their place. Letters: n drawings, N real pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from mm.config import ConfigError
from mm.diffusion.sampler import Solver
from mm.evaluation.extractor import extractor
from mm.evaluation.fidelity import BLOCK, NEIGHBOURS, compared, diversity, values, vendi
from mm.evaluation.job import Job
from mm.evaluation.measured import Measure, Pictures
from mm.evaluation.memorisation import memorisation
from mm.evaluation.outcome import Metric, Outcome
from mm.evaluation.samples import evenly
from mm.fields import suggestion

SPLITS = ("held_out", "train")
DEFAULTS: dict[str, Any] = {
    "captions": "held_out",  # whose captions are drawn: held_out, train, or a list of both
    "features": "self",  # the extractor: self, pixels16, or a model that can be loaded
    "limit": 200,  # captions a split, evenly spaced
    "references": 10_000,  # real pictures a split, evenly spaced
    "repeated": 16,  # captions that are drawn several times, for their diversity
    "repeats": 4,  # so many times
    "steps": 25,
    "guidance": 3.0,
    "solver": "euler",
    "seed": 0,
}
LEAST = NEIGHBOURS + 2
NEAREST = "train_distance_ratio, nearer_than_1pct, nearer_than_5pct"


def fidelity(job: Job, settings: dict[str, Any]) -> Outcome:
    """Metrics of `captions` (those of training captions begin with `train/`), a record a drawing, and the detail.

    fid, kid_x1000 (KID times 1,000), precision, recall, density and coverage; clip_score (100 times the cosine of a
    drawing and its caption by the model's own encoders, not below 0: arXiv 2104.08718), caption_acc1 and caption_acc5
    (a drawing's caption is the first, or among the first five, of all captions); what `memorisation` finds;
    diversity, diversity_of_caption (among several drawings of one caption) and vendi. What the model or the shards
    cannot give is named in `detail["left_out"]`. Errors: the jackknife's for kid_x1000 and diversity, resampled
    drawings for fid (the real pictures stay), the mean's for what is one number a picture. Deterministic.

    Raises ConfigError where a setting cannot be used, samples are too few or the model cannot draw.
    """
    settings = checked({**DEFAULTS, **settings})
    if job.inference.config.objectives.diffusion is None:
        raise ConfigError("objectives.diffusion = None: this model was trained without it and cannot draw")
    study = _Study(job, settings, Measure(job, extractor(job, settings["features"])))
    for split in settings["captions"]:
        count, hint = len(study.places[split]), "; name some train-*.tar" if split == "train" else ""
        if count < LEAST:
            raise ConfigError(
                f"captions = {split}: the shards hold {count} such samples, at least {LEAST} needed{hint}"
            )
    outcome = Outcome({}, detail={"extractor": study.measure.extract.about(), "settings": settings})
    for split in settings["captions"]:
        metrics, records, detail = study.of(split)
        prefix = "" if split == "held_out" else f"{split}/"
        outcome.metrics |= {prefix + name: metric for name, metric in metrics.items()}
        # a field that is named as a metric is what this drawing adds to it
        outcome.records += [
            {prefix + name if name in metrics else name: value for name, value in record.items()} for record in records
        ]
        outcome.detail[split] = detail
    outcome.detail["left_out"] = study.left_out
    return outcome


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with `captions` as a list. Raises ConfigError for what cannot be meant."""
    splits = settings["captions"]
    splits = [splits] if isinstance(splits, str) else list(dict.fromkeys(splits))
    for split in splits or [""]:
        if split not in SPLITS:
            raise ConfigError(f"captions = {split!r}{suggestion(str(split), SPLITS)}; give {' or '.join(SPLITS)}")
    if not isinstance(settings["features"], str) or not settings["features"]:
        raise ConfigError(f"features = {settings['features']!r}: must be self, pixels16 or a model that can be loaded")
    for name, low in {"limit": LEAST, "references": LEAST, "repeated": 0, "repeats": 2, "steps": 1, "seed": 0}.items():
        if type(settings[name]) is not int or settings[name] < low:
            raise ConfigError(f"{name} = {settings[name]!r}: must be a whole number, at least {low}")
    if not isinstance(settings["guidance"], int | float) or not math.isfinite(settings["guidance"]):
        raise ConfigError(f"guidance = {settings['guidance']!r}: must be a finite number; 1 is no guidance")
    if settings["solver"] not in get_args(Solver):
        raise ConfigError(f"solver = {settings['solver']!r}: must be one of {', '.join(get_args(Solver))}")
    return {**{name: settings[name] for name in DEFAULTS}, "captions": splits}


@dataclass
class _Study:
    """What all splits share, measured when it is first needed."""

    job: Job
    settings: dict[str, Any]
    measure: Measure
    left_out: dict[str, str] = field(default_factory=dict)  # metrics by why they are not there

    @cached_property
    def places(self) -> dict[str, list[int]]:
        return {"held_out": self.job.held_out, "train": self.job.train}

    @cached_property
    def real(self) -> dict[str, Pictures]:
        """The real pictures of each split that has any: `references` of them, evenly spaced."""
        most = self.settings["references"]
        return {name: self.measure.real(evenly(places, most)) for name, places in self.places.items() if places}

    @cached_property
    def bank(self) -> Pictures | None:
        """All training pictures."""
        places = self.places["train"]
        if not places:
            return None
        return self.real["train"] if len(places) <= self.settings["references"] else self.measure.real(places)

    @cached_property
    def captions(self) -> list[str]:
        return list(dict.fromkeys(self.job.captions([*self.job.candidates, *self.job.held_out])))

    @cached_property
    def texts(self) -> Tensor:
        return self.job.texts(self.captions)

    def of(self, split: str) -> tuple[dict[str, Metric], list[dict[str, Any]], dict[str, Any]]:
        """Metrics, a record a drawing, and detail of the drawings of one split's captions."""
        chosen = evenly(self.places[split], self.settings["limit"])
        words, first = self.job.captions(chosen), self.settings["seed"]
        drawn = self.measure.drawn(words, range(first, first + len(chosen)), self.settings)
        records: list[dict[str, Any]] = [
            {"key": self.job.samples.keys[place], "split": split, "caption": caption, "seed": first + row}
            for row, (place, caption) in enumerate(zip(chosen, words, strict=True))
        ]
        metrics, each, detail = compared(drawn.features, self.real[split].features, first)
        _tell(records, each)
        detail |= {
            "floor": {},
            "ceiling": values(self.measure.noise(len(drawn), first).features, self.real[split].features),
        }
        for other, pictures in self.real.items():
            if other != split and len(pictures) >= LEAST:
                stand_ins = pictures[evenly(list(range(len(pictures))), len(drawn))]
                detail["floor"] = values(stand_ins.features, self.real[split].features)
        if not detail["floor"]:
            self.left_out["floor"] = "no other split with enough pictures"
        if self.measure.contrastive:
            assert drawn.embeddings is not None
            metrics |= self._by_caption(drawn.embeddings, words, records)
            own = self._by_caption(self.job.pictures(chosen), words)
            detail |= {"captions": len(self.captions), "real_by_caption": _plain(own)}
        else:
            self.left_out["clip_score, caption_acc1, caption_acc5"] = "the model was trained without contrast"
        if self.bank is None:
            self.left_out[NEAREST] = "no shards named train-*.tar"
        else:
            keys = [self.job.samples.keys[place] for place in self.places["train"]]
            pixels_too = self.settings["features"] != "pixels16"
            found, detail["memorisation"] = memorisation(
                drawn, self.real["held_out"], self.bank, keys, records, pixels_too
            )
            metrics |= found
            if not found:
                self.left_out[NEAREST] = "every held-out picture equals a training picture"
        various, detail["diversity"] = self._various(drawn, split, words)
        return metrics | various, records, detail

    def _by_caption(
        self, embeddings: Tensor, words: Sequence[str], records: list[dict[str, Any]] | None = None
    ) -> dict[str, Metric]:
        """How well pictures fit the captions `words`, among all captions; `records` get score and rank."""
        place = {caption: row for row, caption in enumerate(self.captions)}
        truth = torch.tensor([place[word] for word in words])
        scores = 100 * (embeddings * self.texts[truth]).sum(1).double().clamp_min(0)
        ranks = _ranks(embeddings, self.texts, truth)
        each = {"clip_score": scores.numpy()}
        each |= {f"caption_acc{k}": (ranks < k).double().numpy() for k in (1, 5)}
        if records is not None:
            _tell(records, {**each, "caption_rank": ranks.numpy()})
        return {name: Metric.mean(values) for name, values in each.items()}

    def _various(self, drawn: Pictures, split: str, words: Sequence[str]) -> tuple[dict[str, Metric], dict[str, Any]]:
        """Diversity among drawings, and among several drawings of a caption; in the detail that of real pictures."""
        real, n = self.real[split], len(drawn)
        alike = real[evenly(list(range(len(real))), n)]  # the Vendi score grows with their number
        metrics = {"diversity": diversity(drawn.features), "vendi": Metric(vendi(drawn.features), n=n)}
        detail: dict[str, Any] = {"real": diversity(real.features).value, "real_vendi": vendi(alike.features)}
        repeated, times = evenly(list(range(n)), self.settings["repeated"]), self.settings["repeats"]
        if not repeated:
            self.left_out["diversity_of_caption"] = "repeated = 0"
            return metrics, detail
        # the first drawing of each is there already; seeds of the others follow on those of all first ones
        others = [row for row in repeated for _ in range(times - 1)]
        first = self.settings["seed"] + n
        more = self.measure.drawn([words[row] for row in others], range(first, first + len(others)), self.settings)
        spread = []
        for number, row in enumerate(repeated):
            same = [drawn.features[row : row + 1], more.features[number * (times - 1) : (number + 1) * (times - 1)]]
            spread.append(diversity(torch.cat(same)).value)
        metrics["diversity_of_caption"] = Metric.mean(spread)
        return metrics, detail | {"repeats": times}


def _ranks(queries: Tensor, bank: Tensor, truth: Tensor) -> Tensor:
    """float64 `[n]`: how many rows of `bank` are nearer to query i than row `truth[i]`; a tie counts half."""
    found = []
    for start in range(0, len(queries), BLOCK):
        similarity = queries[start : start + BLOCK] @ bank.T
        own = similarity.gather(1, truth[start : start + BLOCK, None])
        found.append((similarity > own).sum(1) + ((similarity == own).sum(1) - 1).double() / 2)
    return torch.cat(found)


def _tell(records: list[dict[str, Any]], each: dict[str, np.ndarray]) -> None:
    """Writes row i of every column into record i."""
    for row, record in enumerate(records):
        record |= {name: float(values[row]) for name, values in each.items()}


def _plain(metrics: dict[str, Metric]) -> dict[str, float]:
    return {name: metric.value for name, metric in metrics.items()}
