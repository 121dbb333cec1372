"""Every usable sample of some shards, by number. Opened in well under a second, whatever was indexed before."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from mm.config import ConfigError
from mm.data import remote
from mm.data.joined import open_table
from mm.data.table import IMAGES, NONE, PARTS, Shard, Table
from mm.data.tar import BLOCK

LARGEST_TEXT = 1 << 20  # bytes of a caption or of metadata
_PAGE = 64  # samples between two known places of keys
_PIECE = 1 << 15  # rows looked at at once


class Entry(NamedTuple):
    """One line of the ledger: a sample, or with an empty key a whole shard or member, that could not be used."""

    shard: str
    key: str
    reason: str


class Keys(Sequence[str]):
    """The keys of an index, each decoded when it is asked for."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self._index.key(number % len(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class ShardIndex:
    """Every usable sample of some shards: its key, and where its parts lie.

    `parts`: what may hold a sample's caption ("txt", "caption", "json"), a tuple for all or a list of one a shard; an
    empty tuple where pictures alone are wanted.
    `shards`: paths or URLs; `sizes`: usable samples in each, int64 [S]; `ledger` says what was left out and why,
    `rejected` of `seen` samples. Raises ConfigError naming the member extensions seen where no sample is usable.
    """

    def __init__(
        self,
        shards: Sequence[str],
        *,
        spec: str = "",
        parts: tuple[str, ...] | Sequence[tuple[str, ...]] = ("txt",),
        options: remote.Options = remote.DEFAULTS,
    ) -> None:
        self.table = open_table(shards, options=options)
        self.shards = list(shards)
        self.ledger: list[Entry] = []
        self.seen = self.rejected = 0
        self._parts = [parts if isinstance(parts, tuple) else tuple(parts[place]) for place in range(len(self.shards))]
        self._starts = _starts([about.rows for about in self.table.shards])
        self._bounds = self._starts.tolist()  # for one sample bisect is ten times as fast
        sizes = self.table.columns["key_sizes"]
        pages: NDArray[np.int64] | list[int] = []
        if len(sizes):
            pages = np.add.reduceat(sizes, np.arange(0, len(sizes), _PAGE), dtype=np.int64)
        self._anchors = _starts(pages)
        self._bad = self._unusable()  # rows; few, so that a sample's row is its number and the bad ones before it
        self._gaps = self._bad - np.arange(len(self._bad))
        edges = np.searchsorted(self._bad, self._starts)
        self.sizes = np.diff(self._starts) - np.diff(edges)
        for place, about in enumerate(self.table.shards):
            self._enter(place, about, self._bad[edges[place] : edges[place + 1]])
        if not len(self):
            raise ConfigError(self._nothing(spec or "::".join(self.shards[:3])))

    def __len__(self) -> int:
        return len(self.table) - len(self._bad)

    @property
    def keys(self) -> Keys:
        return Keys(self)

    def row(self, number: int) -> int:
        """Where sample `number` stands in the table."""
        return number + int(np.searchsorted(self._gaps, number, side="right")) if len(self._gaps) else number

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same for many."""
        return numbers + np.searchsorted(self._gaps, numbers, side="right") if len(self._gaps) else numbers

    def shard_of(self, number: int) -> int:
        """The shard of sample `number`."""
        return bisect.bisect_right(self._bounds, self.row(number)) - 1

    def shards_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shards of samples `[n]`."""
        return np.searchsorted(self._starts, self.rows(numbers), side="right") - 1

    def key(self, number: int) -> str:
        """The key of sample `number`."""
        return self._key(self.row(number), self.shard_of(number))

    def _key(self, row: int, shard: int) -> str:
        start, size = self._key_start(row), int(self.table.columns["key_sizes"][row])
        return self.table.columns["keys"][start : start + size].tobytes().decode("utf-8", "replace")

    def _key_start(self, row: int) -> int:
        """Where the key of a row begins, from the sum that is kept for every so many."""
        page = row // _PAGE
        return int(self._anchors[page] + self.table.columns["key_sizes"][page * _PAGE : row].sum(dtype=np.int64))

    def span(self, number: int, part: str) -> tuple[int, int]:
        """Offset and size in bytes of a part of sample `number`; size -1: it has none."""
        return self.spans(number, (part,))[1].get(part, (0, -1))

    def spans(self, number: int, names: Sequence[str]) -> tuple[int, dict[str, tuple[int, int]]]:
        """The shard of sample `number`, and offset and size in bytes of those of its parts that it has."""
        row, columns = self.row(number), self.table.columns
        found = {}
        for name in names:
            column = columns.get(f"{name}.size")
            if column is not None and (size := int(column[row])) != NONE:
                found[name] = BLOCK * int(columns[f"{name}.block"][row]), size
        return bisect.bisect_right(self._bounds, row) - 1, found

    def after(self, number: int) -> int:
        """The first sample of the next shard that has any, from the first again after the last."""
        ends = np.cumsum(self.sizes)
        return int(ends[np.searchsorted(ends, number, side="right")]) % len(self)

    def still(self, shard: int, now: Table) -> int | None:
        """How many samples of a shard, from its first on, lie where they were indexed; None where it is another one.

        All of them, unless it is damaged now: then those before the damage.
        """
        indexed = int(self._starts[shard + 1] - self._starts[shard])
        if not now.shards[0].damage:
            return indexed if len(now) == indexed and self._alike(shard, now, indexed) else None
        counts = (len(now), max(len(now) - 1, 0))  # the damage may have gone through the last
        return next((rows for rows in counts if rows <= indexed and self._alike(shard, now, rows)), None)

    def place(self, number: int) -> int:
        """Which of its shard's samples, from 0, sample `number` is."""
        return self.row(number) - int(self._starts[self.shard_of(number)])

    def _alike(self, shard: int, now: Table, rows: int) -> bool:
        """Whether the first `rows` samples of a shard and of `now` are the same, at the same places."""
        first, columns = int(self._starts[shard]), self.table.columns
        base, bytes_ = self._key_start(first), int(now.columns["key_sizes"][:rows].sum(dtype=np.int64))
        pairs = [(columns["keys"][base : base + bytes_], now.columns["keys"][:bytes_])]
        for name in ("key_sizes", *(f"{part}.{what}" for part in PARTS for what in ("block", "size"))):
            then, there = columns.get(name), now.columns.get(name)
            if then is None and there is None:
                continue
            absent = np.full(rows, NONE if name.endswith(".size") else 0, np.uint32)
            one, other = absent if then is None else then[first : first + rows], absent if there is None else there
            pairs.append((one, other[:rows]))
        return all(np.array_equal(one, other) for one, other in pairs)

    def _unusable(self) -> NDArray[np.int64]:
        """Rows of the table that cannot be used, a piece of it at a time so that memory stays small."""
        found = [np.empty(0, np.int64)]
        first = 0
        kinds = zip(self._parts, [bool(about.unreadable) for about in self.table.shards], strict=True)
        counts = iter(np.diff(self._starts).tolist())
        for (parts, lost), same in itertools.groupby(kinds):
            last = first + sum(next(counts) for _ in same)
            for start in range(first, last, _PIECE):
                rows = slice(start, min(start + _PIECE, last))
                images = self.table.sizes("image", rows)
                good = (images != NONE) & (images != 0) & (not lost)
                some = np.full(len(good), not parts)
                for part in parts:
                    sizes = self.table.sizes(part, rows)
                    some |= (sizes > 0) & (sizes <= LARGEST_TEXT)
                found.append(start + np.flatnonzero(~(good & some)))
            first = last
        return np.concatenate(found)

    def _enter(self, place: int, about: Shard, bad: NDArray[np.int64]) -> None:
        """Enters one shard in the ledger, with its unusable rows."""
        name = self.shards[place]
        self.seen += about.rows + len(about.lost)
        self.rejected += len(about.lost) + len(bad)
        for key, reason in about.problems:
            self.ledger.append(Entry(name, key, reason))
        if about.unreadable:
            self.ledger.append(Entry(name, "", f"{about.unreadable}; {about.rows} samples lost"))
            return
        for row in bad.tolist():
            self.ledger.append(Entry(name, self._key(row, place), self._lacks(row, self._parts[place])))
        if about.damage or not about.rows:
            self.ledger.append(Entry(name, "", about.damage or "holds no sample"))
        for key in about.lost:
            self.ledger.append(Entry(name, key, f"lost: {about.damage}"))

    def _lacks(self, row: int, parts: Sequence[str]) -> str:
        """Why a row is not usable."""
        image = int(self.table.sizes("image")[row])
        if image == NONE:
            return "no image"
        if not image:
            return "empty image"
        sizes = [int(size) for size in (self.table.sizes(part)[row] for part in parts) if size != NONE]
        return f"caption of {max(sizes)} bytes" if sizes else "no caption"

    def _nothing(self, spec: str) -> str:
        if not self.seen or any(about.unreadable for about in self.table.shards):
            first = f"; {self.ledger[0].shard!r}: {self.ledger[0].reason}" if self.ledger else ""
            return f"shards {spec!r}: no sample in {len(self.shards)} shard(s){first}"
        seen = ", ".join(sorted({e for about in self.table.shards for e in about.extensions})[:12])
        asked = {part for parts in self._parts for part in parts}
        hint = (
            "; captions in json are named --data.caption json.FIELD" if "json" in seen and "json" not in asked else ""
        )
        refused = next((f"; {entry.shard!r}: {entry.reason}" for entry in self.ledger if not entry.key), "")
        caption = f" and a caption ({', '.join(dict.fromkeys(p for ps in self._parts for p in ps))})" if asked else ""
        return (
            f"shards {spec!r}: none of {self.seen} samples has an image ({', '.join(IMAGES)}){caption}; "
            f"member extensions seen: {seen}{refused}{hint if asked else ''}"
        )


def _starts(counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)
