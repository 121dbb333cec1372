"""Checkpoints that rot, disks that fill up, saves that fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mm.chaos import judge
from mm.chaos.launch import Wrong
from mm.chaos.suite import RIGHT, Finding, Scenario, Stage
from mm.training import manifest

LARGEST_DISK = 2 << 30  # bytes of a disk in memory; a model that needs more only has its disk said to be full
PAGE = 4096


def scenarios(processes: int) -> Iterator[Scenario]:
    """Damage to the newest checkpoint, full disks, errors in the background save."""
    for name, (what, damage) in DAMAGES.items():
        many = processes if name == "bit-flip" else 1
        where = f"{what} in the newest checkpoint of a killed run"
        yield Scenario(f"checkpoint-{name}", where, partial(_walk_back, damage), many)
    yield Scenario("checkpoint-all-damaged", "one bit flipped in every checkpoint of a killed run", _all_damaged, 1)
    yield Scenario("disk-too-small", "run.dir on a disk of 1 MiB, from the start", _too_small, 1)
    yield Scenario("disk-full", "disk full in the middle of each save after the first", _full, 1)
    where = f"an error in the background save of rank {processes - 1}"
    yield Scenario("save-fails-once", f"{where}, once", _fails_once, processes)
    yield Scenario("save-fails-twice", f"{where}, twice in a row", _fails_twice, processes)


def _flip(folder: Path) -> None:
    path = _tensors(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _zero(folder: Path) -> None:
    """The page in the middle, or the next one that is not zeros already."""
    path = _tensors(folder)
    content = bytearray(path.read_bytes())
    place = next(p for p in range(len(content) // 2, len(content), PAGE) if any(content[p : p + PAGE]))
    content[place : place + PAGE] = bytes(len(content[place : place + PAGE]))
    path.write_bytes(content)


def _cut(folder: Path) -> None:
    os.truncate(_tensors(folder), _tensors(folder).stat().st_size // 2)


def _mix(folder: Path) -> None:
    """A file of the checkpoint before, as long as this one's: torch would load it without a word."""
    before = manifest.committed(folder.parent.parent)[1]
    shutil.copy(before / _tensors(folder).name, _tensors(folder))


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "bit-flip": ("one bit flipped", _flip),
    "zero-page": ("a page of 4,096 bytes zeroed", _zero),
    "missing-file": ("a file of tensors gone", lambda folder: _tensors(folder).unlink()),
    "cut-file": ("a file of tensors cut in half", _cut),
    "other-step": ("a file of tensors from another step", _mix),
    "manifest": ("a manifest of zero bytes", lambda folder: os.truncate(folder / manifest.MANIFEST, 0)),
}


def _tensors(folder: Path) -> Path:
    """The last process' file of tensors."""
    return max(folder.glob("*.distcp"))


def _walk_back(damage: Callable[[Path], None], stage: Stage) -> Finding:
    suite = stage.suite
    stage.copy(suite.stopped(stage.processes))
    reached, newest = judge.reached(stage.run), manifest.committed(stage.run)[0]
    damage(newest)
    if not judge.damage(newest):
        raise Wrong("the damage is none")
    outcome = stage.done(stage.train())
    seen = outcome.line(f"{newest.name} is damaged .*: passed over")
    if outcome.resumed != suite.every:
        raise Wrong(f"went on from step {outcome.resumed}, not {suite.every}")
    stage.ends_like(suite.reference(stage.processes))
    return Finding(seen, RIGHT, outcome.resumed, reached - outcome.resumed)


def _all_damaged(stage: Stage) -> Finding:
    suite = stage.suite
    stage.copy(suite.stopped())
    kept = stage.folder / "kept"
    shutil.copytree(stage.run / "checkpoints", kept)
    for folder in manifest.committed(stage.run):
        _flip(folder)
    seen = stage.refused(stage.train(), "all 2 checkpoints are damaged")
    shutil.rmtree(stage.run / "checkpoints")
    kept.rename(stage.run / "checkpoints")
    return stage.goes_on(seen, expected=2 * suite.every)


def _too_small(stage: Stage) -> Finding:
    with small_disk(stage.folder / "disk", 1 << 20) as disk:
        if disk is None:
            return Finding("", "not tried: no file system can be mounted here (unshare)")
        stage.run = disk / "run"
        seen = stage.refused(stage.train(), "free")
        if judge.records(stage.run):
            raise Wrong(f"trained all the same: {seen}")
    return Finding(seen, "refused before the first step")


def _full(stage: Stage) -> Finding:
    """The disk fills up after the first checkpoint, so far that the next one's tensors fit, and its export does not."""
    suite = stage.suite
    reference = suite.reference(1)
    tensors = sum(path.stat().st_size for path in manifest.committed(reference)[0].iterdir())
    export = sum(path.stat().st_size for path in (reference / "export").iterdir())
    size = 8 * (tensors + export) + (4 << 20)
    with small_disk(stage.folder / "disk", size) if size < LARGEST_DISK else contextlib.nullcontext() as disk:
        if disk is None:  # nothing can be mounted, or not so much
            steps = (2 * suite.every, suite.steps)
            outcome = stage.train(";".join(f"full:save.written@step={step}" for step in steps))
            return stage.goes_on(stage.refused(outcome, "No space left", code=1), expected=suite.every)
        stage.run, ballast = disk / "run", disk / "ballast"
        with stage.start(f"stall:step@step={suite.middle},for=8") as job:
            job.until(lambda: stage.happened("stall") and judge.whole(stage.run) == [suite.every], "made a checkpoint")
            _fill(ballast, shutil.disk_usage(disk).free - tensors - export // 2)
            outcome = job.wait()
        if outcome.code not in (1, 2):  # 2: it was another file that found no room, while the save filled the disk
            raise Wrong(f"ended with {outcome.code}: {outcome.line('.')}")
        seen = stage.refused(outcome, "No space left", code=outcome.code)
        ballast.unlink()
        _readable(stage.run / "export/model.safetensors")
        return stage.goes_on(seen, expected=suite.every)


def _fails_once(stage: Stage) -> Finding:
    suite, rank = stage.suite, stage.processes - 1
    step = 2 * suite.every
    faults = f"error:save.written@step={step},rank={rank};stall:step@step={step + 2},for=2"  # time for it to be known
    outcome = stage.done(stage.train(faults))
    seen = outcome.line(f"no checkpoint of step {step} was made")
    stage.ends_like(suite.reference(stage.processes))
    return Finding(seen)


def _fails_twice(stage: Stage) -> Finding:
    suite, rank = stage.suite, stage.processes - 1
    steps = range(2 * suite.every, suite.steps + 1)  # whichever steps are saved
    outcome = stage.train(";".join(f"error:save.written@step={step},rank={rank}" for step in steps))
    return stage.goes_on(stage.refused(outcome, "no checkpoint of step", code=1), expected=suite.every)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path | None]:
    """A file system of `size` bytes in memory, seen by nobody else, gone at the end; None where none may be mounted.

    It is mounted in a name space of its own (`unshare -m`), and looked into through the process that holds that.
    """
    folder.mkdir()
    mount = f'mount -t tmpfs -o size={size} tmpfs "$0" && echo mounted && exec sleep 3600'
    words = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-c", mount, str(folder.resolve())]
    try:
        holder = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        yield None
        return
    try:
        assert holder.stdout is not None
        mounted = holder.stdout.readline().strip() == "mounted"
        yield Path(f"/proc/{holder.pid}/root{folder.resolve()}") if mounted else None
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()


def _fill(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _readable(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            file.get_tensor(name)
