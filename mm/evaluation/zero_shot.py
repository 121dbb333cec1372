"""Zero-shot classification: labels written into templates, encoded once, compared with images (arXiv 2103.00020).

Letters: B images, L labels, E embedding.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm.config import ConfigError
from mm.evaluation.calibration import (
    Calibration,
    check_truth,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)
from mm.evaluation.label_weights import LabelWeights
from mm.evaluation.predictions import Predictions, check_k, ranked
from mm.evaluation.vocabulary import check_labels, check_templates, read_labels, read_templates

if TYPE_CHECKING:
    from PIL import Image

    from mm.evaluation.inference import Inference

__all__ = ["Classifier", "check_labels", "check_temperature", "check_templates", "classifier"]

ROWS = 32  # images compared at once: always as many, so that a row's last bit never depends on its company


class Classifier:
    """Callable: images to probabilities of `labels`. Made by `classifier`.

    `temperature` divides the logits, and may be set: above 1 it makes the probabilities more alike.
    """

    def __init__(
        self,
        labels: Sequence[str],
        weights: Tensor,
        *,
        scale: float,
        bias: float,
        kind: str,
        inference: Inference,
        temperature: float | None = None,
    ) -> None:
        """`weights` `[L, E]` unit norm; `kind` "softmax" or "sigmoid", as it was trained."""
        self.labels, self.weights, self.inference = list(labels), weights, inference
        self.scale, self.bias, self.kind = scale, bias, kind
        self.temperature = check_temperature(temperature)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Probabilities `[B, L]` float32: over the labels (softmax), or of each label by itself (sigmoid).

        Raises ValueError naming what is not an image.
        """
        return self.probabilities(self.inference.encode("image", images))

    def probabilities(self, embeddings: Tensor) -> Tensor:
        """`__call__` for images that are already encoded, `[B, E]`."""
        normal: Callable[[Tensor], Tensor] = torch.sigmoid if self.kind == "sigmoid" else _softmax
        # row by row: a longer row's tail would otherwise start elsewhere in the vector unit
        return self._compared(embeddings, lambda logits: torch.stack([normal(row) for row in logits]))

    def logits(self, embeddings: Tensor) -> Tensor:
        """`[B, L]`: (scale · cosine + bias) / temperature, what `probabilities` takes the softmax or sigmoid of."""
        return self._compared(embeddings, lambda logits: logits)

    def _compared(self, embeddings: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
        parts = [torch.zeros(0, len(self.labels))]
        for start in range(0, len(embeddings), ROWS):
            part = embeddings[start : start + ROWS]
            whole = torch.cat([part, part[:1].expand(ROWS - len(part), -1)])
            logits = (self.scale * (whole @ self.weights.T) + self.bias) / self.temperature
            parts.append(finish(logits[: len(part)]))
        return torch.cat(parts)

    def top(self, image: Image.Image, k: int = 5) -> list[tuple[str, float]]:
        """The `k` likeliest labels (fewer where there are fewer) with their probabilities, best first.

        Raises ValueError where `k` is not positive or `image` is not an image.
        """
        check_k(k)
        return ranked(self.labels, self([image]), k)[0]

    def stream(
        self,
        shards: str | Sequence[str],
        *,
        k: int = 5,
        captions: str = "",
        members: Sequence[str] = (),
        workers: int = 0,
        limit: int | None = None,
        progress: bool = False,
    ) -> Predictions:
        """Iterates over the pictures of some shards: a `Prediction` a sample, in memory that does not grow with them.

        `shards`: a folder, a pattern, several joined by `::`, or a list of files. `captions` ("txt", "json.FIELD") and
        `members` (extensions, such as "cls") come along, and samples without them are left out; `lost` of what is
        returned says why. `workers`: decoding processes. Raises ConfigError where there is no sample.
        """
        return Predictions(
            self.labels,
            lambda pictures: self.probabilities(self.inference.embed("image", (pictures,))),
            self.inference.processor("image"),
            shards,
            k=k,
            captions=captions,
            members=members,
            workers=workers,
            limit=limit,
            progress=progress,
        )

    def calibrate(self, images: Sequence[Image.Image] | Tensor, truth: Tensor | Sequence[int | str]) -> Calibration:
        """Sets `temperature` to what gives the true labels of some images the highest likelihood (arXiv 1706.04599).

        `images`: pictures, or embeddings `[N, E]`; `truth`: the right label of each, or its place in `labels`. The
        order of the labels stays what it was. Raises ValueError where they do not fit, or no temperature is best; the
        temperature is then unchanged.
        """
        embeddings = images if isinstance(images, Tensor) else self.inference.encode("image", images)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.weights.shape[1]:
            shape = list(embeddings.shape)
            raise ValueError(f"images: embeddings of shape {shape}; must be [N, {self.weights.shape[1]}]")
        places = check_truth(self._places(truth), len(embeddings), len(self.labels))
        before = self._at(1.0)
        raw = before.logits(embeddings)
        after = self._at(fit_temperature(raw, places, self.kind))
        self.temperature = after.temperature
        return Calibration(
            self.temperature,
            len(places),
            expected_calibration_error(before.probabilities(embeddings), places),
            expected_calibration_error(after.probabilities(embeddings), places),
            negative_log_likelihood(raw, places, self.kind),
            negative_log_likelihood(raw / self.temperature, places, self.kind),
        )

    def _at(self, temperature: float) -> Classifier:
        other = copy.copy(self)
        other.temperature = temperature
        return other

    def _places(self, truth: Tensor | Sequence[int | str]) -> Tensor:
        if isinstance(truth, Tensor):
            return truth
        place = {label: number for number, label in enumerate(self.labels)}
        for one in truth:
            if isinstance(one, str) and one not in place:
                raise ValueError(f"truth: {one!r} is none of the {len(self.labels)} labels")
        return torch.tensor([place[one] if isinstance(one, str) else one for one in truth])


def classifier(
    inference: Inference,
    labels: str | Sequence[str],
    templates: str | Sequence[str] = ("{}",),
    *,
    temperature: float | None = None,
    cache: bool | str | os.PathLike[str] | None = None,
    repeats: bool = False,
    weights: LabelWeights | None = None,
    progress: bool = False,
) -> Classifier:
    """Encodes each label in each template once: normalised, averaged over the templates, normalised again.

    `labels`: a list, or "imagenet"; `templates`: a list, or "openai" or "simple" (see `mm.evaluation.vocabulary`, also
    for `repeats`). `cache` keeps the result on disk (see `LabelWeights.get`), `weights` what was encoded before. Raises
    ValueError for labels, templates or a temperature that cannot be meant, ConfigError where the model was trained
    without the contrastive objective.
    """
    contrastive = inference.config.objectives.contrastive
    names, sentences = read_labels(labels, repeats=repeats), read_templates(templates)
    check_temperature(temperature)
    if contrastive is None:
        raise ConfigError("objectives.contrastive = None: this model was trained without it and cannot classify")
    known = weights or LabelWeights(inference)
    scale = inference.extras.get("objectives.contrastive.logit_scale")
    bias = inference.extras.get("objectives.contrastive.logit_bias")
    return Classifier(
        names,
        known.get(names, sentences, cache=cache, progress=progress),
        scale=contrastive.init_scale if scale is None else min(float(scale.exp()), contrastive.max_scale),
        bias=0.0 if bias is None else float(bias),
        kind=contrastive.kind,
        inference=inference,
        temperature=temperature,
    )


def check_temperature(temperature: float | None) -> float:
    """1 for None. Raises ValueError unless it is a number above 0."""
    if temperature is None:
        return 1.0
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"temperature = {temperature!r}: must be a number above 0; 1 leaves the logits as they are")
    return float(temperature)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)
