"""The one module that is trained, sharded and saved: encode each modality once, sum the weighted objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mm.models.model import Model
from mm.objectives.align import Align
from mm.objectives.base import Objective
from mm.objectives.contrastive import Contrastive
from mm.objectives.diffusion import Diffusion
from mm.types import Batch, Encoded, Loss

if TYPE_CHECKING:
    from mm.adapters.text import Tokenizer
    from mm.config import TrainConfig


class TrainStep(nn.Module):
    """A model and its objectives, in the order in which they run."""

    def __init__(self, model: Model, objectives: Mapping[str, Objective]):
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleDict(objectives)

    def forward(self, batch: Batch) -> Loss:
        """The weighted sum over the batch, with each objective's own value in the metrics."""
        return self.combine(batch, self.model.encode(batch), list(self.objectives))

    def combine(self, batch: Batch, encoded: dict[str, Encoded], names: list[str]) -> Loss:
        """The weighted sum of the named objectives."""
        total: Tensor | None = None
        metrics: dict[str, Tensor] = {}
        for name in names:
            objective = cast("Objective", self.objectives[name])
            loss = objective(self.model, batch, encoded)
            total = loss.value * objective.weight if total is None else total + loss.value * objective.weight
            metrics.update(loss.metrics)
        assert total is not None, "a run has at least one objective"
        return Loss(total, metrics | {"loss": total.detach()})

    def backward(
        self, batch: Batch, accumulate: int = 1, autocast: Callable[[], AbstractContextManager] = nullcontext
    ) -> dict[str, Tensor]:
        """Gradients of `forward(batch)`, in `accumulate` micro-batches; returns the metrics of the whole batch.

        `autocast()` is entered for each forward, and never for a backward, which has its precision from the forward.
        Exact also for objectives over pairs: their features are computed first without a graph, their gradient is
        taken over the whole batch, and is then fed to each micro-batch (GradCache, arXiv 2101.06983).
        """
        if accumulate == 1:
            with autocast():
                loss = self(batch)
            loss.value.backward()
            return loss.metrics
        pairwise = [name for name, objective in self.objectives.items() if objective.pairwise]
        others = [name for name in self.objectives if name not in pairwise]
        micro_batches = batch.split(len(batch) // accumulate)
        metrics: dict[str, Tensor] = {}
        slices: list[dict[str, Tensor]] = [{} for _ in micro_batches]
        if pairwise:
            with torch.no_grad(), autocast():
                features = [self.model.encode(micro_batch) for micro_batch in micro_batches]
            pairs = self._pairwise_gradients(batch, features, pairwise, slices)
            metrics.update(pairs.metrics)
        for micro_batch, gradients in zip(micro_batches, slices, strict=True):
            with autocast():
                encoded = self.model.encode(micro_batch)
                parts = [(encoded[name].pooled * gradient).sum() for name, gradient in gradients.items()]
                if others:
                    loss = self.combine(micro_batch, encoded, others)
                    parts.append(loss.value / accumulate)
                    for key, value in loss.metrics.items():
                        metrics[key] = metrics.get(key, torch.zeros_like(value)) + value / accumulate
            torch.stack(parts).sum().backward()
        return metrics

    def _pairwise_gradients(
        self, batch: Batch, parts: list[dict[str, Encoded]], names: list[str], slices: list[dict[str, Tensor]]
    ) -> Loss:
        """Run the pairwise objectives on cached features; leave each micro-batch's feature gradients in `slices`."""
        features = {name: torch.cat([part[name].pooled for part in parts]).requires_grad_() for name in parts[0]}
        loss = self.combine(batch, {n: Encoded(parts[0][n].tokens, f) for n, f in features.items()}, names)
        loss.value.backward()
        for name, feature in features.items():
            assert feature.grad is not None
            for index, gradient in enumerate(feature.grad.split([len(part[name].pooled) for part in parts])):
                slices[index][name] = gradient
        return loss

    def diagnose(self, batch: Batch) -> dict[str, float]:
        """Each objective's gradient norm on each encoder's tokens, and the cosine between those of every two.

        The tokens after an encoder's final norm feed both its pooled vector and the denoiser: the one place that
        every objective reaches. Parameters' gradients are left alone.
        """
        encoded = self.model.encode(batch)
        shared = {name: item.tokens.x for name, item in encoded.items()}
        gradients: dict[str, dict[str, Tensor]] = {}
        for name in self.objectives:
            loss = self.combine(batch, encoded, [name])
            found = torch.autograd.grad(loss.value, list(shared.values()), retain_graph=True, allow_unused=True)
            gradients[name] = {
                modality: torch.zeros_like(x) if gradient is None else gradient.float()
                for (modality, x), gradient in zip(shared.items(), found, strict=True)
            }
        out: dict[str, float] = {}
        names = list(gradients)
        for modality in shared:
            for index, name in enumerate(names):
                ours = gradients[name][modality].flatten()
                out[f"grad/{modality}/{name}"] = ours.norm().item()
                for other in names[index + 1 :]:
                    theirs = gradients[other][modality].flatten()
                    scale = (ours.norm() * theirs.norm()).clamp_min(1e-30)
                    out[f"cosine/{modality}/{name}-{other}"] = (ours @ theirs / scale).item()
        return out

    def after_step(self) -> None:
        """Let each objective update what it keeps besides parameters."""
        for objective in self.objectives.values():
            cast("Objective", objective).after_step(self.model)


def build_step(config: TrainConfig, tokenizer: Tokenizer) -> TrainStep:
    """The model and the enabled objectives of a config, freshly initialised from torch's global generator."""
    model = Model(config.model, tokenizer)
    wanted = config.objectives
    objectives: dict[str, Objective] = {}
    if wanted.contrastive is not None:
        objectives["contrastive"] = Contrastive(wanted.contrastive)
    if wanted.diffusion is not None:
        objectives["diffusion"] = Diffusion(wanted.diffusion, wanted.align.block if wanted.align else None)
    if wanted.align is not None and wanted.diffusion is not None:  # after diffusion, whose tokens it reads
        objectives["align"] = Align(wanted.align, model, wanted.diffusion.copies)
    return TrainStep(model, objectives)
