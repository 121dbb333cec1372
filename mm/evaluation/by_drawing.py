"""The generator as a zero-shot classifier, by itself or as a second opinion on what the contrastive one holds likely.

    classify = model.classifier(labels, mode="hybrid", k=10, levels=32)

"diffusion": the label under which the denoiser draws an image back best (arXiv 2303.16203), with labels dropped in
rounds. "hybrid": the `k` labels that the contrastive classifier holds likeliest, ranked again by
alpha log p + beta score, see `mm.evaluation.explained`. How much the drawing should count differs between models and
between label sets, and may be nothing: `calibrate` on labelled images finds alpha and beta. Uncalibrated, it counts
little.

Letters: B images, L labels, K candidates of an image, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mm.config import ConfigError
from mm.evaluation.explained import Explainer, rounds_of, survivors
from mm.evaluation.fusion import Fusion, fit, fused
from mm.evaluation.predictions import Predictions, check_k, ranked
from mm.fields import suggestion

if TYPE_CHECKING:
    from PIL import Image

    from mm.evaluation.inference import Inference
    from mm.evaluation.zero_shot import Classifier

MODES = ("diffusion", "hybrid")
_TINY = 1e-30  # a probability whose logarithm is still a number in float32


@dataclass(kw_only=True)
class Options:
    """What a classifier by drawing may be told."""

    k: int = 10  # hybrid: labels that are looked at again
    levels: int = 32  # noise levels a label, evenly spaced: denoiser forwards a label and image
    rounds: int = 1  # in which the levels are dealt out
    keep: float = 0.25  # of the labels, after each round but the last
    alpha: float = 1.0  # hybrid: weight of log p by the contrastive classifier
    beta: float = 1.0  # weight of the score by drawing: little; `calibrate` finds what a model and its labels deserve
    seed: int = 0  # of the noise

    @classmethod
    def read(cls, mode: str, given: dict[str, Any]) -> Options:
        """The defaults of a mode with what is given. Raises ValueError for what cannot be meant."""
        usual: dict[str, Any] = {"rounds": 4, "beta": 25.0} if mode == "diffusion" else {}
        known = [field.name for field in fields(cls) if mode == "hybrid" or field.name not in ("k", "alpha")]
        for name, value in given.items():
            if name not in known:
                raise ValueError(
                    f"{name} = {value!r}: no option of mode {mode}{suggestion(name, known)}; it has {', '.join(known)}"
                )
        levels = given.get("levels", cls.levels)
        if "rounds" not in given and isinstance(levels, int):
            usual["rounds"] = max(1, min(usual.get("rounds", 1), levels))
        options = cls(**{**usual, **given})
        options.check()
        return options

    def check(self) -> None:
        """Raises ValueError naming what cannot be meant."""
        for name, most in (("k", None), ("levels", 1000), ("rounds", self.levels)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}: must be at least 1, a whole number")
            if most is not None and value > most:
                raise ValueError(f"{name} = {value}: must be at most {'levels, ' if name == 'rounds' else ''}{most}")
        for name in ("keep", "alpha", "beta"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0 or (name == "keep" and not 0 < value <= 1):
                allowed = "above 0 and at most 1" if name == "keep" else "of at least 0"
                raise ValueError(f"{name} = {value!r}: must be a number {allowed}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed!r}: must be a whole number of at most 63 bits")


class ByDrawing:
    """Callable: images to probabilities of `labels`. Made by `classifier`; `options` may be changed."""

    def __init__(
        self,
        labels: Sequence[str],
        explainer: Explainer,
        options: Options,
        *,
        base: Classifier | None = None,
        progress: bool = False,
    ) -> None:
        """`base`: the contrastive classifier of the same labels, whose likeliest are the candidates; None: all are."""
        self.labels, self.explainer, self.options, self.base = list(labels), explainer, options, base
        self.kind = "softmax" if base is None else base.kind
        self.inference, self.progress = explainer.inference, progress

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Probabilities `[B, L]` float32: over the labels, or of each by itself where the contrastive ones are.

        Raises ValueError naming what is not an image.
        """
        columns = self.inference.prepare("image", images)
        return self.scores_of_images(columns[0]) if columns else torch.zeros(0, len(self.labels))

    def scores_of_images(self, images: Tensor) -> Tensor:
        """`__call__` for pictures at the model's size, uint8 `[B, 3, H, W]`."""
        contrastive, places, prior = self._candidates(images)
        scores = self._explained(images, places, prior) if len(images) else prior
        return fused(contrastive, places, prior, scores, self.kind)

    def top(self, image: Image.Image, k: int = 5) -> list[tuple[str, float]]:
        """The `k` likeliest labels (fewer where there are fewer) with their probabilities, best first.

        Raises ValueError where `k` is not positive or `image` is not an image.
        """
        check_k(k)
        return ranked(self.labels, self([image]), k)[0]

    def stream(self, shards: str | Sequence[str], *, progress: bool = False, **options: Any) -> Predictions:
        """Iterates over the pictures of some shards, as `Classifier.stream` does and with its options."""
        see = self.inference.processor("image")
        return Predictions(self.labels, self.scores_of_images, see, shards, progress=progress, **options)

    def opinions(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both opinions on each candidate of uint8 `[B, 3, H, W]`: places in `labels`, log p (sigmoid: logit), score.

        int64 and twice float64 `[B, K]`; the score is the mean over all levels, and no label is dropped.
        """
        _, places, prior = self._candidates(images)
        levels = self.options.levels
        title = "drawing" if self.progress else ""
        scores = self.explainer.scores(self.explainer.latents(images), places, range(levels), title) / levels
        return places, prior, scores

    def calibrate(self, images: Sequence[Image.Image] | Tensor, truth: Tensor | Sequence[int | str]) -> Fusion:
        """Sets `options.alpha` and `beta` to what gives the true labels of some images the highest likelihood.

        `images`: pictures, or uint8 `[N, 3, H, W]` at the model's size; `truth`: the right label of each, or its place
        in `labels`. Images whose right label is no candidate say nothing and are left out. Costs K x levels forwards
        an image. Raises ValueError where nothing is left or the arguments do not fit.
        """
        if not isinstance(images, Tensor):
            columns = self.inference.prepare("image", images)
            images = columns[0] if columns else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        wanted = self._places(truth)
        if len(wanted) != len(images):
            raise ValueError(f"truth: {len(wanted)} labels for {len(images)} images; give one for each")
        told = (self._candidates(images)[1] == wanted[:, None]).any(1).nonzero()[:, 0]
        if not len(told):
            raise ValueError(f"truth: of {len(images)} images none has its label among the candidates; give more")
        places, prior, scores = self.opinions(images[told])
        own = (places == wanted[told, None]).int().argmax(1)
        found = fit(prior, scores, own, free=self.base is not None)
        self.options.alpha, self.options.beta = found.alpha, found.beta
        return found

    def _places(self, truth: Tensor | Sequence[int | str]) -> Tensor:
        where = {label: place for place, label in enumerate(self.labels)}
        found = []
        for one in truth.tolist() if isinstance(truth, Tensor) else truth:
            place = where.get(one, -1) if isinstance(one, str) else one
            if not 0 <= place < len(self.labels):
                raise ValueError(f"truth: {one!r} is none of the {len(self.labels)} labels")
            found.append(place)
        return torch.tensor(found, dtype=torch.int64)

    def _candidates(self, images: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Contrastive probabilities `[B, L]`, candidates' places `[B, K]`, and their logits `[B, K]` float64.

        Without a contrastive classifier: None, all labels, and logits of 0.
        """
        if self.base is None:
            places = torch.arange(len(self.labels)).expand(len(images), -1)
            return None, places, torch.zeros(places.shape, dtype=torch.float64)
        p = self.base.probabilities(self.inference.embed("image", (images,)))
        count = min(self.options.k, len(self.labels))
        places = torch.stack([row.topk(count).indices for row in p]) if len(p) else torch.zeros(0, count).long()
        prior = torch.zeros(places.shape, dtype=torch.float64)
        for row, chosen in zip(prior, p.double().gather(1, places).clamp_min(_TINY), strict=True):
            row += chosen.log() - ((1 - chosen).clamp_min(_TINY).log() if self.kind == "sigmoid" else 0)
        return p, places, prior

    def _explained(self, images: Tensor, places: Tensor, prior: Tensor) -> Tensor:
        """alpha prior + beta score of each candidate, float64 `[B, K]`, at the end of all rounds.

        After each round the best `keep` of an image's candidates stay (successive elimination). One that was dropped
        ends below all that stayed, by as much as it was behind when it went.
        """
        options = self.options
        pixels, alive = self.explainer.latents(images), torch.arange(places.shape[1]).expand(len(places), -1)
        sums, seen = torch.zeros(places.shape, dtype=torch.float64), 0
        dropped: list[tuple[Tensor, Tensor, Tensor]] = []  # places of those that stay and go, and how far behind
        plan = rounds_of(options.levels, options.rounds)
        for number, levels in enumerate(plan, 1):
            title = f"drawing, round {number} of {len(plan)}" if self.progress else ""
            sums = sums + self.explainer.scores(pixels, places.gather(1, alive), levels, title)
            seen += len(levels)
            value = options.alpha * prior.gather(1, alive) + options.beta * (sums / seen)
            left = survivors(alive.shape[1], options.keep)
            if number == len(plan) or left == alive.shape[1]:
                continue
            order = torch.stack([row.argsort(descending=True, stable=True) for row in value])
            stay, go = order[:, :left], order[:, left:]
            behind = value.gather(1, go) - value.gather(1, stay[:, -1:])
            dropped.append((alive.gather(1, stay), alive.gather(1, go), behind))
            alive, sums = alive.gather(1, stay), sums.gather(1, stay)
        found = torch.zeros(places.shape, dtype=torch.float64).scatter(1, alive, value)
        for stayed, gone, behind in reversed(dropped):
            found = found.scatter(1, gone, found.gather(1, stayed).amin(1, keepdim=True) + behind)
        return found


def classifier(
    base: Classifier | None,
    inference: Inference,
    *,
    mode: Literal["diffusion", "hybrid"],
    labels: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    progress: bool = False,
    **options: Any,
) -> ByDrawing:
    """A classifier that draws. `base`: the contrastive one, which "hybrid" needs; `labels` are its labels by default.

    The denoiser reads one sentence a label: the first of `templates`. `options` are those of `Options`: k, levels,
    rounds, keep, alpha, beta, seed. Item i is the same whatever else is in a call. It costs about K x levels denoiser
    forwards an image, less where `rounds` drop labels early. Raises ValueError for an option that cannot be meant,
    ConfigError where the model was trained without what the mode needs.
    """
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r}: must be diffusion or hybrid{suggestion(str(mode), MODES)}")
    read = Options.read(mode, options)
    if mode == "hybrid" and base is None:
        raise ConfigError("mode = 'hybrid': needs a model trained with objectives.contrastive; use mode 'diffusion'")
    if labels is None and base is None:
        raise ValueError("labels = None: nothing to choose from; give at least one label")
    names = list(labels if labels is not None else base.labels if base is not None else ())
    template = "{}" if not templates else templates[0]
    texts = [template.replace("{}", name) for name in names]
    explainer = Explainer(inference, texts, levels=read.levels, seed=read.seed)
    return ByDrawing(names, explainer, read, base=base if mode == "hybrid" else None, progress=progress)
