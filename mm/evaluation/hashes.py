"""Hashes that say whether two results are of the same data, words and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from mm.data.joined import open_table
from mm.data.table import PARTS

LENGTH = 16  # hexadecimal digits that are kept


def of_words(words: Sequence[str]) -> str:
    """Of labels, templates or any other list of texts, in their order."""
    return hashlib.sha256(json.dumps(list(words), ensure_ascii=False).encode()).hexdigest()[:LENGTH]


def of_shards(files: Sequence[str]) -> dict[str, str | None]:
    """`data`: of every sample's key and the sizes of its image and captions, in order, however they lie in shards.

    From the index alone, so that it costs next to nothing. `images`: the same with each image's CRC-32, where the
    shards were indexed with it (`mm shards index`); else None.
    """
    table = open_table(list(files))
    digest = hashlib.sha256()
    for column in (table.columns["key_sizes"], table.columns["keys"], *map(table.sizes, PARTS)):
        digest.update(np.ascontiguousarray(column).data)
    sums = table.look("crc")
    found: dict[str, str | None] = {"data": digest.hexdigest()[:LENGTH], "images": None}
    if sums is not None and bool(sums.all()):
        digest.update(np.ascontiguousarray(sums).data)
        found["images"] = digest.hexdigest()[:LENGTH]
    return found
