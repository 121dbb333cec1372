"""One shard written again: every member as it was, and an autoencoder's latents behind each sample's picture."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mm.adapters.image import ImageProcessor
from mm.adapters.latents import MEMBER
from mm.data import decode
from mm.data.table import KEY, LARGEST, NONE, Shard, build, keys_of
from mm.data.tar import BLOCK, File, Member, Scan

_THREADS = 8  # that decode pictures
_NAMED = 3  # keys that a line of the report names

Encode = Callable[[np.ndarray], np.ndarray]


class Rewrite:
    """One shard being written again: every member as it was, and latents right behind each sample's picture."""

    def __init__(self, source: File, encode: Encode, size: int, batch: int) -> None:
        self.source, self.encode, self.batch = source, encode, batch
        self.processor = ImageProcessor(size)  # what makes the target that diffusion draws
        scan = Scan(source)
        self.members = [m for m in scan if not m.problem and m.size <= LARGEST and _of(m)[1] != MEMBER]
        table = build(Shard("", source.end), Scan(source))
        self.damage, self.refused = scan.damage, [reason for _, reason in table.shards[0].problems]
        blocks = table.columns.get("image.block", np.zeros(len(table), np.uint32)).tolist()
        sizes = table.sizes("image").tolist()
        starts = [None if size == NONE else BLOCK * block for block, size in zip(blocks, sizes, strict=True)]
        self.keys = {start: key for start, key in zip(starts, keys_of(table), strict=True) if start is not None}
        self.bad = {key: "no image" for start, key in zip(starts, keys_of(table), strict=True) if start is None}
        self.samples = 0

    @property
    def problem(self) -> str:
        """All that is wrong, in one line."""
        parts = [self.damage] if self.damage else []
        parts += self.refused[:_NAMED]
        if self.bad:
            some = ", ".join(f"{key}: {reason}" for key, reason in list(self.bad.items())[:_NAMED])
            parts.append(f"{len(self.bad)} samples without latents ({some}{', ...' if len(self.bad) > _NAMED else ''})")
        return "; ".join(parts)

    def write(self, to: Any, tell: Callable[[int], Any]) -> None:
        """The whole shard into an open file; `tell` is given the bytes of the source that are done."""
        pictures = [member for member in self.members if member.offset in self.keys]
        files = self._encoded([pictures[at : at + self.batch] for at in range(0, len(pictures), self.batch)])
        done = 0
        with tarfile.open(fileobj=to, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for member in self.members:
                _add(tar, member.name, self.source.read(member.offset, member.size))
                if member.offset in self.keys and (latents := next(files)):
                    _add(tar, f"{self.keys[member.offset]}.{MEMBER}", latents)
                tell(member.offset + member.size - done)
                done = member.offset + member.size
        tell(self.source.end - done)

    def _encoded(self, groups: list[list[Member]]) -> Iterator[bytes]:
        """The latents of each picture as a file, in order; empty for one that has none."""
        with ThreadPoolExecutor(_THREADS) as pool:
            ahead = [pool.map(self._pixels, group) for group in groups[:1]]
            for group, following in itertools.zip_longest(groups, groups[1:]):
                found = list(ahead.pop())
                ahead = [pool.map(self._pixels, following)] if following else []  # while these are encoded
                good = [pixels for pixels in found if isinstance(pixels, np.ndarray)]
                made = iter(self.encode(np.stack(good)) if good else ())
                for member, pixels in zip(group, found, strict=True):
                    key = self.keys[member.offset]
                    yield self._refuse(key, pixels) if isinstance(pixels, str) else self._file(key, next(made))

    def _pixels(self, member: Member) -> np.ndarray | str:
        """uint8 `[3, size, size]` of a picture, or why it has none."""
        try:
            picture = decode.picture(self.source.read(member.offset, member.size))
            pixels = self.processor.prepare(picture, train=False)["pixels"]
        except ValueError as error:
            return str(error)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _file(self, key: str, latents: np.ndarray) -> bytes:
        if not np.isfinite(latents).all():
            return self._refuse(key, "its latents are no finite numbers in float16")
        self.samples += 1
        data = io.BytesIO()
        np.lib.format.write_array(data, np.ascontiguousarray(latents), version=(1, 0), allow_pickle=False)
        return data.getvalue()

    def _refuse(self, key: str, reason: str) -> bytes:
        self.bad[key] = reason
        return b""


def _of(member: Member) -> tuple[str, str]:
    """Key and extension; both empty where it is no part of a sample."""
    match = KEY.match(member.name)
    return (match[1], match[2].lower()) if match else ("", "")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults are fixed: owner 0, time 0
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))
