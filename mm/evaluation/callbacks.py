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
    return Inference(context.model, context.config, context.extras())


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

    def __call__(self, context: Context) -> dict[str, float]:
        inference = _inference(context)
        with torch.compiler.set_stance("force_eager"):  # other shapes than in training: compiling would take longer
            read = self.samples(inference)
            places = evenly(list(range(len(read.captions))), MOST)
            truth = [read.captions[place] for place in places]
            labels = list(dict.fromkeys(truth))
            images = inference.embed("image", (read.images[places],))
            guesses = (images @ inference.encode("text", labels).T).argmax(1).tolist()
        right = sum(labels[guess] == caption for guess, caption in zip(guesses, truth, strict=True))
        return {"val/top1": right / len(truth)}


class Pictures(_OnVal):
    """`samples/step-00000100.png`: val prompts drawn with fixed seeds over their own pictures."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.every = config.run.sample_every

    def __call__(self, context: Context) -> dict[str, float]:
        inference = _inference(context)
        with torch.compiler.set_stance("force_eager"):
            read = self.samples(inference)
            places = evenly(list(range(len(read.captions))), PROMPTS)
            captions = [read.captions[place] for place in places]
            drawn = inference.generate(captions, seeds=range(len(places)))
        render = inference.processor("image").render
        sheet = grid(
            [render(drawn), render(read.images[places])], scale=max(1, 96 // drawn.shape[-1]), captions=[captions] * 2
        )
        write_whole(context.run_dir / "samples" / f"step-{context.step:08d}.png", png_bytes(sheet))
        return {}
