"""Worker processes that end with the process that wanted them, however that one ends."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading


def end_with_parent() -> None:
    """Ends this worker when the process that started it is gone, killed or not.

    Under `forkserver` the parent that the system knows is the fork server, which lives as long as its workers do.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait, args=(parent.sentinel,), name="mm-watch", daemon=True).start()


def _wait(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)  # nobody is left to be told
