"""Checkpoints that are whole or absent: written beside, hashed, synced, renamed; verified before they are used.

`checkpoints/step-00000100/` holds `state.safetensors`, `state.json` and `manifest.json` (sha256 of both); `latest`
in the run folder names the newest. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.config import ConfigError

MANIFEST, TENSORS, SCALARS = "manifest.json", "state.safetensors", "state.json"


def save(run: Path, step: int, tensors: dict[str, Tensor], scalars: dict[str, Any], keep: int) -> Path:
    """Commit one checkpoint, then move `latest`, then drop all but the newest `keep`."""
    from safetensors.torch import save_file

    root = run / "checkpoints"
    final, fresh = root / f"step-{step:08d}", root / f"step-{step:08d}.tmp"
    for leftover in root.glob("*.tmp"):
        shutil.rmtree(leftover)
    if final.exists():  # left by a run that walked back beyond it, or damaged
        shutil.rmtree(final)
    fresh.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, fresh / TENSORS)
    (fresh / SCALARS).write_text(json.dumps({"step": step, **scalars}), encoding="utf-8")
    hashes = {name: _sha256(fresh / name) for name in (TENSORS, SCALARS)}
    (fresh / MANIFEST).write_text(json.dumps(hashes), encoding="utf-8")
    for name in (TENSORS, SCALARS, MANIFEST):
        _sync(fresh / name)
    _sync(fresh)
    fresh.rename(final)
    _sync(root)
    _point(run, final.name)
    for path in _complete(run):
        if path.name > final.name:  # damaged, and left behind by a run that walked back
            shutil.rmtree(path)
    for old in _complete(run)[max(1, keep) :]:
        shutil.rmtree(old)
    return final


def load(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint whose hashes agree, or None where there is none; says so when it passes one over.

    Raises ConfigError where there are checkpoints and every one is damaged.
    """
    from safetensors.torch import load_file

    found = _complete(run)
    for folder in found:
        problem = verify(folder)
        if problem:
            print(f"mm: {folder.name} is damaged ({problem}): passed over", file=sys.stderr)
            continue
        return load_file(folder / TENSORS), json.loads((folder / SCALARS).read_text(encoding="utf-8"))
    if found:
        raise ConfigError(f"{run}: all {len(found)} checkpoints are damaged; restore one, or choose another run.dir")
    return None


def verify(folder: Path) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        wrong = [name for name in (TENSORS, SCALARS) if _sha256(folder / name) != hashes.get(name)]
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST}: {error}"
    return f"{wrong[0]} does not match its hash" if wrong else ""


def _complete(run: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.is_dir() and path.suffix != ".tmp"]
    return sorted(found, reverse=True)


def _point(run: Path, name: str) -> None:
    fresh = run / ".latest.tmp"
    fresh.write_text(name + "\n", encoding="utf-8")
    _sync(fresh)
    fresh.replace(run / "latest")
    _sync(run)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
