"""`mm shards latents`: shards anew with an autoencoder's latents in each sample, so that training need not encode."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mm.config import ConfigError
from mm.data import sidecar
from mm.data.indexing import Report
from mm.data.pack import MANIFEST, earlier
from mm.data.remote import is_remote
from mm.data.rewrite import Encode, Rewrite
from mm.data.shard_cache import ShardCache
from mm.data.shards import SPLITS, expand
from mm.data.tar import File, open_file

_DISK = 20_000_000_000  # bytes that fetched shards may take


def add_latents(
    spec: str,
    out: str | Path,
    encode: Encode,
    about: dict[str, Any],
    *,
    size: int,
    batch: int = 16,
    progress: bool = True,
) -> list[Report]:
    """Writes every shard that `spec` names again in `out`, with `latents.npy` in each sample; a report a shard.

    `encode`: uint8 pixels `[B, 3, size, size]` to float16 `[B, C, h, w]`, of the part of a picture that diffusion
    draws; `about` says what makes these latents differ from others, and is kept in `shards.json`. All other members
    keep their bytes. A sample whose picture cannot be used is kept without latents, and reported. A shard is written
    whole or not at all, and one that is there already is left: to go on after an interruption, call it again.
    Raises ConfigError where `out` cannot be written, or holds other shards.
    """
    shards, folder = expand(spec, mixed=True), Path(out)
    names = _names(shards, folder)
    total = sum(os.path.getsize(shard) for shard in shards if os.path.isfile(shard))
    quiet = None if progress else True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            _alone(folder),
            tqdm(total=total or None, desc="encoding", unit="B", unit_scale=True, disable=quiet) as bar,
        ):
            _begin(folder, about, names)
            reports = []
            for shard, name in zip(shards, names, strict=True):
                reports.append(
                    _one(shard, folder / name, lambda source: Rewrite(source, encode, size, batch), bar.update)
                )
            _finish(folder)
    except OSError as error:
        raise ConfigError(f"out: cannot write to {str(folder)!r}: {error.strerror or error}") from error
    return reports


def made_by(spec: str, about: dict[str, Any]) -> list[str]:
    """Raises ConfigError where a shard of `spec` holds latents of something else than `about` says.

    Returns those that do not say whose they hold: remote ones, and those without the `shards.json` of their maker.
    """
    unsaid, known = [], {}
    for shard in expand(spec):
        folder = os.path.dirname(shard)
        if folder not in known:
            known[folder] = {} if is_remote(shard) else _json(Path(folder) / MANIFEST).get("latents", {})
        if not known[folder]:
            unsaid.append(shard)
        elif difference := _difference(known[folder], about):
            raise ConfigError(
                f"data.train: the latents in {folder} are not of model.latents: {difference}; "
                "write them again with mm shards latents, or set model.latents.cached = False"
            )
    return unsaid


def _difference(there: dict[str, Any], ours: dict[str, Any]) -> str:
    """`field there, not ours`, of the first that differs."""
    return next((f"{name} {there.get(name)}, not {ours[name]}" for name in ours if there.get(name) != ours[name]), "")


def _names(shards: Sequence[str], out: Path) -> list[str]:
    """What each shard is called in `out`. Raises ConfigError where two would be called alike, or one be overwritten."""
    names = [os.path.basename(shard) for shard in shards]
    for name, shard in zip(names, shards, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"shards: several are called {name!r}; give each part of P a folder of its own")
        if not is_remote(shard) and Path(shard).resolve().parent == out.resolve():
            raise ConfigError(f"out: {str(out)!r} is where the shards are; name another folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {str(out)!r} is a file; name a folder")
    return names


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"out: another process writes to {str(folder)!r}; name another folder") from None
        yield
    (folder / ".lock").unlink(missing_ok=True)


def _begin(folder: Path, about: dict[str, Any], names: Sequence[str]) -> None:
    """Says whose the folder is, before it holds a shard. Raises ConfigError where it holds others, or other latents."""
    present, old = earlier(folder), _json(folder / MANIFEST)
    if present and "latents" not in old:
        raise ConfigError(f"out: {str(folder)!r} holds shards without latents; name an empty folder")
    if present and (difference := _difference(old["latents"], about)):
        raise ConfigError(f"out: {str(folder)!r} holds other latents: {difference}; name an empty folder")
    for path in folder.glob(".*.tar.tmp"):  # of a process that was killed
        path.unlink()
    shards = sorted({*names, *present})
    _write(folder / MANIFEST, {"source": "latents", "latents": about, "samples": {}, "shards": shards})


def _finish(folder: Path) -> None:
    """The manifest with the samples of each split, once all shards are there."""
    manifest, samples = _json(folder / MANIFEST), Counter[str]()
    for name in manifest["shards"]:
        split = name.split("-")[0]
        samples[split if split in SPLITS else "all"] += _json(_record(folder / name)).get("samples", 0)
    _write(folder / MANIFEST, {**manifest, "samples": dict(samples)})


def _record(shard: Path) -> Path:
    """Where it stands what a written shard was made from: one file each, for there may be many thousands."""
    return shard.parent / ".from" / f"{shard.name}.json"


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, what: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(json.dumps(what, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def _one(shard: str, target: Path, rewrite: Callable[[File], Rewrite], tell: Callable[[int], Any]) -> Report:
    """One shard, unless it is there already."""
    try:
        fetched = ShardCache(str(sidecar.cache_folder() / "shards"), _DISK)
        fd = fetched.open(shard) if is_remote(shard) else open_file(shard)
    except OSError as error:
        return Report(shard, 0, 0, f"cannot be read: {error.strerror or error}", failed=True)
    with os.fdopen(fd, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        length = os.fstat(file.fileno()).st_size
        was = _json(_record(target))
        if target.is_file() and was.get("sha256") == sha256:
            tell(length)
            return Report(shard, length, was["samples"], was["problem"], lost=was["lost"], read=False)
        whole = rewrite(File(file.fileno()))
        fresh = target.with_name(f".{target.name}.tmp")
        with open(fresh, "wb") as to:
            whole.write(to, tell)
            to.flush()
            os.fsync(to.fileno())
    target.unlink(missing_ok=True)  # of another source: it must not pass for this one's
    made = {"sha256": sha256, "samples": whole.samples, "lost": len(whole.bad), "problem": whole.problem}
    _write(_record(target), made)
    os.replace(fresh, target)
    sidecar.keep(str(target), sidecar.scan(str(target), whole=True))
    return Report(shard, length, whole.samples, whole.problem, lost=len(whole.bad))
