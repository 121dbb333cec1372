"""Zero-shot classification: labels written into templates, encoded once, compared with images (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.config import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from mm.evaluation.inference import Inference

ROWS = 32  # images compared at once: always as many, so that a row's last bit never depends on its company


class Classifier:
    """Callable: images to probabilities of `labels`. Made by `classifier`."""

    def __init__(
        self,
        labels: Sequence[str],
        weights: Tensor,
        *,
        scale: float,
        bias: float,
        kind: str,
        encode: Callable[[Sequence[Any]], Tensor],
    ) -> None:
        """`weights` `[L, E]` unit norm; `encode` gives `[B, E]`; `kind` "softmax" or "sigmoid", as it was trained."""
        self.labels, self.weights = list(labels), weights
        self.scale, self.bias, self.kind, self._encode = scale, bias, kind, encode

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Probabilities `[B, L]` float32: over the labels (softmax), or of each label by itself (sigmoid).

        Raises ValueError naming what is not an image.
        """
        return self.probabilities(self._encode(images))

    def probabilities(self, embeddings: Tensor) -> Tensor:
        """`__call__` for images that are already encoded, `[B, E]`."""
        parts = [torch.zeros(0, len(self.labels))]
        for start in range(0, len(embeddings), ROWS):
            part = embeddings[start : start + ROWS]
            whole = torch.cat([part, part[:1].expand(ROWS - len(part), -1)])
            logits = self.scale * (whole @ self.weights.T) + self.bias
            # row by row: a longer row's tail would otherwise start elsewhere in the vector unit
            rows = [logit.sigmoid() if self.kind == "sigmoid" else logit.softmax(-1) for logit in logits[: len(part)]]
            parts.append(torch.stack(rows))
        return torch.cat(parts)

    def top(self, image: Image.Image, k: int = 5) -> list[tuple[str, float]]:
        """The `k` likeliest labels (fewer where there are fewer) with their probabilities, best first.

        Raises ValueError where `k` is not positive or `image` is not an image.
        """
        if k < 1:
            raise ValueError(f"k = {k}: must be at least 1")
        values, places = self([image])[0].topk(min(k, len(self.labels)))
        return [(self.labels[place], value) for place, value in zip(places.tolist(), values.tolist(), strict=True)]


def classifier(
    inference: Inference, labels: Sequence[str], templates: Sequence[str] = ("{}",), *, progress: bool = False
) -> Classifier:
    """Encodes each label in each template once: normalised, averaged over the templates, normalised again.

    Raises ValueError for labels or templates that cannot be meant, ConfigError where the model was trained without
    the contrastive objective.
    """
    check_labels(labels)
    check_templates(templates)
    contrastive = inference.config.objectives.contrastive
    if contrastive is None:
        raise ConfigError("objectives.contrastive = None: this model was trained without it and cannot classify")
    texts = [template.replace("{}", label) for label in labels for template in templates]
    unique = list(dict.fromkeys(texts))
    found = inference.encode("text", unique, progress=progress)  # [U, E], unit norm
    place = {text: row for row, text in enumerate(unique)}
    each = found[[place[text] for text in texts]].unflatten(0, (len(labels), len(templates)))  # [L, T, E]
    weights = each[:, 0] if len(templates) == 1 else F.normalize(each.mean(1), dim=-1)
    scale = inference.extras.get("objectives.contrastive.logit_scale")
    bias = inference.extras.get("objectives.contrastive.logit_bias")
    return Classifier(
        labels,
        weights,
        scale=contrastive.init_scale if scale is None else min(float(scale.exp()), contrastive.max_scale),
        bias=0.0 if bias is None else float(bias),
        kind=contrastive.kind,
        encode=lambda images: inference.encode("image", images),
    )


def check_labels(labels: Sequence[str]) -> None:
    """Raises ValueError unless `labels` is a list of at least one text, none of them blank."""
    if isinstance(labels, str):
        raise ValueError(f"labels = {labels!r}: must be a list; write [{labels!r}]")
    if not len(labels):
        raise ValueError("labels = []: nothing to choose from; give at least one label")
    for place, label in enumerate(labels):
        if not isinstance(label, str):
            raise ValueError(f"labels[{place}] = {label!r}: must be a str, not {type(label).__name__}")
        if not label.strip():
            raise ValueError(f"labels[{place}] = {label!r}: is blank; leave it out")


def check_templates(templates: Sequence[str]) -> None:
    """Raises ValueError unless `templates` is a list of at least one text with `{}` where the label goes."""
    if isinstance(templates, str):
        raise ValueError(f"templates = {templates!r}: must be a list; write [{templates!r}]")
    if not len(templates):
        raise ValueError('templates = []: give at least one, such as "{}"')
    for place, template in enumerate(templates):
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"templates[{place}] = {template!r}: has no {{}} where the label goes; write 'a {{}}'")
