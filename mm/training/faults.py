"""Faults on purpose, for `mm chaos` and the tests: nothing happens unless MM_FAULT says so.

MM_FAULT holds faults joined by `;`, each KIND:POINT with conditions: `kill:save.renamed@step=4,rank=1`. Kinds: kill,
hang (SIGSTOP), term, usr1, int (signals to this process), stall (nothing happens for ten minutes), error (an OSError),
full (an OSError: disk full), and any other word, which is handed to the caller: `nan:step@step=7`. A signal with
`after=0.5` comes so many seconds later, while the process goes on; a stall with `for=3` takes so many seconds. A fault
happens once: MM_FAULT_LOG names a file that remembers those that did, over restarts.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time

_SIGNALS = {
    "kill": signal.SIGKILL,
    "hang": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
    "int": signal.SIGINT,
}


def fault(point: str, step: int) -> str:
    """Let happen what MM_FAULT asks for at this point of this step; another word is returned, or "" for nothing."""
    wanted = os.environ.get("MM_FAULT", "")
    if not wanted:
        return ""
    here = {"step": str(step), "rank": os.environ.get("RANK", "0")}
    for text in wanted.split(";"):
        action, _, conditions = text.partition("@")
        kind, _, where = action.partition(":")
        asked = dict(condition.split("=", 1) for condition in conditions.split(",") if condition)
        after, lasting = float(asked.pop("after", 0)), float(asked.pop("for", 600))
        if where != point or any(here.get(name) != value for name, value in asked.items()) or not _first(text):
            continue
        if kind in _SIGNALS and after:
            threading.Timer(after, os.kill, (os.getpid(), _SIGNALS[kind])).start()
        elif kind in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[kind])
        elif kind == "stall":
            time.sleep(lasting)
        elif kind in ("error", "full"):
            number = errno.ENOSPC if kind == "full" else errno.EIO
            raise OSError(number, os.strerror(number), f"({point}, on purpose)")
        else:
            return kind
    return ""


def _first(text: str) -> bool:
    """Whether this fault has not happened yet; from now on it has."""
    path = os.environ.get("MM_FAULT_LOG")
    if not path:
        return True
    mark = f"{text} by rank {os.environ.get('RANK', '0')}\n"
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            if mark in file.readlines():
                return False
    with open(path, "a", encoding="utf-8") as file:
        file.write(mark)
        file.flush()
        os.fsync(file.fileno())
    return True
