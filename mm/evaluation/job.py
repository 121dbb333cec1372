"""What every task of an evaluation is given: the model, the shards, and what has been read and encoded of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mm.evaluation import samples
from mm.evaluation.samples import SampleSet
from mm.evaluation.stream import Stream

if TYPE_CHECKING:
    from mm.evaluation.data_set import DataSet
    from mm.evaluation.inference import Inference

BATCH = {"image": 256, "text": 256, "draw": 32}  # larger than a user's: the order here is always the same


@dataclass
class Job:
    """`files`: the held-out shards; `reference`: those that the whole label set and all references come from.

    Pictures with their captions are read when a task first asks for `samples`, all at once; `stream` reads the held-out
    shards a chunk at a time instead, and asks for no captions unless told to. Places are of `samples`. `data` has the
    class names and templates that lie beside the shards, and their other splits; `workers` decode for streams.
    """

    inference: Inference
    files: list[str]
    reference: list[str]
    settings: dict[str, Any] = field(default_factory=dict)  # limit, steps, guidance, solver, seed, precision
    progress: bool = False
    load: Callable[[str], Any] | None = None  # reads another model, as `mm.models.export.load_export` returns it
    data: DataSet | None = None
    workers: int = 0

    @cached_property
    def samples(self) -> SampleSet:
        """Of the held-out shards and the reference. Raises ConfigError where no sample has a picture and a caption."""
        files = list(dict.fromkeys([*self.reference, *self.files]))
        return samples.read_samples(files, self.inference.processor("image"), progress=self.progress)

    @property
    def has_read(self) -> bool:
        """Whether `samples` are there already: what has them need not read the shards again."""
        return "samples" in vars(self)

    @cached_property
    def held_out(self) -> list[int]:
        return self.samples.within(set(map(os.path.abspath, self.files)))

    @cached_property
    def candidates(self) -> list[int]:
        return self.samples.within(set(map(os.path.abspath, self.reference)))

    @cached_property
    def train(self) -> list[int]:
        """Those of `candidates` that lie in train shards and are not held out."""
        held_out = set(self.held_out)
        return [
            place for place in self.candidates if samples.is_train(self.samples.shards[place]) and place not in held_out
        ]

    @cached_property
    def left_out(self) -> list[str]:
        """Names without a picture that the shards' manifest lists."""
        return samples.left_out_names(self.reference)

    def captions(self, places: Sequence[int]) -> list[str]:
        return [self.samples.captions[place] for place in places]

    def texts(self, captions: Sequence[str]) -> Tensor:
        """`[n, E]`, unit norm."""
        return self.inference.encode("text", captions, micro_batch=BATCH["text"], progress=self.progress)

    def pictures(self, places: Sequence[int]) -> Tensor:
        """`[n, E]`, unit norm."""
        return self.embed(self.samples.images[list(places)])

    def embed(self, images: Tensor) -> Tensor:
        """`[n, E]`, unit norm, of uint8 `[n, 3, H, W]` at the model's size."""
        return self.inference.embed("image", (images,), micro_batch=BATCH["image"], progress=self.progress)

    def stream(self, files: Sequence[str] | None = None, **options: Any) -> Stream:
        """The held-out shards, or other ones, in chunks; options as those of `Stream`."""
        options.setdefault("progress", "reading pictures" if self.progress else "")
        options.setdefault("workers", self.workers)
        return Stream(files or self.files, self.inference.processor("image"), **options)
