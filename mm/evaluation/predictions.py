"""The likeliest labels of pictures: of a batch, and of whole shards one sample after the other.

Letters: B images, L labels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mm.data.index import Entry
from mm.data.shards import expand
from mm.evaluation.stream import Stream

if TYPE_CHECKING:
    from mm.adapters.base import Processor

Ranking = list[tuple[str, float]]  # labels with their probabilities, best first
ROWS = 32  # pictures whose probabilities are held at once: of a million labels, 128 MB


@dataclass
class Prediction:
    """Of one sample of a shard."""

    key: str
    shard: str  # absolute path or URL
    top: Ranking
    captions: list[str] = field(default_factory=list)
    members: dict[str, bytes] = field(default_factory=dict)


class Predictions:
    """Iterates over the samples of some shards, a `Prediction` each, in their order; each iteration begins anew.

    `label`: uint8 pictures `[B, 3, H, W]` at the model's size to probabilities `[B, L]`. Other arguments as of
    `Classifier.stream`. `lost` says what could not be used so far and why; `len` is the number of indexed samples.
    """

    def __init__(
        self,
        labels: Sequence[str],
        label: Callable[[Tensor], Tensor],
        processor: Processor,
        shards: str | Sequence[str],
        *,
        k: int = 5,
        captions: str = "",
        members: Sequence[str] = (),
        workers: int = 0,
        limit: int | None = None,
        progress: bool = False,
    ) -> None:
        check_k(k)
        files = expand(shards, mixed=True) if isinstance(shards, str) else list(shards)
        self.labels, self.label, self.k = labels, label, k
        self._stream = Stream(
            files,
            processor,
            captions=captions,
            members=members,
            workers=workers,
            limit=limit,
            progress="classifying" if progress else "",
        )

    def __len__(self) -> int:
        return len(self._stream)

    @property
    def lost(self) -> list[Entry]:
        return self._stream.lost

    def __iter__(self) -> Iterator[Prediction]:
        for chunk in self._stream:
            for start in range(0, len(chunk), ROWS):
                rows = range(start, min(start + ROWS, len(chunk)))
                tops = ranked(self.labels, self.label(chunk.images[start : start + ROWS]), self.k)
                for row, top in zip(rows, tops, strict=True):
                    yield Prediction(chunk.keys[row], chunk.shards[row], top, chunk.captions[row], chunk.members[row])


def ranked(labels: Sequence[str], probabilities: Tensor, k: int) -> list[Ranking]:
    """The `k` likeliest labels (fewer where there are fewer) of each row of `[B, L]`, best first."""
    values, places = probabilities.topk(min(k, len(labels)))
    return [
        [(labels[place], share) for place, share in zip(*row, strict=True)]
        for row in zip(places.tolist(), values.tolist(), strict=True)
    ]


def check_k(k: Any) -> None:
    """Raises ValueError unless `k` is a whole number of at least 1."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k = {k!r}: must be at least 1, a whole number")
