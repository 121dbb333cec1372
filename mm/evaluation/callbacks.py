"""What a training run looks at on its way: zero-shot accuracy on `data.val`, and pictures of a few of its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mm.data.shards import expand
from mm.evaluation.images import grid, png_bytes, write_whole
from mm.evaluation.inference import Inference
from mm.evaluation.samples import SampleSet, evenly, read_samples

if TYPE_CHECKING:
    from mm.config import TrainConfig
    from mm.models.model import Model

PROMPTS = 8
MOST = 1000  # samples looked at: an evaluation on the way is to be quick


class Context(Protocol):
    """What a training loop shows of itself; the model holds the averaged weights."""

    config: TrainConfig
    step: int

    @property
    def model(self) -> Model: ...

    @property
    def run_dir(self) -> Path: ...

    @property
    def world(self) -> Any: ...

    def extras(self) -> dict[str, Tensor]: ...


def callbacks(config: TrainConfig) -> list[Any]:
    """The callbacks that a config asks for; none without `data.val`, whose captions all of them need."""
    if not config.data.val:
        return []
    found: list[Any] = []
    if config.objectives.contrastive is not None:
        found.append(ZeroShot(config))
    if config.objectives.diffusion is not None:
        found.append(Pictures(config))
    return found


def _inference(context: Context) -> Inference:
    found = Inference(context.model, context.config, context.extras())
    found.bf16 = context.config.parallel.precision == "bf16_params"  # blocks that are gathered so take nothing else
    return found


class _OnVal:
    """Reads `data.val` at the first call and keeps it."""

    def __init__(self, config: TrainConfig) -> None:
        self._files = expand(config.data.val)  # a wrong name is refused before training, not after
        self._samples: SampleSet | None = None

    def samples(self, inference: Inference) -> SampleSet:
        if self._samples is None:
            self._samples = read_samples(self._files, inference.processor("image"))
        return self._samples


class ZeroShot(_OnVal):
    """`val/top1`: the share of val pictures that are nearest to their own name among the names of val."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.every = config.run.eval_every

    def part(self, context: Context) -> tuple[Tensor, Tensor]:
        """Embeddings of this process' share of the pictures, and of the labels: rows rank, rank + processes, ..."""
        inference, rank, size = _inference(context), context.world.rank, context.world.size
        with torch.compiler.set_stance("force_eager"):  # other shapes than in training: compiling would take longer
            read = self.samples(inference)
            images = inference.embed("image", (read.images[_chosen(read)[rank::size]],))
            return images, inference.encode("text", _labels(read)[rank::size])

    def whole(self, context: Context, parts: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        read = self.samples(_inference(context))
        images, texts = (_interleaved([part[side] for part in parts]) for side in (0, 1))
        guesses, labels = (images @ texts.T).argmax(1).tolist(), _labels(read)
        truth = [read.captions[place] for place in _chosen(read)]
        right = sum(labels[guess] == caption for guess, caption in zip(guesses, truth, strict=True))
        return {"val/top1": right / len(truth)}


class Pictures(_OnVal):
    """`samples/step-00000100.png`: val prompts drawn with fixed seeds over their own pictures."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.every = config.run.sample_every

    def part(self, context: Context) -> Tensor:
        """This process' share of the drawings."""
        inference, rank, size = _inference(context), context.world.rank, context.world.size
        with torch.compiler.set_stance("force_eager"):
            read = self.samples(inference)
            captions = [read.captions[place] for place in self._places(read)]
            return inference.generate(captions[rank::size], seeds=range(len(captions))[rank::size])

    def whole(self, context: Context, parts: list[Tensor]) -> dict[str, float]:
        if context.world.main:
            inference = _inference(context)
            read, drawn = self.samples(inference), _interleaved(parts)
            places = self._places(read)
            captions, render = [read.captions[place] for place in places], inference.processor("image").render
            rows = [render(drawn), render(read.images[places])]
            sheet = grid(rows, scale=max(1, 96 // drawn.shape[-1]), captions=[captions] * 2)
            write_whole(context.run_dir / "samples" / f"step-{context.step:08d}.png", png_bytes(sheet))
        return {}

    def _places(self, read: SampleSet) -> list[int]:
        return evenly(list(range(len(read.captions))), PROMPTS)


def _chosen(read: SampleSet) -> list[int]:
    return evenly(list(range(len(read.captions))), MOST)


def _labels(read: SampleSet) -> list[str]:
    return list(dict.fromkeys(read.captions[place] for place in _chosen(read)))


def _interleaved(parts: list[Tensor]) -> Tensor:
    """Rows of all processes in their order: row i is row i // processes of process i % processes."""
    out = torch.empty(sum(len(part) for part in parts), *parts[0].shape[1:], dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        out[rank :: len(parts)] = part
    return out
