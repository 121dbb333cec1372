"""One save, by all processes together: what each phase does, and the agreement that ends it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from mm.config import CheckpointConfig
from mm.distributed.world import World
from mm.training import manifest
from mm.training.faults import fault
from mm.training.manifest import SCALARS, Entry
from mm.training.staging import HashedFiles

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One save, after its staging."""

    step: int
    tensors: dict[str, Tensor]  # what this process writes
    names: frozenset[str]  # of what all of them write
    size: int  # bytes on disk
    damaged: frozenset[str]  # names of earlier checkpoints that are
    scalars: str  # JSON
    export: Callable[[], None] | None
    problem: Exception | None = None  # the staging failed


def write(run: Path, config: CheckpointConfig, world: World, job: Job) -> None:
    """Write, hash and commit; every phase ends with an agreement, so that no process waits for one that has failed.

    Raises Failed or CheckpointException on all processes where something failed on one.
    """
    step = job.step
    fresh = run / "checkpoints" / f"step-{step:08d}.tmp"

    def begin() -> None:
        if job.problem:
            raise job.problem
        if world.main:
            fresh.parent.mkdir(parents=True, exist_ok=True)
            for leftover in manifest.leftovers(run):
                manifest.remove(leftover)
            manifest.preflight(run, job.size, keep=0)
            fresh.mkdir()

    def hashed() -> dict[str, Entry]:
        fault("save.written", step)
        if missing := sorted(job.names - written.state_dict_metadata.keys()):
            raise RuntimeError(f"{missing[0]} was written by no process; did all of them give the same names?")
        fault("save.hashed", step)
        return files.written

    def finish() -> None:
        if job.export:
            job.export()
        scalars = manifest.write_durable(fresh / SCALARS, job.scalars)
        manifest.write_manifest(fresh, step, world.size, {**entries, SCALARS: scalars})
        fault("save.manifest", step)
        manifest.commit(run, fresh, step, config, job.damaged)

    try:
        together(world, begin)
        files = HashedFiles()
        written = _write_tensors(fresh, job.tensors, files, world)
        entries = {name: entry for part in together(world, hashed) for name, entry in (part or {}).items()}
        together(world, finish if world.main else nothing)
    except (Failed, CheckpointException):  # agreed: nobody writes any more
        if world.main:
            shutil.rmtree(fresh, ignore_errors=True)  # it may be what fills the disk
        raise


def _write_tensors(folder: Path, tensors: dict[str, Tensor], files: HashedFiles, world: World) -> Any:
    """Write this process' tensors through to the disk; what all of them wrote."""
    writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)  # else this thread would open the first GPU
    writer.fs = files
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    group = world.control
    return dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)


class Failed(RuntimeError):
    """What went wrong on some process, known to all of them."""


def together(world: World, work: Callable[[], T]) -> list[T]:
    """What the work gave on every process, by rank. Raises Failed on all where it failed on one."""
    result: tuple[Any, str]
    try:
        result = work(), ""
    except Exception as error:
        result = None, cause(error)
    found = world.gather(result)
    problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(found) if problem]
    if problems:
        raise Failed(problems[0] if world.size > 1 else problems[0].removeprefix("rank 0: "))
    return [item for item, _ in found]


def nothing() -> None:
    """The share of the processes other than rank 0."""


def cause(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {cause(failure[0])}" for rank, failure in error.failures.items())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
