"""What the model's thread runs, and what is made ready for it by others. E: width of an embedding."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mm.evaluation.inference import MICRO_BATCH
from mm.evaluation.zero_shot import Classifier
from mm.serving.batching import Kind

if TYPE_CHECKING:
    from PIL import Image

    from mm.api import LoadedModel

Row = tuple[Tensor, ...]  # one item, ready for the encoder: a row of each of its columns
TEXT, IMAGE = Kind("text"), Kind("image")  # Row -> embedding [E]


def drawing(steps: int, guidance: float, solver: str, negative: str | None) -> Kind:
    """(prompt, seed) -> PIL image."""
    return Kind("draw", (steps, guidance, solver, negative))


def labelling(labels: Sequence[str], templates: Sequence[str]) -> Kind:
    """None -> Classifier."""
    return Kind("labels", (tuple(labels), tuple(templates)))


class Engine:
    """A loaded model as a `Batcher` needs it. `run` is for one thread, everything else for any."""

    def __init__(self, model: LoadedModel, *, max_batch: int = 64, label_cache: int = 64) -> None:
        self.model, self._max_batch, self._label_cache = model, max_batch, label_cache
        self._classifiers: OrderedDict[Kind, Classifier] = OrderedDict()  # the one used longest ago first
        self._lock = threading.Lock()
        self._runs: dict[str, Callable[[Kind, list[Any]], Sequence[Any]]] = {
            "text": self._embed,
            "image": self._embed,
            "draw": self._draw,
            "labels": self._classifier,
        }
        inner = model.inference
        self.encodes = tuple(name for name in ("text", "image") if name in inner.model.adapters)
        self.draws = inner.model.denoiser is not None and model.config.objectives.diffusion is not None
        self.classifies = len(self.encodes) == 2 and model.config.objectives.contrastive is not None
        self.embed_dim, self.side = model.config.model.embed_dim, model.config.model.image.size
        text = model.config.model.text
        self.context_length, self.pad_id = text.context_length, text.pad_id
        self.vocab_size = inner.model.tokenizer.vocab_size

    # made ready: in threads that prepare requests

    def tokens(self, text: str) -> int:
        """How many tokens a text is, those at its ends included. Raises ValueError where it cannot be told."""
        processor: Any = self.model.inference.processor("text")
        return len(processor.tokenizer.encode(text))

    def texts(self, texts: Sequence[str]) -> list[Row]:
        """What is too long is cut. Raises ValueError as `LoadedModel.encode`."""
        return self._rows("text", texts)

    def ids(self, lists: Sequence[Sequence[int]]) -> list[Row]:
        """Texts as token ids, each at most `context_length`. Raises ValueError as `LoadedModel.encode`."""
        padding = self.model.config.model.text.pad_id
        table = torch.full((len(lists), max(map(len, lists))), padding, dtype=torch.int64)
        for row, ids in zip(table, lists, strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return self._rows("text", table)

    def picture(self, image: Image.Image) -> Row:
        """Cut and scaled to the model's size, so that the large one need not be kept."""
        return self._rows("image", [image])[0]

    def _rows(self, name: str, raw: Any) -> list[Row]:
        return list(zip(*self.model.inference.prepare(name, raw), strict=True))

    # run: in the model's thread

    def size(self, kind: Kind) -> int:
        """How many items of a kind run at once: as many as the model's micro-batch, which is always filled up."""
        return min(self._max_batch, {"labels": 1}.get(kind.name, MICRO_BATCH.get(kind.name, 16)))

    def run(self, kind: Kind, items: list[Any]) -> Sequence[Any]:
        """One result an item; see the kinds above."""
        return self._runs[kind.name](kind, items)

    def _embed(self, kind: Kind, rows: list[Row]) -> list[Tensor]:
        columns = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return list(self.model.inference.embed(kind.name, columns))

    def _draw(self, kind: Kind, asked: list[tuple[str, int]]) -> list[Image.Image]:
        assert isinstance(kind.settings, tuple)
        steps, guidance, solver, negative = kind.settings
        prompts, seeds = [prompt for prompt, _ in asked], [seed for _, seed in asked]
        options: dict[str, Any] = {} if negative is None else {"negative": negative}
        return self.model.generate(prompts, seeds=seeds, steps=steps, guidance=guidance, solver=solver, **options)

    def _classifier(self, kind: Kind, items: list[None]) -> list[Classifier]:
        found = self.classifier(kind)
        if found is None:
            assert isinstance(kind.settings, tuple)
            labels, templates = kind.settings
            found = cast("Classifier", self.model.classifier(labels, templates=templates))
            with self._lock:
                self._classifiers[kind] = found
                while len(self._classifiers) > self._label_cache:
                    self._classifiers.popitem(last=False)
        return [found] * len(items)

    def classifier(self, kind: Kind) -> Classifier | None:
        """The classifier of a label set that was asked for lately."""
        with self._lock:
            if kind in self._classifiers:
                self._classifiers.move_to_end(kind)
            return self._classifiers.get(kind)

    def warm_up(self) -> list[tuple[Kind, Any]]:
        """One item of each kind that the model can: run once, they make the first request as fast as the next."""
        items: list[tuple[Kind, Any]] = []
        if "text" in self.encodes:
            items.append((TEXT, self.texts(["a"])[0]))
        if "image" in self.encodes:
            from PIL import Image

            items.append((IMAGE, self.picture(Image.new("RGB", (self.side, self.side)))))
        if self.draws:
            items.append((drawing(1, 2.0, "euler", None), ("a", 0)))
        return items
