"""Shards as what an evaluation compares: pictures at the model's size, captions, and which of them were held out."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mm.config import ConfigError
from mm.data.captions import Captions
from mm.data.index import ShardIndex
from mm.data.reader import Reader
from mm.data.remote import is_remote
from mm.data.shards import SPLITS, expand

if TYPE_CHECKING:
    from mm.adapters.base import Processor


@dataclass
class SampleSet:
    """Samples in the order of the shards."""

    keys: list[str]
    captions: list[str]
    images: Tensor  # uint8 [N, 3, H, W]
    shards: list[str]  # [N] absolute path of each sample's shard
    unusable: int  # samples left out

    def within(self, shards: set[str]) -> list[int]:
        """Places of the samples that lie in some shards."""
        return [place for place, shard in enumerate(self.shards) if shard in shards]


def left_out_names(files: list[str]) -> list[str]:
    """Names that the manifests beside the shards list without a picture: labels that no picture here may be given."""
    names: list[str] = []
    for folder in dict.fromkeys(Path(file).parent for file in files):
        manifest = folder / "shards.json"
        if manifest.is_file():
            names += json.loads(manifest.read_text(encoding="utf-8")).get("left_out", [])
    return names


def check_whole(files: list[str]) -> None:
    """Raises ConfigError where a shard is cut or unreadable: numbers of what is left compare with nothing."""
    for about in ShardIndex(files, parts=()).table.shards:
        damage = about.unreadable or about.damage
        if damage:
            raise ConfigError(f"{about.name}: {damage}; mm shards verify says what is lost; mend it, or leave it out")


def read_samples(files: list[str], processor: Processor, *, caption: str = "txt", progress: bool = False) -> SampleSet:
    """Every usable sample of some shard files, each with the first caption that `caption` names.

    Raises ConfigError where there is none.
    """
    from tqdm import tqdm

    places = Captions(caption)
    index = ShardIndex(files, parts=places.parts)
    reader = Reader(index, places, cache_bytes=0)
    keys, captions, shards, items = [], [], [], []
    quiet = None if progress else True  # None: shown on a terminal only
    for number, key in enumerate(tqdm(index.keys, desc="reading pictures", disable=quiet, leave=False)):
        try:
            sample = reader.read(number)
            items.append(processor.prepare(sample.image, train=False))
        except ValueError:  # counted, and told in the result
            continue
        keys.append(key)
        captions.append(sample.texts[0][0][0])
        shards.append(os.path.abspath(index.shards[index.shard_of(number)]))
    if not items:
        raise ConfigError(f"{files[0]}: none of {len(index)} samples can be decoded; check the shards")
    return SampleSet(keys, captions, processor.collate(items)[0], shards, len(index) - len(items) + index.rejected)


def around(data: str, candidates: str | None) -> tuple[list[str], list[str]]:
    """Shard files of the held-out data, and of everything it is to be told from.

    Without `candidates`, data that is one split of a folder (`X/val-*.tar`) is told from all splits of that folder,
    and other data from itself.
    """
    held_out = expand(data)
    if candidates is not None:
        return held_out, expand("::".join(candidates.split("::")), mixed=True)
    if any(map(is_remote, held_out)):  # what else is there is not looked up
        return held_out, held_out
    folders = {Path(file).parent for file in held_out}
    if len(folders) > 1 or not all(_split(file) for file in held_out):
        return held_out, held_out
    folder = folders.pop()
    return held_out, sorted(str(path) for path in folder.glob("*-*.tar") if _split(path))


def _split(file: str | Path) -> str:
    """ "train", "dev" or "val" by the file's name, "" for another."""
    first = Path(file).name.split("-")[0]
    return first if first in SPLITS else ""


def is_train(shard: str) -> bool:
    return _split(shard) == "train"


def evenly(places: list[int], limit: int) -> list[int]:
    """At most `limit` of the places, evenly spaced, always the same ones."""
    if len(places) <= limit:
        return places
    return [places[int(at)] for at in np.linspace(0, len(places) - 1, limit)]


def index_of(places: list[int], within: list[int]) -> Tensor:
    """int64: where each place stands in the list `within`."""
    where = {place: number for number, place in enumerate(within)}
    return torch.tensor([where[place] for place in places], dtype=torch.int64)
