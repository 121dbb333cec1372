"""Pictures reduced to what a measurement needs of them, a chunk at a time: real ones, drawings, and noise.

Letters: n pictures, D features, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm.diffusion.noise import uniform
from mm.evaluation.extractor import CHUNK, Extractor, extractor
from mm.evaluation.job import BATCH, Job

NOISE = 12  # stream of random numbers of pictures that show nothing


@dataclass
class Pictures:
    """Row i of each belongs to picture i."""

    features: Tensor  # [n, D] of the stated extractor
    pixels: Tensor  # [n, 768] of "pixels16"
    embeddings: Tensor | None  # [n, E] unit norm, the evaluated model's; None where it was trained without contrast

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Sequence[int]) -> Pictures:
        rows = rows if isinstance(rows, slice) else list(rows)
        seen = None if self.embeddings is None else self.embeddings[rows]
        return Pictures(self.features[rows], self.pixels[rows], seen)

    @classmethod
    def joined(cls, parts: Sequence[Pictures]) -> Pictures:
        seen = [part.embeddings for part in parts if part.embeddings is not None]
        return cls(
            torch.cat([part.features for part in parts]),
            torch.cat([part.pixels for part in parts]),
            torch.cat(seen) if seen else None,
        )


class Measure:
    """Turns pictures into `Pictures`; the pixels of drawings are let go chunk by chunk."""

    def __init__(self, job: Job, extract: Extractor) -> None:
        self.job, self.extract, self.shrink = job, extract, extractor(job, "pixels16")
        self.contrastive = job.inference.config.objectives.contrastive is not None

    def __call__(self, images: Tensor) -> Pictures:
        """Of uint8 `[n, 3, H, W]` at the model's size."""
        seen = self.job.embed(images) if self.contrastive else None
        if seen is not None and self.extract.name == "self":  # these are its features, scaled: not encoded again
            features = seen * math.sqrt(self.extract.width)
        else:
            features = self.extract(images)
        return Pictures(features.cpu(), self.shrink(images).cpu(), seen)

    def real(self, places: Sequence[int]) -> Pictures:
        """Those at some places of the job's samples."""
        return Pictures.joined([self(self.job.samples.images[list(part)]) for part in _chunks(places)])

    def drawn(self, captions: Sequence[str], seeds: Sequence[int], settings: dict[str, Any]) -> Pictures:
        """Drawing i from caption i with seed i; `steps`, `guidance` and `solver` of `settings`."""
        parts = []
        for rows in _chunks(range(len(captions))):
            drawn = self.job.inference.generate(
                [captions[row] for row in rows],
                seeds=[seeds[row] for row in rows],
                steps=settings["steps"],
                guidance=settings["guidance"],
                solver=settings["solver"],
                micro_batch=BATCH["draw"],
                progress=self.job.progress,
            )
            parts.append(self(drawn))
        return Pictures.joined(parts)

    def noise(self, count: int, seed: int) -> Pictures:
        """Pictures of independent, evenly distributed values: what no model should draw."""
        shape, parts = self.job.samples.images.shape[1:], []
        for rows in _chunks(range(count)):
            seeds = torch.tensor([seed + row for row in rows], dtype=torch.int64)
            values = uniform(seeds, math.prod(shape), NOISE) * 256
            parts.append(self(values.to(torch.uint8).view(len(rows), *shape)))
        return Pictures.joined(parts)


def _chunks(places: Sequence[int]) -> list[Sequence[int]]:
    return [places[start : start + CHUNK] for start in range(0, len(places), CHUNK)]
