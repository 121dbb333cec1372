"""Requests put together: one thread runs the model, on as many items at once as arrived within a moment."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """Items of equal kind may run together: the same work with the same settings."""

    name: str
    settings: Hashable = None


Run = Callable[[Kind, list[Any]], Sequence[Any]]  # one result an item


class Closing(Exception):
    """The batcher takes nothing more, and has given up what it had taken."""


class _Ticket:
    """The items of one request, and the future of their results."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = list(items)
        self.results: list[Any] = [None] * len(self.items)
        self.left, self.since = len(self.items), time.monotonic()
        self.future: Future[list[Any]] = Future()
        self.future.set_running_or_notify_cancel()  # so that only the batcher settles it, under its lock

    def fill(self, place: int, result: Any) -> None:
        """Takes an item's result, or the exception that it raised; what comes after an exception is lost."""
        if self.future.done():
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
            return
        self.results[place], self.left = result, self.left - 1
        if not self.left:
            self.future.set_result(self.results)


class Batcher:
    """Items wait at most `wait` seconds for others of their kind while the model is free, and run in order of arrival.

    Kinds take turns, so that long work of one kind does not hold up another for more than one batch. A large request
    is cut into batches, which other requests of its kind join. One item that fails fails alone: its batch is run again
    item by item, and the error is the result of its request.
    """

    def __init__(self, run: Run, *, size: Callable[[Kind], int], wait: float) -> None:
        """`size` says how many items of a kind run at once."""
        self._run, self._size, self._wait = run, size, wait
        self._waiting: OrderedDict[Kind, deque[tuple[_Ticket, int]]] = OrderedDict()  # the kind next in turn first
        self._condition = threading.Condition()
        self._closed = False
        self._batch: list[tuple[_Ticket, int]] = []  # what runs
        self.batches: Counter[str] = Counter()  # by name of the kind, since the start
        self.done: Counter[str] = Counter()  # items, likewise
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items that have not begun."""
        with self._condition:
            return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """Items that run."""
        return len(self._batch)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def put(self, kind: Kind, items: Sequence[Any]) -> Future[list[Any]]:
        """The future results of `items`, in their order. Raises Closing."""
        return self._put(kind, items).future

    async def submit(self, kind: Kind, items: Sequence[Any]) -> list[Any]:
        """The results of `items`, in their order. Where the caller is cancelled, what has not begun never will.

        Raises Closing, and what the model raised for one of the items.
        """
        if not items:
            return []
        ticket = self._put(kind, items)
        try:
            return await asyncio.wrap_future(ticket.future)
        finally:
            self._withdraw(kind, ticket)

    def close(self) -> None:
        """Nothing more is taken, and whoever waits for results gets Closing; a batch that runs ends unheard."""
        with self._condition:
            self._closed = True
            for ticket, place in [*self._batch, *(entry for queue in self._waiting.values() for entry in queue)]:
                ticket.fill(place, Closing())
            self._waiting.clear()
            self._condition.notify()

    def join(self, timeout: float) -> bool:
        """Whether the thread has ended, after `timeout` seconds at most."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _put(self, kind: Kind, items: Sequence[Any]) -> _Ticket:
        assert items, "nothing to run"
        ticket = _Ticket(items)
        with self._condition:
            if self._closed:
                raise Closing
            self._waiting.setdefault(kind, deque()).extend((ticket, place) for place in range(len(ticket.items)))
            self._condition.notify()
        return ticket

    def _withdraw(self, kind: Kind, ticket: _Ticket) -> None:
        with self._condition:
            if ticket.left and kind in self._waiting:
                kept = deque(entry for entry in self._waiting[kind] if entry[0] is not ticket)
                if kept:
                    self._waiting[kind] = kept
                else:
                    del self._waiting[kind]

    def _next(self) -> tuple[Kind, list[tuple[_Ticket, int]]] | None:
        """The next batch, once there is one that is full or has waited long enough; None when all is over."""
        with self._condition:
            while not self._closed:
                now, due = time.monotonic(), float("inf")
                for kind, queue in self._waiting.items():
                    ready = queue[0][0].since + self._wait
                    if len(queue) >= self._size(kind) or ready <= now:
                        return kind, self._take(kind)
                    due = min(due, ready)
                self._condition.wait(None if due == float("inf") else due - now)
            return None

    def _take(self, kind: Kind) -> list[tuple[_Ticket, int]]:
        queue = self._waiting[kind]
        batch = [queue.popleft() for _ in range(min(self._size(kind), len(queue)))]
        if queue:
            self._waiting.move_to_end(kind)
        else:
            del self._waiting[kind]
        self._batch = batch
        return batch

    def _work(self) -> None:
        while (found := self._next()) is not None:
            kind, batch = found
            results = list(self._results(kind, [ticket.items[place] for ticket, place in batch]))
            with self._condition:
                self._batch = []
                for (ticket, place), result in zip(batch, results, strict=True):
                    ticket.fill(place, result)

    def _results(self, kind: Kind, items: list[Any]) -> Iterator[Any]:
        try:
            results = self._run(kind, items)
            assert len(results) == len(items), f"{kind.name}: {len(results)} results for {len(items)} items"
        except Exception as error:  # whatever it is, it belongs to one request, and this thread to all of them
            if len(items) == 1:
                yield error
            else:
                for item in items:
                    yield from self._results(kind, [item])
            return
        self.batches[kind.name] += 1
        self.done[kind.name] += len(items)
        yield from results
