"""Members of a sample that no index knows, such as `KEY.depth.png`: found beside those that it does.

An index says where a sample's image and captions lie. Another member is looked for where webdataset has it: next to
these, before, between or behind them. So shards that were indexed long ago need no new index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mm.data.table import KEY, LARGEST
from mm.data.tar import Scan, Source

if TYPE_CHECKING:
    from mm.data.index import ShardIndex


class Beside(NamedTuple):
    """Offset and size in bytes by extension; `problem` says why a member cannot be used, or is "" ."""

    spans: dict[str, tuple[int, int]]
    problem: str


def beside(index: ShardIndex, number: int, extensions: Sequence[str], source: Source) -> Beside:
    """The members of sample `number` with these extensions, from the headers in its shard, which `source` reads.

    Of two of one name the first is taken, as in an index. Raises OSError where the shard cannot be read.
    """
    key, found, seen = index.key(number), dict[str, tuple[int, int]](), False
    start, last = _around(index, number)
    scan = Scan(source, start)
    for name, offset, size, problem in scan:
        match = KEY.match(name)
        if match is None:
            continue
        if match[1] != key:
            if seen and offset > last:
                break
            continue
        seen, extension = True, match[2].lower()
        if extension not in extensions or extension in found:
            continue
        if problem or size > LARGEST:
            return Beside({}, f"{extension}: {problem or f'{size} bytes is over the limit of {LARGEST}'}")
        found[extension] = offset, size
        if len(found) == len(extensions):
            break
    lacking = [extension for extension in extensions if extension not in found]
    if lacking:
        return Beside({}, f"no {lacking[0]} beside its other members{f'; shard {scan.damage}' if scan.damage else ''}")
    return Beside(found, "")


def _around(index: ShardIndex, number: int) -> tuple[int, int]:
    """Where to begin, right behind the last part of an earlier sample, and where the sample's own last part lies."""
    row, table = index.row(number), index.table
    own = [start for start, _ in table.places(row)]
    for earlier in range(row - 1, row - 1 - index.place(number), -1):
        ends = [end for _, end in table.places(earlier) if end <= min(own)]
        if ends:
            return max(ends), max(own)
    return 0, max(own)
