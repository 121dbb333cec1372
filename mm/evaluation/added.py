"""Retrieval with the modalities that a config adds to image and text."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mm.data.captions import Captions
from mm.data.index import ShardIndex
from mm.data.reader import Reader
from mm.evaluation.retrieval import recall

if TYPE_CHECKING:
    from mm.adapters.base import Processor
    from mm.evaluation.inference import Inference

Sample = tuple[str, str]  # absolute path of its shard, and its key


def retrieval_with(
    inference: Inference,
    files: list[str],
    names: Sequence[Sample],
    pooled: Mapping[str, Tensor],
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Recall between every two modalities one of which is an added one, and `pairs`, the samples that have them all.

    `pooled`: the embeddings `[N, E]` of images and texts of the samples `names`, which lie in the shards `files`.
    """
    added = {modality.name: inference.processor(modality.name) for modality in inference.config.model.modalities}
    items = read_items(files, added)
    rows = [row for row, name in enumerate(names) if name in items]
    found: dict[str, Any] = {"pairs": len(rows)}
    if not rows:
        return found
    pooled = {name: embeddings[rows] for name, embeddings in pooled.items()}
    for name, processor in added.items():
        tensor, lengths = processor.collate([items[names[row]][name] for row in rows])
        columns = (tensor,) if lengths is None else (tensor, lengths)
        pooled[name] = inference.embed(name, columns, progress=progress)
    for one, other in itertools.combinations(pooled, 2):
        if other in added:
            found |= recall(pooled[one], pooled[other], names=(one, other))
    return found


def read_items(files: list[str], processors: Mapping[str, Processor]) -> dict[Sample, dict[str, Any]]:
    """What each processor makes of each sample.

    Samples that lack what a processor reads, or that it cannot read, are left out.
    """
    places = Captions("txt")
    index = ShardIndex(files, parts=places.parts)
    sources = {processor.source for processor in processors.values()}
    members = sorted(sources - {"image", "text"})
    reader = Reader(index, places, cache_bytes=0, images="image" in sources, members=members)
    found = {}
    for number, key in enumerate(index.keys):
        try:
            sample = reader.read(number)
            raw = {"image": sample.image, "text": sample.texts[0][0][0], **sample.members}
            items = {name: one.prepare(raw[one.source], train=False) for name, one in processors.items()}
        except ValueError:  # counted by who asks
            continue
        found[os.path.abspath(index.shards[index.shard_of(number)]), key] = items
    return found
