"""A job of classification: every picture of a source labelled once, what cannot be read told, all of it counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

from mm.data.index import Entry
from mm.evaluation.predictions import Prediction

REASONS = 1000  # unusable pictures that a summary names; it counts all


class Source(Protocol):
    """`Predictions` of shards, or `FilePredictions`: iterates, and fills `lost` meanwhile."""

    @property
    def lost(self) -> list[Entry]: ...

    def __iter__(self) -> Iterator[Prediction]: ...


class Tally:
    """What a job found: pictures a label, and how sure the model was of them."""

    def __init__(self) -> None:
        self.labels: Counter[str] = Counter()
        self.sum, self.lost = 0.0, list[Entry]()

    def add(self, prediction: Prediction) -> None:
        label, share = prediction.top[0]
        self.labels[label] += 1
        self.sum += share

    def summary(self) -> dict[str, Any]:
        """As JSON: `images`, `lost` (a count) and `reasons` (of the first ones), `mean_confidence`, and `labels`, how
        many pictures each was the likeliest of, the most frequent first."""
        images = self.labels.total()
        return {
            "images": images,
            "lost": len(self.lost),
            "reasons": [_named(entry) | {"reason": entry.reason} for entry in self.lost[:REASONS]],
            "mean_confidence": self.sum / images if images else None,
            "labels": dict(self.labels.most_common()),
        }


def each(
    source: Source, *, errors: Literal["stop", "skip"], say: Callable[[str], None], tally: Tally
) -> Iterator[Prediction]:
    """The source's predictions, counted. What could not be used is said in a line each, or with "stop" ends the job.

    Raises ValueError then, naming the picture, before any prediction of the same batch.
    """

    def tell() -> None:
        for entry in source.lost[len(tally.lost) :]:
            if errors == "stop":
                raise ValueError(f"{_name(entry)}: {entry.reason}")
            tally.lost.append(entry)
            say(f"{_name(entry)}: {entry.reason}")

    for prediction in source:
        tell()
        tally.add(prediction)
        yield prediction
    tell()


def _name(entry: Entry) -> str:
    return ": ".join(_named(entry).values())


def _named(entry: Entry) -> dict[str, str]:
    return {"shard": entry.shard, "key": entry.key} if entry.shard else {"image": entry.key}
