"""Where the processes of a run write what they say: the first on the screen, the others in files of the run folder.

Also torch's flight recorder, which remembers the last collectives: for NCCL with their state, for gloo that they were
started, in which order and sizes, but not whether they ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

COLLECTIVES = 2000  # that the flight recorder remembers


def redirect(run: Path, rank: int) -> Callable[[str], None]:
    """From here on, what processes other than the first write (C++ too) goes to `<run>/logs/rank-N.txt`.

    Returns a function that writes one line to the stderr of before, for what a person has to see from any process.
    """
    screen = os.dup(2)
    start, terminal = ("mm" if rank == 0 else f"rank {rank}"), os.isatty(screen)

    def tell(line: str) -> None:
        # no lock is taken and nothing is buffered: it must work while the other threads hang
        os.write(screen, f"{chr(10) * terminal}{start}: {line}\n".encode())

    if rank == 0:
        return tell
    path = folder(run) / f"rank-{rank}.txt"
    with contextlib.suppress(AttributeError):  # a stream that somebody replaced has no such method
        sys.stdout.flush()
        sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(file, f"== {time.strftime('%F %T %z')} {socket.gethostname()} pid {os.getpid()}\n".encode())
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return tell


def folder(run: Path) -> Path:
    """`<run>/logs`, made where it is missing."""
    logs = run / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return logs


def prepare_flight_recorder(run: Path) -> None:
    """Turn torch's recorder on, before any process group: NCCL then dumps to `<run>/logs/nccl-rank-N` on a timeout.

    What the user has set in the environment stays.
    """
    prefix = str(folder(run).resolve() / "nccl-rank-")
    for names, value in (
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), str(COLLECTIVES)),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
        (("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), prefix),
    ):
        if not any(name in os.environ for name in names):  # the second is the older name of the first
            os.environ[names[0]] = value


def dump_flight_recorder(run: Path, rank: int) -> None:
    """What torch remembers of the last collectives, as JSON: `<run>/logs/flight-nccl-rank-N.json`, and for gloo."""
    import torch._C._distributed_c10d as c10d

    for backend, kind in (("nccl", "nccl"), ("gloo", "fr")):
        dump = getattr(c10d, f"_dump_{kind}_trace_json", None)  # not every torch has both
        text = dump() if dump else b""
        if b'"entries"' in text:
            (folder(run) / f"flight-{backend}-rank-{rank}.json").write_bytes(text)
