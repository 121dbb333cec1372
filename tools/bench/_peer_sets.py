"""The data sets that streaming libraries are compared on: small numbered pictures, whole, cut, poisoned."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _peers import PROBES
from PIL import Image

sys.path.append(str(PROBES))
from probing import Payload

EVEN = (250, 250, 250, 250)
UNEVEN = (301, 257, 211, 149, 97)  # 1,015 samples: no multiple of any batch


def shards(folder: Path, sizes: Sequence[int], first: int = 0) -> Path:
    """Shards of so many samples, numbered from `first`: a picture of 64×48 pixels, and a caption with the number."""
    folder.mkdir(parents=True)
    rng, number = np.random.default_rng(first), first
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for _ in range(size):
                add(tar, f"{number:06d}.jpg", _jpeg(rng))
                add(tar, f"{number:06d}.txt", f"picture number {number}".encode())
                number += 1
    (folder / "sizes").write_text(str(sum(sizes)))  # open_clip has to be told
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def cuts(source: Path, out: Path, count: int) -> list[dict[str, Any]]:
    """Copies of `source` whose second shard is to end early: `folder`, the `shard` in it, where to `cut` it, and the
    numbers of the samples that are `gone` then. Three of four cuts are anywhere, one is where a member begins."""
    rng, original = np.random.default_rng(1), sorted(source.glob("*.tar"))[1]
    with tarfile.open(original) as tar:
        members = tar.getmembers()
    ends = [member.offset_data + member.size for member in members[1::2]]  # of a caption: its sample is whole
    anywhere = rng.integers(1, ends[-1], size=count - count // 4).tolist()
    between = [members[place].offset for place in rng.integers(1, len(members), size=count // 4)]
    found: list[dict[str, Any]] = []
    for number, cut in enumerate(anywhere + between):
        folder = out / f"cut-{chr(ord('a') + number)}"  # no digits: messages are searched for counts
        shutil.copytree(source, folder)
        gone = [int(member.name[:6]) for member, end in zip(members[1::2], ends, strict=True) if end > cut]
        found.append({"folder": str(folder), "shard": str(folder / original.name), "cut": int(cut), "gone": gone})
    return found


def cut_copies(source: Path, out: Path, pattern: str, parts: Sequence[float]) -> list[dict[str, Any]]:
    """The same for a format of a library's own: its second shard, cut at these parts of its length."""
    original = sorted(source.glob(pattern))[1]
    found = []
    for number, part in enumerate(parts):
        folder = out / f"cut-{chr(ord('a') + number)}"
        shutil.copytree(source, folder)
        cut = int(original.stat().st_size * part)
        os.truncate(folder / original.name, cut)
        found.append({"folder": str(folder), "cut": cut})
    return found


def poisoned(folder: Path, marker: Path) -> Path:
    """40 samples, one of them with a pickled member that nobody asked for: who unpickles it makes the file `marker`."""
    shards(folder, (40,))
    with tarfile.open(folder / "train-000000.tar", "w") as tar:
        rng = np.random.default_rng(0)
        for number in range(40):
            add(tar, f"{number:06d}.jpg", _jpeg(rng))
            add(tar, f"{number:06d}.txt", f"picture number {number}".encode())
            if number == 7:
                add(tar, f"{number:06d}.pyd", pickle.dumps(Payload(str(marker))))
    return folder


def _jpeg(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, size=(6, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((64, 48), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()
