"""Batches made ahead of the training step: in a thread, or in worker processes that end with the main one."""

from __future__ import annotations

import atexit
import multiprocessing
import queue
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from mm.data.batches import Batches, Carried, Failure, Made
from mm.data.watch import end_with_parent

_DEPTH = 2  # batches that a thread makes ahead


def in_workers(batches: Batches, numbers: range, workers: int, depth: int) -> Iterator[Made]:
    """The batches of these numbers, in order, each made whole in one of some processes, `depth` ahead in each.

    Raises here what was raised there.
    """
    # a forked copy of a process with threads and CUDA may hang: workers start from a clean, small server process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mm.data.batches"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores: as asked
        loader: DataLoader[Made | Failure] = DataLoader(
            Carried(batches),
            batch_size=None,  # a worker makes whole batches
            sampler=numbers,
            num_workers=workers,
            collate_fn=_same,
            worker_init_fn=_start_worker,
            multiprocessing_context=context,
            prefetch_factor=depth,
            generator=torch.Generator(),  # else it draws from the global one, and workers would change the run
        )
        made_ahead = iter(loader)
    for made in made_ahead:
        if isinstance(made, Failure):
            raise made.error from RuntimeError(f"in a data worker:\n{made.trace}")
        yield made


def in_thread(batches: Batches, numbers: range) -> Iterator[Made]:
    """Batches made ahead in a thread, which ends when this generator is closed; its errors are raised here."""
    made: queue.Queue[Made | BaseException | None] = queue.Queue(_DEPTH)
    stop = threading.Event()

    def put(item: Made | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for number in numbers:
                if stop.is_set():
                    return
                put(batches[number])
            put(None)
        except BaseException as error:  # carried over to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="mm-data", daemon=True)

    def close() -> None:
        stop.set()
        thread.join(timeout=10)

    atexit.register(close)  # a thread inside torch while the interpreter is taken down aborts the process
    thread.start()
    try:
        while True:
            try:
                item = made.get(timeout=5)
            except queue.Empty:
                if not thread.is_alive() and made.empty():
                    raise RuntimeError("the data thread ended without a word") from None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        close()
        atexit.unregister(close)


def _same(made: Any) -> Any:  # a lambda would not pickle
    return made


def _start_worker(number: int) -> None:
    """Ctrl-C and Slurm's warning reach the whole process group; the main process decides, workers go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    end_with_parent()
