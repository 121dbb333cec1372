"""What `data.train` names, opened: one index over all its sources, where captions are, and the order of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm.config import ConfigError
from mm.data.buckets import Buckets, aspect_codes, length_codes
from mm.data.captions import Captions, per_source, read_weights
from mm.data.index import ShardIndex
from mm.data.mixture import Mixture
from mm.data.order import Order
from mm.data.reader import read_captions
from mm.data.remote import Options, is_remote
from mm.data.shard_cache import ShardCache
from mm.data.shards import expand
from mm.data.sidecar import cache_folder
from mm.data.table import NONE

WINDOW = 64  # batches within which like samples are brought together
_EDGES = [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024]  # bytes of a caption
_ENOUGH_TEXT = 100_000  # samples that a tokenizer is fitted to


class Access(NamedTuple):
    """How remote shards are had: disk that fetched ones may take, and seconds without a byte before another try."""

    fetch_gb: float = 20.0
    stall_seconds: float = 60.0

    @property
    def options(self) -> Options:
        return Options(stall=self.stall_seconds, patience=self.stall_seconds)

    def store(self, index: ShardIndex) -> ShardCache | None:
        """Where they are fetched to; None where all shards are local."""
        if not any(map(is_remote, index.shards)):
            return None
        return ShardCache(str(cache_folder() / "shards"), int(self.fetch_gb * 1e9), self.options)


@dataclass
class Sources:
    """One index over all sources; `captions` one a shard; `counts` shards of each source; `weights` None: joined."""

    index: ShardIndex
    captions: list[Captions]
    counts: list[int]
    weights: list[float] | None

    def order(self, seed: int, block: int) -> Order | Mixture:
        """The endless training order."""
        if self.weights is None:
            return Order(self.index.sizes, seed, block)
        return Mixture(np.split(self.index.sizes, np.cumsum(self.counts)[:-1]), self.weights, seed, block)


def check(spec: str, caption: str, weights: str) -> None:
    """Raises ConfigError where shards are not there, or captions or weights do not fit, before anything is read."""
    expand(spec)
    per_source(caption, len(spec.split("::")))
    read_weights(weights, len(spec.split("::")))


def open_sources(spec: str, caption: str = "txt", weights: str = "", access: Access = Access()) -> Sources:  # noqa: B008
    """The sources that `spec` joins by `::`. Raises ConfigError where names, captions or weights cannot work."""
    shards = expand(spec)
    parts = spec.split("::")
    places, given = per_source(caption, len(parts)), read_weights(weights, len(parts))
    single = len(parts) == 1 or (given is None and "::" not in caption)
    counts = [len(shards)] if single else [len(expand(part)) for part in parts]
    captions = [place for place, count in zip(places, counts, strict=False) for _ in range(count)]
    index = ShardIndex(shards, spec=spec, parts=[place.parts for place in captions], options=access.options)
    return Sources(index, captions, counts, given)


def corpus(spec: str, caption: str, access: Access) -> list[str]:
    """Captions that a tokenizer is fitted to: all that training may draw, and the aliases that `mm shards` writes.

    Of more than 100,000 samples evenly spaced ones.
    """
    sources = open_sources(spec, caption, access=access)
    numbers = np.linspace(0, len(sources.index) - 1, min(len(sources.index), _ENOUGH_TEXT)).astype(int).tolist()
    known: dict[str, Captions] = {}
    wide = [known.setdefault(place.spec, Captions(f"{place.spec},json.aliases")) for place in sources.captions]
    return read_captions(sources.index, wide, every=True, numbers=numbers, store=access.store(sources.index))[1]


def by_likeness(
    order: Order | Mixture,
    index: ShardIndex,
    kind: Literal["text", "aspect"],
    shapes: Sequence[tuple[int, int]],
    batch_size: int,
) -> Buckets:
    """`order` in batches of like samples. Raises ConfigError where the index does not say what is alike."""
    return Buckets(order, Likeness(index, kind, shapes), batch_size, WINDOW * batch_size)


class Likeness:
    """Sample numbers `[n]` to codes: of the nearest shape, or of the caption's length in bytes."""

    def __init__(self, index: ShardIndex, kind: Literal["text", "aspect"], shapes: Sequence[tuple[int, int]]) -> None:
        self.index, self.kind, self.shapes = index, kind, list(shapes)
        self._known: tuple[NDArray[np.uint16], NDArray[np.uint16]] | None = None
        columns = index.table.columns
        if kind == "aspect" and index.table.look("width") is None:
            raise ConfigError(
                "data.buckets = 'aspect': no index that holds the pictures' sizes; run mm shards index on data.train"
            )
        if kind == "aspect" and not self.shapes:
            raise ConfigError("data.buckets = 'aspect': needs shapes to crop to")
        if kind == "text" and not {"txt.size", "caption.size"} & set(columns):
            raise ConfigError("data.buckets = 'text': needs captions in txt or caption members; use 'none'")

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        rows, columns = self.index.rows(numbers), self.index.table.columns
        if self.kind == "aspect":
            width, height = self._sides()
            return aspect_codes(width[rows], height[rows], self.shapes)
        sizes = self.index.table.sizes("txt" if "txt.size" in columns else "caption")[rows]
        return length_codes(np.where(sizes == NONE, 0, sizes), _EDGES)

    def _sides(self) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        if self._known is None:
            width, height = self.index.table.look("width"), self.index.table.look("height")
            assert width is not None and height is not None, "looked for when this was made"
            self._known = width, height
        return self._known

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}
