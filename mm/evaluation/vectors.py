"""An embedding index opened: the rows nearest to a query, and what each row is.

index = VectorIndex.open("emoji.index")
rows, scores = index.search(model.encode(text=["red heart"])["text"], k=5)     # [Q, 5] each
[(index.key(row), index.captions(row)) for row in rows[0].tolist()]
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm.evaluation import vector_store
from mm.evaluation.nearest import Lists, exact
from mm.evaluation.vector_store import About

MANY = 1_000_000  # rows above which lists are made and used unless told otherwise
PROBES = 64  # lists looked at


class VectorIndex:
    """Embeddings of pictures with their keys, shards and captions; everything but `index.json` is mapped, not read."""

    def __init__(self, folder: Path, about: About, embeddings: NDArray[Any], samples: dict[str, Any]) -> None:
        self.folder, self.about, self.embeddings, self._samples = folder, about, embeddings, samples
        self._ends = list(itertools.accumulate(shard.rows for shard in about.shards))
        self._lists: Lists | None = None
        self.note = ""  # why the last search was exact though lists were to be used

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> VectorIndex:
        """The index in a folder that `mm index` made. Raises ValueError of one line where it is missing or damaged."""
        folder = Path(folder)
        about = vector_store.read_about(folder)
        kind, count = vector_store.PRECISIONS[about.precision], about.count
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {"embeddings": (kind, (count, about.dim))}
        embeddings = vector_store.read_columns(folder / vector_store.EMBEDDINGS, wanted)["embeddings"]
        wanted = {"keys": ("uint8", (-1,)), "key_ends": ("int64", (count,)), "captions": ("uint8", (-1,))}
        wanted |= {"caption_ends": ("int64", (-1,)), "caption_counts": ("int64", (count,))}
        samples = vector_store.read_columns(folder / vector_store.SAMPLES, wanted)
        index = cls(folder, about, embeddings, samples)
        lengths = [len(samples[name]) for name in ("keys", "caption_ends")]
        if lengths != [int(samples["key_ends"][-1]), int(samples["caption_counts"][-1])]:
            raise index._damaged("lengths differ")
        return index

    def __len__(self) -> int:
        return self.about.count

    def search(
        self, embeddings: Tensor, k: int = 10, *, approximate: bool | None = None, probes: int = PROBES
    ) -> tuple[Tensor, Tensor]:
        """Rows int64 `[Q, k]` and scores float32 `[Q, k]` (inner products), best first, equal ones by row.

        `embeddings` `[Q, E]`; fewer than k come back from a smaller index. `approximate`: only the rows of the `probes`
        nearest lists are looked at; None does so where the index has over a million rows. Where the lists are missing
        or damaged the search is exact, and `note` says so. Raises ValueError for another shape or a number that is not
        finite.
        """
        queries = embeddings.detach().cpu().float().numpy()
        if queries.ndim != 2 or queries.shape[1] != self.about.dim:
            raise ValueError(f"embeddings: are {list(queries.shape)}; must be [Q, {self.about.dim}] for this index")
        if not np.isfinite(queries).all():
            raise ValueError("embeddings: hold a number that is not finite; give finite ones")
        if k < 1:
            raise ValueError(f"k = {k}: must be at least 1")
        use = len(self) > MANY if approximate is None else approximate
        self.note = ""
        lists = self._read_lists() if use else None
        try:
            if lists is None:
                rows, scores = exact(queries, self.embeddings, k)
            else:
                rows, scores = lists.search(queries, self.embeddings, k, probes)
        except ValueError as error:
            raise ValueError(f"{self.folder / vector_store.EMBEDDINGS}: {error}") from error
        return torch.from_numpy(rows), torch.from_numpy(scores)

    def _read_lists(self) -> Lists | None:
        """The lists beside the embeddings; None, and why in `note`, where there are none that can be used."""
        if self._lists is not None:
            return self._lists
        path = self.folder / vector_store.LISTS
        try:
            if not self.about.lists:
                raise ValueError(f"{self.folder}: has no lists; mm index --approximate makes them")
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.about.lists:
                    raise ValueError(f"{path}: is not the one that this index was made with")
            wanted: dict[str, tuple[str, tuple[int, ...]]] = {"centres": ("float32", (-1, self.about.dim))}
            wanted |= {"rows": ("uint32", (len(self),)), "ends": ("int64", (-1,))}
            found = Lists(**vector_store.read_columns(path, wanted))
            if len(found.ends) != len(found.centres) or not len(found.ends) or found.ends[-1] != len(self):
                raise ValueError(f"{path}: damaged (lists of other lengths)")
            if (np.diff(found.ends) < 0).any() or found.ends[0] < 0 or int(found.rows.max()) >= len(self):
                raise ValueError(f"{path}: damaged (a row that is not there)")
        except (ValueError, OSError) as error:
            self.note = f"{error}; every row was looked at instead"
            return None
        self._lists = found
        return found

    def key(self, row: int) -> str:
        """The key of a row's sample in its shard."""
        ends = self._samples["key_ends"]
        return self._text("keys", int(ends[row - 1]) if row else 0, int(ends[row]))

    def captions(self, row: int) -> list[str]:
        """A row's captions, [] where the index holds none."""
        counts, ends = self._samples["caption_counts"], self._samples["caption_ends"]
        first, last = int(counts[row - 1]) if row else 0, int(counts[row])
        if not 0 <= first <= last <= len(ends):
            raise self._damaged("captions")
        return [self._text("captions", int(ends[at - 1]) if at else 0, int(ends[at])) for at in range(first, last)]

    def shard(self, row: int) -> str:
        """Path or URL of the shard that a row's picture lay in when it was indexed."""
        return self.about.shards[bisect.bisect_right(self._ends, row)].path

    def _text(self, name: str, start: int, end: int) -> str:
        data = self._samples[name]
        if not 0 <= start <= end <= len(data):
            raise self._damaged(name)
        return data[start:end].tobytes().decode("utf-8", "replace")

    def _damaged(self, name: str) -> ValueError:
        return ValueError(f"{self.folder / vector_store.SAMPLES}: damaged ({name}); make the index anew")
