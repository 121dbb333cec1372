"""Streaming libraries as processes: each probe in its own environment, one process a rank, all with a deadline."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import OPEN_CLIP, ROOT, cache_folder, peer_python

DEADLINE = 90.0  # seconds of one pass
_TO_END = 10.0  # seconds that a process may take to end once it has told all
PROBES = Path(__file__).with_name("peers")


@dataclass(frozen=True)
class Library:
    name: str
    probe: str
    environment: tuple[str, ...] = ()  # name and requirements; none: the running one
    tars: bool = True  # else its own writer converts them

    def python(self) -> str:
        """Its interpreter, installed if it is not there. Raises RuntimeError with pip's words where that fails."""
        return peer_python(*self.environment) if self.environment else sys.executable


LIBRARIES = (
    Library("mm", "probe_mm.py"),
    Library("open_clip", "probe_open_clip.py", OPEN_CLIP),
    Library("webdataset 0.2", "probe_webdataset.py", ("webdataset-0.2.86", "webdataset==0.2.86")),
    Library("webdataset", "probe_webdataset.py", ("webdataset-1.0.2", "webdataset==1.0.2")),
    Library(
        "mosaicml-streaming",
        "probe_mosaicml.py",
        ("mosaicml-streaming-0.13.0", "mosaicml-streaming==0.13.0"),
        tars=False,
    ),
    Library("litData", "probe_litdata.py", ("litdata-0.2.76", "litdata==0.2.76"), tars=False),
)


@dataclass
class Run:
    """What one pass gave: the batches of each rank, and of all ranks what was raised and said."""

    ranks: list[list[list[int]]]
    errors: list[str]
    said: list[str]
    each: list[dict[str, Any]]  # one entry a folder where `do` was "each"

    @property
    def steps(self) -> list[list[int]]:
        """Global batches: the ranks' rows one after the other."""
        return [list(itertools.chain(*rows)) for rows in itertools.zip_longest(*self.ranks, fillvalue=[])]

    @property
    def numbers(self) -> list[int]:
        return list(itertools.chain(*self.steps))


class Runner:
    """Starts the passes of one library; their files lie in `folder`, which nothing else may use."""

    def __init__(self, library: Library, folder: Path) -> None:
        self.library, self.folder, self.python = library, folder, library.python()
        self._count = 0
        (folder / "tmp").mkdir(parents=True)

    def run(
        self, *, world: int = 1, deadline: float = DEADLINE, environment: dict[str, str] | None = None, **request: Any
    ) -> Run:
        """One pass of `world` processes; what is still running at its deadline is killed, and said so in `errors`."""
        self._count += 1
        outs = [self.folder / f"pass-{self._count}-{rank}.jsonl" for rank in range(world)]
        ranks = _torchrun(world) if world > 1 else [{}]
        processes = []
        for out, rank in zip(outs, ranks, strict=True):
            command = [self.python, str(PROBES / self.library.probe), json.dumps({**request, "out": str(out)})]
            with out.with_suffix(".log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        command,
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                        cwd=ROOT,
                        env=self.environment() | rank | (environment or {}),
                        start_new_session=True,  # so that its workers can be ended with it
                    )
                )
        _wait(processes, outs, deadline)
        return _gather(
            outs,
            deadline,
            {str(self.folder.parent): "DATA", ROOT: "MM", sys.prefix: "PYTHON", str(cache_folder()): "CACHE"},
        )

    def version(self) -> str:
        package = "mm" if not self.library.environment else self.library.environment[1].split("==")[0].split("[")[0]
        command = [self.python, "-c", f"from importlib.metadata import version; print(version({package!r}))"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()

    def environment(self) -> dict[str, str]:
        """Nothing of the user's own folders is written to, and no library asks its server for news."""
        own = {"TMPDIR": "tmp", "HOME": "home", "XDG_CACHE_HOME": "cache"}
        environment = {**os.environ, **{name: str(self.folder / place) for name, place in own.items()}}
        environment |= {"LITDATA_DISABLE_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("MM_CACHE", None)
        return environment | ({} if self.library.environment else {"PYTHONPATH": ROOT})


def _torchrun(world: int) -> list[dict[str, str]]:
    """The environment that torchrun gives each of `world` processes of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _wait(processes: list[subprocess.Popen[bytes]], outs: list[Path], deadline: float) -> None:
    end = time.monotonic() + deadline
    told = False
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if not told and all(out.is_file() and '{"end"' in out.read_text() for out in outs):
            told, end = True, min(end, time.monotonic() + _TO_END)
        time.sleep(0.1)
    for process in processes:
        if process.poll() is not None:  # what it started may still have to clear up behind it
            end = time.monotonic() + _TO_END
            while _alive(process.pid) and time.monotonic() < end:
                time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _gather(outs: list[Path], deadline: float, names: dict[str, str]) -> Run:
    """The passes' files read; folders of this machine are called by `names`."""

    def read(path: Path) -> str:
        text = path.read_text() if path.is_file() else ""
        for folder, name in sorted(names.items(), key=lambda item: -len(item[0])):
            text = text.replace(folder, name)
        return text

    run = Run([], [], [], [])
    for out in outs:
        lines = [json.loads(line) for line in read(out).splitlines()]
        run.ranks.append([line["batch"] for line in lines if "batch" in line])
        run.each += [line["each"] for line in lines if "each" in line]
        last = lines[-1].get("end") if lines else None
        if last is None:
            log = " ".join(read(out.with_suffix(".log")).split())
            run.errors.append(f"no end within {deadline:g} s, or killed: {log[-300:]}")
        else:
            run.errors += [last["error"]] if last["error"] else []
            run.said += last["said"]
    return run
