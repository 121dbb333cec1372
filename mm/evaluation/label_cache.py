"""Label weights kept on disk: data only, whole or not at all, and never more than a stated size of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.config import ConfigError
from mm.data.sidecar import cache_folder
from mm.evaluation.images import write_whole

LIMIT_BYTES = 1 << 30  # of a folder
_OURS = re.compile(r"[0-9a-f]{40}\.safetensors")
_PARTIAL = re.compile(r"\.[0-9a-f]{40}\.safetensors\..+")  # what a killed process leaves
_STALE_SECONDS = 3600.0
_HEADER = 1 << 16  # bytes that a file may have beyond its numbers


class LabelCache:
    """Float32 matrices in `folder` by the hash of what they follow from; the least recently used ones make room."""

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        return self.path(key).is_file()

    def read(self, key: str, shape: tuple[int, int]) -> Tensor | None:
        """The matrix `[L, E]` of that key; None where there is none, or one that is damaged or of another shape.

        Raises OSError where a file is there and cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path(key)
        try:
            if path.stat().st_size > 4 * shape[0] * shape[1] + _HEADER:
                return None
            with safe_open(path, framework="pt") as file:
                note = json.loads((file.metadata() or {}).get("mm", "{}"))
                if tuple(file.get_slice("weights").get_shape()) != shape:
                    return None
                weights = file.get_tensor("weights").clone()  # not the mapped file, which may be cut under it
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (SafetensorError, ValueError):  # damaged
            return None
        if weights.dtype != torch.float32 or not isinstance(note, dict) or note.get("blake2b") != digest(weights):
            return None
        _touch(path)
        return weights

    def write(self, key: str, weights: Tensor) -> None:
        """Keeps the matrix, unless it alone is over the limit. Raises ConfigError where the folder takes no file."""
        from safetensors.torch import save

        if 4 * weights.numel() + _HEADER > self.limit_bytes:
            return
        note: dict[str, Any] = {"blake2b": digest(weights), "labels": len(weights)}
        try:
            write_whole(self.path(key), save({"weights": weights.contiguous()}, {"mm": json.dumps(note)}))
        except OSError as error:
            raise self._refused(error) from error
        self._make_room()

    def check(self) -> None:
        """Makes the folder, before seconds of encoding. Raises ConfigError where that, or writing to it, cannot be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise self._refused(PermissionError(13, "Permission denied"))

    def _refused(self, error: OSError) -> ConfigError:
        what = error.strerror or error
        return ConfigError(f"cache = {str(self.folder)!r}: cannot be written ({what}); name another folder, or none")

    def _make_room(self) -> None:
        """Removes the oldest files above the limit, and what was never finished."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # another process made room
                    continue
                if _OURS.fullmatch(entry.name):
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
                elif _PARTIAL.fullmatch(entry.name) and status.st_mtime < time.time() - _STALE_SECONDS:
                    Path(entry.path).unlink(missing_ok=True)
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files)[:-1]:  # the newest was just written
            if total <= self.limit_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


def folder_of(cache: bool | str | os.PathLike[str] | None) -> Path | None:
    """Where `cache` says that label weights are kept: True in `$MM_CACHE`/labels, a path there, False or None nowhere.

    Raises ValueError for anything else.
    """
    if cache is None or cache is False:
        return None
    if cache is True:
        return cache_folder() / "labels"
    if not isinstance(cache, (str, os.PathLike)) or not os.fspath(cache):
        raise ValueError(f"cache = {cache!r}: must be True, False or a folder")
    return Path(cache)


def digest(weights: Tensor) -> str:
    return hashlib.blake2b(weights.contiguous().numpy().data, digest_size=20).hexdigest()


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:  # of a folder that is only read, nothing is ever removed
        return
