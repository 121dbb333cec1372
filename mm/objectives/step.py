"""The one module that is trained, sharded and saved: encode each modality once, sum the weighted objectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mm.adapters.named import import_adapters
from mm.models.model import Model
from mm.objectives.align import Align
from mm.objectives.base import Objective
from mm.objectives.contrastive import Contrastive
from mm.objectives.diffusion import Diffusion
from mm.rules_modalities import modality_names, pairs_of
from mm.types import Batch, Encoded, Loss, Tokens

if TYPE_CHECKING:
    from mm.adapters.text import Tokenizer
    from mm.config import TrainConfig


class TrainStep(nn.Module):
    """A model and its objectives, in the order in which they run."""

    def __init__(self, model: Model, objectives: Mapping[str, Objective]):
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleDict(objectives)
        self.still: list[nn.Module] = []  # stay in evaluation mode; set by mm.adaptation

    def train(self, mode: bool = True) -> TrainStep:
        """Training or evaluation mode, but for what does not train."""
        super().train(mode)
        for module in self.still:
            module.eval()
        return self

    def forward(self, batch: Batch, fed: dict[str, Tensor] | None = None, accumulate: int = 1) -> Loss:
        """The weighted sum over the batch, with each objective's own value in the metrics.

        With `fed`, of a micro-batch: the pairwise objectives are in it only as their gradients, which `pairs` found,
        and the others as the share of `accumulate` micro-batches.
        """
        encoded = self.model.encode(batch, self.pooled_only)
        if fed is None:
            return self.combine(batch, encoded, list(self.objectives))
        leaves = {name: item.pooled for name, item in encoded.items()} | self._owned()
        parts = [(leaves[name] * gradient).sum() for name, gradient in fed.items()]
        metrics: dict[str, Tensor] = {}
        if others := [name for name in self.objectives if name not in self.pairwise]:
            loss = self.combine(batch, encoded, others)
            parts.append(loss.value / accumulate)
            metrics = {name: value / accumulate for name, value in loss.metrics.items()}
        return Loss(torch.stack(parts).sum(), metrics)

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

    @property
    def pooled_only(self) -> set[str]:
        """The modalities whose tokens no objective reads."""
        names = set(self.model.adapters)
        for objective in self.objectives.values():
            reads = cast("Objective", objective).reads
            names -= names if reads is None else set(reads)
        return names

    @property
    def pairwise(self) -> list[str]:
        """The objectives over pairs of samples, for which a micro-batch alone would not do."""
        return [name for name, objective in self.objectives.items() if cast("Objective", objective).pairwise]

    def _owned(self) -> dict[str, Tensor]:
        """The pairwise objectives' own parameters, by name."""
        found = {name: self.objectives[name].named_parameters() for name in self.pairwise}
        return {f"objectives.{name}.{key}": p for name, named in found.items() for key, p in named}

    @torch.no_grad()
    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Every modality's pooled vectors `[B, E]`, without a graph."""
        with watched(self):
            return {name: encoded.pooled for name, encoded in self.model.encode(batch, self.pooled_only).items()}

    def pairs(self, batch: Batch, features: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Metrics of the pairwise objectives over the features, and their gradients: of those, and of own parameters.

        No parameter's `.grad` is touched: `forward` is fed with what is found here.
        """
        leaves = {name: feature.detach().requires_grad_() for name, feature in features.items()}
        loss = self.combine(batch, {n: Encoded(Tokens(f), f) for n, f in leaves.items()}, self.pairwise)
        wanted = leaves | self._owned()
        found = torch.autograd.grad(loss.value, list(wanted.values()), allow_unused=True)
        return loss.metrics, {n: g.detach() for n, g in zip(wanted, found, strict=True) if g is not None}

    def backward(
        self,
        batch: Batch,
        accumulate: int = 1,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        call: Callable[..., Loss] | None = None,
        sync: Callable[[bool], AbstractContextManager] = nullcontext,
    ) -> dict[str, Tensor]:
        """Gradients of `forward(batch)`, in `accumulate` micro-batches; returns the metrics of the whole batch.

        `autocast()` is entered for each forward, and never for a backward, which has its precision from the forward.
        `call` stands in for `forward` where a parallel wrapper must see it, and `sync(last)` surrounds each
        micro-batch, `last` for the one after which processes exchange gradients.
        Exact also for objectives over pairs: their features are computed first without a graph, their gradient is
        taken over the whole batch, and is then fed to each micro-batch (GradCache, arXiv 2101.06983).
        """
        call = call or self
        if accumulate == 1:
            with autocast():
                loss = call(batch)
            loss.value.backward()
            return loss.metrics
        micro_batches = batch.split(len(batch) // accumulate)
        metrics: dict[str, Tensor] = {}
        slices: list[dict[str, Tensor]] = [{} for _ in micro_batches]
        if self.pairwise:
            with autocast():
                parts = [self.features(micro_batch) for micro_batch in micro_batches]
                features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                metrics, gradients = self.pairs(batch, features)
            for name, gradient in gradients.items():
                whole = name not in features  # of a parameter: fed once, in equal parts
                cut = [gradient / accumulate] * accumulate if whole else gradient.split(len(batch) // accumulate)
                for index, part in enumerate(cut):
                    slices[index][name] = part
        for index, (micro_batch, fed) in enumerate(zip(micro_batches, slices, strict=True)):
            with sync(index == accumulate - 1):
                with autocast():
                    loss = call(micro_batch, fed, accumulate)
                loss.value.backward()
            for key, value in loss.metrics.items():
                metrics[key] = metrics.get(key, torch.zeros_like(value)) + value
        return metrics

    def diagnose(self, batch: Batch) -> dict[str, float]:
        """Each objective's gradient norm on each encoder's tokens, and the cosine between those of every two.

        The tokens after an encoder's final norm feed both its pooled vector and the denoiser: the one place that
        every objective reaches. Parameters' gradients are left alone.
        """
        with watched(self):
            encoded = self.model.encode(batch)
        shared = {name: item.tokens.x for name, item in encoded.items() if item.tokens.x.requires_grad}
        if not shared:  # all encoders are locked
            return {}
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

    def changed(self) -> None:
        """Let each objective know that the model got other weights or parts before training."""
        for objective in self.objectives.values():
            cast("Objective", objective).changed(self.model)

    def after_step(self) -> None:
        """Let each objective update what it keeps besides parameters."""
        for objective in self.objectives.values():
            cast("Objective", objective).after_step(self.model)


@contextmanager
def watched(module: nn.Module) -> Iterator[None]:
    """Inside, a forward leaves no trace: the running statistics of batch norms are put back.

    For what is not a step: else a run that looks at itself, or feeds its batch in parts, would become another one.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def build_step(config: TrainConfig, tokenizer: Tokenizer) -> TrainStep:
    """The model and the enabled objectives of a config, freshly initialised from torch's global generator.

    Imports the modules of the config's adapters: what is trained was described by a Python file, which is code too.
    """
    import_adapters(config.model.modalities)
    model = Model(config.model, tokenizer)
    wanted = config.objectives
    objectives: dict[str, Objective] = {}
    if wanted.contrastive is not None:
        objectives["contrastive"] = Contrastive(
            wanted.contrastive, pairs_of(wanted.contrastive.pairs, modality_names(config.model))
        )
    if wanted.diffusion is not None:
        objectives["diffusion"] = Diffusion(wanted.diffusion, wanted.align.block if wanted.align else None)
    if wanted.align is not None and wanted.diffusion is not None:  # after diffusion, whose tokens it reads
        objectives["align"] = Align(wanted.align, model, wanted.diffusion)
    return TrainStep(model, objectives)
