"""What pictures are compared by: the numbers that a stated extractor makes of them.

FID and its kin say nothing without the extractor's name, and are only comparable under the same one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm.config import ConfigError
from mm.evaluation.images import SIDE, shrink
from mm.evaluation.inference import Inference
from mm.evaluation.job import BATCH, Job
from mm.models.export import find_export, load_export

if TYPE_CHECKING:
    from mm.models.model import Model

CHUNK = BATCH["image"]  # pictures that pass through another model at once


@dataclass(frozen=True)
class Extractor:
    """`function`: uint8 pictures `[n, 3, H, W]`, at the evaluated model's size, to float32 features `[n, width]`."""

    name: str
    features: str  # which numbers, in words
    width: int
    sha256: str | None  # of the weights that make them; None where there are none
    function: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        return self.function(images)

    def about(self) -> dict[str, Any]:
        return {"name": self.name, "features": self.features, "width": self.width, "sha256": self.sha256}


def extractor(job: Job, source: str) -> Extractor:
    """The extractor "pixels16", "self" (the evaluated model's vision encoder), or the vision encoder of another model.

    Embeddings have unit norm, and are multiplied by the root of their width: the mean square of a number is then 1,
    which is what KID's kernel expects. Raises ConfigError for a model whose encoder was never taught to tell pictures
    apart, and what loading raises.
    """
    if source == "pixels16":
        words = f"pixels averaged to {SIDE} x {SIDE}, from -1 to 1"
        return Extractor(source, words, 3 * SIDE * SIDE, None, lambda images: shrink(images) / 127.5 - 1)
    if source == "self":
        if job.inference.config.objectives.contrastive is None:
            raise ConfigError(
                "features = self: objectives.contrastive = None, so this model's encoder was not taught to tell "
                "pictures apart; give pixels16 or another model"
            )
        return _of(source, job.inference, job.embed)
    model, extras, config, _ = _load(job, source)
    if "image" not in model.adapters:
        raise ConfigError(f"features = {source}: this model has no vision encoder; give one that has")
    other = Inference(model.to(job.inference.model.device), config, extras)
    other.bf16 = job.inference.bf16

    def embed(images: Tensor) -> Tensor:
        parts = [torch.zeros(0, config.model.embed_dim)]
        for start in range(0, len(images), CHUNK):  # its own preparation: size, cropping, mean and deviation
            pictures = job.inference.processor("image").render(images[start : start + CHUNK])
            parts.append(other.encode("image", pictures))
        return torch.cat(parts)

    return _of(source, other, embed)


def _load(job: Job, source: str) -> tuple[Model, dict[str, Tensor], Any, dict[str, Any]]:
    """Read as the command reads models, or where there is no command, from a folder of mm's."""
    return load_export(find_export(source)) if job.load is None else job.load(source)


def _of(name: str, inference: Inference, embed: Callable[[Tensor], Tensor]) -> Extractor:
    width = inference.config.model.embed_dim
    words = "pooled embedding of the vision encoder, unit norm times the root of the width"
    return Extractor(name, words, width, weights_hash(inference.model), lambda images: embed(images) * math.sqrt(width))


def weights_hash(model: Model, modality: str = "image") -> str:
    """sha256 of the names, shapes, types and values of everything that encodes a modality."""
    digest = hashlib.sha256()
    for kind in ("adapters", "encoders"):
        part: torch.nn.Module = getattr(model, kind)[modality]
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{kind}.{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
