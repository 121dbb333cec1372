"""Checkpoints that are whole or absent: written beside, hashed, synced, renamed; verified before they are used.

All processes write together (torch.distributed.checkpoint, on a file system that they share) while training goes on,
and decide together: a save has worked for all of them or for none. What one number of processes wrote, any other reads.

A checkpoint's `.metadata` is a pickle, which could run code: only a run's own checkpoints are read, and only after
every file agreed with the manifest. What is given to others is the export, in safetensors.

Faults on purpose (see `mm.training.faults`), in the order of a save:
  save.begin    nothing has happened                     save.manifest  rank 0: complete under its temporary name
  save.staged   the host copy is made                    save.renamed   rank 0: a checkpoint; `latest` names the last
  save.written  tensors are on disk                      save.latest    rank 0: `latest` names it
  save.hashed   this process' hashes are known           save.pruned    rank 0: old ones are gone
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mm.config import CheckpointConfig, ConfigError
from mm.distributed.world import World
from mm.training import manifest
from mm.training.faults import fault
from mm.training.manifest import SCALARS, Entry, preflight
from mm.training.progress import say
from mm.training.staging import Staging, disk_bytes, shared_out
from mm.training.writing import Failed, Job, cause, nothing, together, write

__all__ = ["Checkpoints", "Found", "SaveFailed", "disk_bytes", "preflight"]

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


class SaveFailed(RuntimeError):
    """A checkpoint was not written; says why, and which one is still there."""


@dataclass(frozen=True)
class Found:
    """A whole checkpoint."""

    path: Path
    step: int
    scalars: dict[str, Any]
    names: dict[str, tuple[tuple[int, ...], torch.dtype]]  # the whole shape and type of every tensor in it


class Checkpoints:
    """The checkpoints of a run. Every method is called by all processes, in the same order."""

    def __init__(self, run: Path, config: CheckpointConfig, world: World) -> None:
        self.run, self.config, self.world = run, config, world
        self.saving = replace(world, control=world.saving)  # what the thread agrees over
        self._staging = Staging(world.rank, world.size)
        self._thread: threading.Thread | None = None
        self._failed: SaveFailed | None = None  # of the last save
        self._untold: list[str] = []  # failures for poll
        self._damaged: set[str] = set()  # names of those that `newest` passed over

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        scalars: dict[str, Any],
        export: Callable[[], None] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Commit a checkpoint; in the background, if the config says so, from a copy made before this returns.

        A plain tensor must be the same on all processes, a DTensor is written in its shards; `scalars` is JSON, and
        `export()` is called by rank 0 just before the commit, in the thread that writes. A save that is still running
        is waited for first. Raises SaveFailed if it does not run in the background; otherwise `poll` and `finish`
        tell.
        """
        self._join()
        self._failed = None
        job = self._stage(step, tensors, scalars, export)
        if wait or not self.config.background:
            self._write(job)
            self.finish()
            return
        # a daemon: a process that fails elsewhere must not wait for others at its exit
        self._thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> str:
        """One line if a save failed since this was asked last, else ""; never waits.

        A failure is known to all processes, but not at the same moment: agree before acting on it.
        """
        return self._untold.pop(0) if self._untold else ""

    def finish(self) -> None:
        """Wait for the running save. Raises SaveFailed, once, if the last save failed."""
        self._join()
        failed, self._failed = self._failed, None
        if failed is not None:
            self._untold.clear()
            raise failed

    def newest(self) -> Found | None:
        """The newest whole checkpoint, or None where there is none; rank 0 says so when a damaged one is passed over.

        A save that is still running is waited for. The files are hashed by all processes, each some of them. Raises
        ConfigError where every one is damaged.
        """
        self._join()
        folders: list[Path] = self.world.share(manifest.committed(self.run) if self.world.main else None)
        for folder in folders:
            if problem := self._damage(folder):
                if self.world.main:
                    say(f"{folder.name} is damaged ({problem}): passed over")
                self._damaged.add(folder.name)
                continue
            return self._open(folder)
        if folders:
            raise ConfigError(
                f"{self.run}: all {len(folders)} checkpoints are damaged; restore one, or choose another run.dir"
            )
        return None

    def read(self, found: Found, tensors: dict[str, Tensor]) -> None:
        """Fill tensors, in place, from a checkpoint: plain ones and DTensors, whatever they were when it was saved.

        Raises ConfigError for a name that the checkpoint lacks or has in another shape or type.
        """
        for name, tensor in tensors.items():
            if name not in found.names:
                raise ConfigError(f"{found.path}: has no {name}; it is of another model or optimizer")
            shape, dtype = found.names[name]
            if (shape, dtype) != (tuple(tensor.shape), tensor.dtype):
                raise ConfigError(
                    f"{found.path}: {name} is {_describe(shape, dtype)}, and {_describe(tensor.shape, tensor.dtype)} "
                    "is wanted; it is of another model or optimizer"
                )
        group = self.world.control
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            reader = dcp.FileSystemReader(found.path)
            dcp.load(tensors, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
        except CheckpointException as error:
            raise OSError(f"{found.path} could not be read: {cause(error)}") from error

    def _damage(self, folder: Path) -> str:
        """What is wrong with a checkpoint or "", as all processes together see it."""
        world = self.world
        try:
            content, problem = together(world, lambda: manifest.inspect(folder) if world.main else (None, ""))[0]
            if problem:
                return problem
            assert content is not None
            files: dict[str, Entry] = content.files
            mine = shared_out({name: entry.size for name, entry in files.items()}, world.rank, world.size)
            found = together(world, lambda: [manifest.damage(folder, name, files[name]) for name in mine])
        except Failed as error:  # a disk that does not answer is no damage: what it holds must not be given up
            raise ConfigError(f"{folder} cannot be read ({error}); start again when it can") from None
        return next((problem for problems in found for problem in problems if problem), "")

    def _open(self, folder: Path) -> Found:
        """What a verified checkpoint holds."""

        def look() -> Found:
            scalars = json.loads((folder / SCALARS).read_text(encoding="utf-8"))
            held = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
            names = {
                name: (tuple(entry.size), entry.properties.dtype)
                for name, entry in held.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            return Found(folder, scalars.pop("step"), scalars, names)

        try:
            found = together(self.world, look if self.world.main else nothing)[0]
        except Failed as error:
            raise ConfigError(f"{folder}: is whole, but cannot be read ({error}); was another torch in use?") from error
        assert found is not None
        return found

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _stage(
        self, step: int, tensors: Mapping[str, Tensor], scalars: dict[str, Any], export: Callable[[], None] | None
    ) -> Job:
        """A failure here is kept until all processes can be told."""
        names, size, damaged = frozenset(tensors), disk_bytes(tensors), frozenset(self._damaged)
        try:
            fault("save.begin", step)
            text = json.dumps({**scalars, "step": step})
            staged = self._staging.copy(tensors)
            fault("save.staged", step)
        except Exception as error:
            return Job(step, {}, names, size, damaged, "", None, error)
        return Job(step, staged, names, size, damaged, text, export)

    def _write(self, job: Job) -> None:
        """The whole save after its staging. Keeps its failure for whoever asks."""
        try:
            write(self.run, self.config, self.saving, job)
            self._damaged = {name for name in self._damaged if manifest.step_of(Path(name)) != job.step}
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            good = next(iter(manifest.committed(self.run)), None)
            still = f"{good.name} is still whole" if good else "there is no earlier one"
            line = f"{self.run}: no checkpoint of step {job.step} was made ({cause(error)}); {still}"
            self._failed = SaveFailed(line)
            self._untold.append(line)


def _describe(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"
