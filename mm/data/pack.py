"""Writes WebDataset shards: equal input gives equal bytes, and an interrupted build leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from mm.config import ConfigError
from mm.data import sidecar

MANIFEST = "shards.json"  # beside the shards: what they are; marks a folder as ours to write again


class ShardWriter:
    """Context manager that writes `<split>-000000.tar`, ... into `out`, all of them at its end or none.

    `add` in the order wanted. Raises ConfigError at once where `out` is a file, or holds shards of another maker.
    """

    def __init__(self, out: str | Path, per_shard: int) -> None:
        if per_shard < 1:
            raise ConfigError(f"per_shard: {per_shard} must be at least 1")
        self.out, self.per_shard = Path(out), per_shard
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"out: {str(self.out)!r} is a file; name a folder")
        self.old = earlier(self.out)
        self.samples: Counter[str] = Counter()
        self.shards: list[str] = []
        self._open: dict[str, tarfile.TarFile] = {}

    def __enter__(self) -> ShardWriter:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=".building-", dir=self.out))
        except OSError as error:
            raise ConfigError(f"out: cannot write to {str(self.out)!r}: {error.strerror}") from error
        return self

    def add(self, split: str, key: str, members: dict[str, bytes]) -> None:
        """One sample: extension -> bytes."""
        number, place = divmod(self.samples[split], self.per_shard)
        if not place:
            self._close(split)
            name = f"{split}-{number:06d}.tar"
            self.shards.append(name)
            self._open[split] = tarfile.open(self._folder / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")  # its defaults are fixed: owner 0, time 0
            info.size, info.mode = len(data), 0o644
            self._open[split].addfile(info, io.BytesIO(data))
        self.samples[split] += 1

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """Moves the shards into place and indexes them; returns the manifest: `about`, their names, samples a split."""
        for split in list(self._open):
            self._close(split)
        manifest = {**about, "samples": dict(self.samples), "shards": sorted(self.shards)}
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (self._folder / MANIFEST).write_text(text, encoding="utf-8")
        for name in self.old:  # a smaller build must not leave samples of the larger one
            (self.out / name).unlink(missing_ok=True)
            (self.out / (name + sidecar.SUFFIX)).unlink(missing_ok=True)
        os.replace(self._folder / MANIFEST, self.out / MANIFEST)  # first: a shard that it names is known to be ours
        for name in self.shards:
            os.replace(self._folder / name, self.out / name)
            sidecar.keep(str(self.out / name), sidecar.scan(str(self.out / name), whole=True))
        return manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in list(self._open):
            self._close(split)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _close(self, split: str) -> None:
        if split in self._open:
            self._open.pop(split).close()


def earlier(out: Path) -> set[str]:
    """Names of the shards that an earlier build left in `out`; ConfigError where there are others."""
    present = {path.name for path in out.glob("*.tar")}
    try:
        named = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["shards"]
        ours = {str(name) for name in named if "/" not in str(name) and str(name).endswith(".tar")}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if present - ours:
        other = min(present - ours)
        raise ConfigError(f"out: {str(out)!r} already holds {other!r}, which this did not build; name an empty folder")
    return present
