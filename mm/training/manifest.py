"""What a checkpoint folder is on disk: its manifest, whether it is whole, and the moment at which it counts.

`checkpoints/step-00000100/` holds the tensors as torch.distributed.checkpoint writes them (`__RANK_0.distcp`,
`.metadata`), `state.json` with the scalars, and `manifest.json` with size and sha256 of every other file. It is written
under another name (`.tmp`), and is a checkpoint from the rename on. A folder that a new one of the same step replaces
is set aside as `step-00000100.old0` until the new one is durable; it counts as a checkpoint as long as it is there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mm.config import CheckpointConfig, ConfigError
from mm.training.faults import fault

MANIFEST, SCALARS, VERSION = "manifest.json", "state.json", 1
NAME = re.compile(r"step-(\d{8,})(?:\.old(\d+))?")
LARGEST_MANIFEST = 256 << 20  # bytes: millions of files; more is no manifest
CHUNK = 8 << 20  # bytes read at a time


@dataclass(frozen=True)
class Entry:
    """One file of a checkpoint."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    world: int  # processes that wrote it
    time: float  # when, in seconds since 1970
    files: dict[str, Entry]

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size for entry in self.files.values())


def committed(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first; whether they are whole is not looked at."""
    found = [(match, path) for path in (run / "checkpoints").glob("step-*") if (match := NAME.fullmatch(path.name))]
    keys = {path: (int(match[1]), match[2] is None, int(match[2] or 0)) for match, path in found if path.is_dir()}
    return sorted(keys, key=keys.__getitem__, reverse=True)


def leftovers(run: Path) -> list[Path]:
    """Folders of saves that are being written, or were interrupted."""
    return sorted((run / "checkpoints").glob("*.tmp"))


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def latest(run: Path) -> str:
    """The name of the checkpoint that was committed last; "" before the first."""
    path = run / "latest"
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def inspect(folder: Path) -> tuple[Manifest | None, str]:
    """The manifest, and what is wrong with a checkpoint as far as that is seen without reading its files, or ""."""
    try:
        if (folder / MANIFEST).stat().st_size > LARGEST_MANIFEST:
            return None, f"{MANIFEST}: is no manifest"
        manifest = _parse((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.step != step_of(folder):
            return manifest, f"{MANIFEST}: is of step {manifest.step}"
        found = {path.name for path in folder.iterdir() if not path.name.startswith(".nfs")}  # open elsewhere, removed
        extra = sorted(found - {*manifest.files, MANIFEST})
        if extra:
            return manifest, f"{extra[0]}: is not in the manifest"
        for name, entry in manifest.files.items():
            if problem := _misfit(folder / name, entry):
                return manifest, problem
    except FileNotFoundError as error:
        return None, f"{Path(error.filename).name}: is missing"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return None, f"{MANIFEST}: is no manifest ({error})"
    return manifest, ""


def damage(folder: Path, name: str, entry: Entry, progress: Callable[[int], object] | None = None) -> str:
    """What is wrong with one file of a checkpoint, every byte of it read, or "". Raises OSError where it cannot be."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK, entry.size + 1)))
    try:
        with open(folder / name, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                if progress:
                    progress(count)
    except FileNotFoundError:
        return f"{name}: is missing"
    return "" if digest.hexdigest() == entry.sha256 else f"{name}: does not match its sha256"


def last_step(run: Path) -> int:
    """Of the checkpoint that was committed last; 0 before the first."""
    return step_of(Path(name)) if NAME.fullmatch(name := latest(run)) else 0


def write_manifest(folder: Path, step: int, world: int, files: Mapping[str, Entry]) -> None:
    """Make a folder, whose files are durable already, complete and durable."""
    named = {name: asdict(files[name]) for name in sorted(files)}
    content = {"version": VERSION, "step": step, "world": world, "time": time.time(), "files": named}
    write_durable(folder / MANIFEST, json.dumps(content, indent=1))
    sync(folder)


def commit(run: Path, fresh: Path, step: int, config: CheckpointConfig, damaged: Collection[str] = ()) -> None:
    """Let a complete folder become the checkpoint of its step, move `latest`, then drop what need not stay.

    Those known to be `damaged` go, so that they take no whole one's place.
    At every moment the newest whole checkpoint is there under a name that `committed` lists.
    """
    root = run / "checkpoints"
    final = root / f"step-{step:08d}"
    if final.exists():  # damaged, or of a run that walked back beyond it
        aside = (final.with_name(f"{final.name}.old{number}") for number in itertools.count())
        final.rename(next(path for path in aside if not path.exists()))
    fresh.rename(final)
    sync(root)
    fault("save.renamed", step)
    write_durable(run / ".latest.tmp", final.name + "\n")
    (run / ".latest.tmp").replace(run / "latest")
    sync(run)
    fault("save.latest", step)
    for path in expired(committed(run), final, config, damaged):
        remove(path)
    fault("save.pruned", step)


def expired(found: list[Path], newest: Path, config: CheckpointConfig, damaged: Collection[str]) -> list[Path]:
    """Which of the checkpoints `found` (newest first) may go now that `newest` is the one to go on from.

    Later steps were left behind by a run that walked back; of the others the last `keep` stay, and every
    `keep_every`-th step.
    """
    earlier = [path for path in found if step_of(path) < step_of(newest) and not path.suffix]
    valid = [path for path in found if path == newest or (path in earlier and path.name not in damaged)]
    stay = valid[: max(1, config.keep)]
    stay += [path for path in valid if config.keep_every and step_of(path) % config.keep_every == 0]
    return [path for path in found if path not in stay]


def remove(folder: Path) -> None:
    """Remove a checkpoint; interrupted, it leaves no half of one behind that looks like a damaged checkpoint."""
    doomed = folder if folder.suffix == ".tmp" else folder.with_name(folder.name + ".tmp")
    if folder != doomed:
        folder.rename(doomed)
    shutil.rmtree(doomed)


def preflight(run: Path, bytes_needed: int, keep: int) -> None:
    """Refuse a disk that does not hold what a run will write.

    `bytes_needed` is the size of one checkpoint. While the newest is written the `keep` before it are still there:
    that many are needed, less those that exist already, but at least one; with `keep` 0 it is one. Raises ConfigError.
    """
    count = max(1, keep + 1 - len(committed(run)))
    free = shutil.disk_usage(run).free
    if count * bytes_needed > free:
        one = f"a checkpoint needs {gigabytes(bytes_needed)}"
        all_of_them = f" ({count} of them, with checkpoint.keep = {keep})" if count > 1 else ""
        raise ConfigError(
            f"run.dir = {run}: {one}{all_of_them} and {gigabytes(free)} is free; free some, lower checkpoint.keep or "
            "choose another folder"
        )


def gigabytes(size: int) -> str:
    """A number of bytes for a person."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def write_durable(path: Path, text: str) -> Entry:
    """Write a small file through to the disk."""
    content = text.encode()
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Entry(len(content), hashlib.sha256(content).hexdigest())


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parse(text: str) -> Manifest:
    content: dict[str, Any] = json.loads(text)
    if content.get("version") != VERSION:
        raise ValueError(f"version {content.get('version')}, not {VERSION}")
    files = {name: Entry(int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    for name in files:
        if name in ("", ".", "..", MANIFEST) or "/" in name or "\0" in name:
            raise ValueError(f"{name!r} is no file of a checkpoint")
    if SCALARS not in files:
        raise ValueError(f"names no {SCALARS}")
    return Manifest(int(content["step"]), int(content["world"]), float(content["time"]), files)


def _misfit(path: Path, entry: Entry) -> str:
    """Whether something is not the plain file of the size that the manifest says."""
    if path.is_symlink() or not path.exists():
        return f"{path.name}: is {'a link' if path.is_symlink() else 'missing'}"
    if not path.is_file():
        return f"{path.name}: is no file"
    size = path.stat().st_size
    return "" if size == entry.size else f"{path.name}: has {size} bytes, not {entry.size}"
