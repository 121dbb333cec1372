"""One modality's door into and out of the model: a `Processor` (data, no parameters) and an `Adapter` (parameters)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mm.types import Batch, Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence


EXTENSION = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,63}\Z")  # of a shard's members, as a `source` names it


class Processor:
    """Turns one raw item into a small dict of arrays, a list of those into a tensor, and a tensor back into items.

    Plain and picklable: the same object runs in data workers and at inference. `source` names what of a raw sample it
    reads: "image" (a picture), "text" (a caption), or the extension of a shard's member ("depth.png"), whose bytes it
    is given then. So two inputs may be made from one picture.
    """

    source: str = ""

    def prepare(self, raw: Any, *, train: bool, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """One item as arrays. With `train`, `rng` drives every random choice; without, it is never touched.

        Raises ValueError where `raw` is not something that this modality can read.
        """
        raise NotImplementedError

    def collate(self, items: Sequence[dict[str, np.ndarray]]) -> tuple[Tensor, Tensor | None]:
        """A padded batch tensor `[B, ...]` and the valid lengths `[B]`, or None where nothing is ragged."""
        raise NotImplementedError

    def render(self, tensor: Tensor) -> list[Any]:
        """The inverse of `collate(prepare(...))` as far as one exists: pictures, strings, ..."""
        raise NotImplementedError


class Adapter(nn.Module):
    """Embeds one modality of a batch as tokens for the encoder."""

    def __init__(self, name: str, processor: Processor):
        super().__init__()
        self.name = name
        self.processor = processor

    def embed(self, batch: Batch) -> Tokens:
        """Tokens `[B, N, D]` with positions, from `batch.inputs[self.name]`."""
        raise NotImplementedError


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Bool `[B, width]`, True at positions before each sample's length."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]
