"""Requests run together, wait no longer than they must, and do not spoil each other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from served import until

from mm.serving.batching import Batcher, Closing, Kind

SQUARE, NEGATE = Kind("square"), Kind("negate")


class Fake:
    """Squares numbers. Holds its thread from `hold()` until `go()`; odd things happen to the numbers 13 and 17."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self.free = threading.Event()
        self.free.set()
        self.batcher = Batcher(self.run, size=lambda kind: 4, wait=0.03)

    def run(self, kind: Kind, items: list[int]) -> list[int]:
        self.calls.append((kind.name, items))
        assert self.free.wait(10)
        if 13 in items:
            raise ValueError("13 cannot be meant")
        if 17 in items:
            raise MemoryError("17 is too large")
        return [-item if kind == NEGATE else item**2 for item in items]

    def hold(self) -> Future[list[int]]:
        """The thread is busy with a first item, so that what is put next waits."""
        self.free.clear()
        first = self.batcher.put(SQUARE, [0])
        until(lambda: bool(self.calls))
        self.calls.clear()
        return first

    def go(self) -> None:
        self.free.set()


@pytest.fixture
def fake() -> Iterator[Fake]:
    found = Fake()
    yield found
    found.go()
    found.batcher.close()
    assert found.batcher.join(5)


def test_requests_that_arrive_together_run_together(fake: Fake) -> None:
    futures = [fake.batcher.put(SQUARE, [n]) for n in range(4)]
    assert [future.result(5) for future in futures] == [[0], [1], [4], [9]]
    assert fake.calls == [("square", [0, 1, 2, 3])]
    assert fake.batcher.batches["square"] == 1 and fake.batcher.done["square"] == 4


def test_a_lone_request_waits_only_as_long_as_it_must(fake: Fake) -> None:
    start = time.monotonic()
    assert fake.batcher.put(SQUARE, [3]).result(5) == [9]
    assert 0.03 <= time.monotonic() - start < 2
    start = time.monotonic()
    assert fake.batcher.put(SQUARE, [1, 2, 3, 4]).result(5) == [1, 4, 9, 16], "a full batch waits for nobody"


def test_a_large_request_is_cut_and_others_join_its_last_batch(fake: Fake) -> None:
    fake.hold()
    large, small = fake.batcher.put(SQUARE, [1, 2, 3, 4, 5]), fake.batcher.put(SQUARE, [6])
    fake.go()
    assert large.result(5) == [1, 4, 9, 16, 25] and small.result(5) == [36]
    assert [items for _, items in fake.calls] == [[1, 2, 3, 4], [5, 6]]


def test_kinds_do_not_mix_and_take_turns(fake: Fake) -> None:
    fake.hold()
    many, one = fake.batcher.put(SQUARE, list(range(1, 13))), fake.batcher.put(NEGATE, [5])
    time.sleep(0.05)
    fake.go()
    assert one.result(5) == [-5] and len(many.result(5)) == 12
    assert [name for name, _ in fake.calls] == ["square", "negate", "square", "square"]


def test_one_that_fails_fails_alone(fake: Fake) -> None:
    fake.hold()
    futures = [fake.batcher.put(SQUARE, [n]) for n in (2, 13, 17, 3)]
    fake.go()
    assert futures[0].result(5) == [4] and futures[3].result(5) == [9]
    with pytest.raises(ValueError, match="13 cannot be meant"):
        futures[1].result(5)
    with pytest.raises(MemoryError):
        futures[2].result(5)
    assert fake.batcher.put(SQUARE, [5]).result(5) == [25], "the thread lives on"


def test_what_nobody_waits_for_any_more_never_begins(fake: Fake) -> None:
    async def leave() -> None:
        fake.hold()
        task = asyncio.create_task(fake.batcher.submit(SQUARE, [1, 2, 3, 4, 5]))
        stay = asyncio.create_task(fake.batcher.submit(SQUARE, [6]))
        await asyncio.sleep(0.01)
        assert fake.batcher.waiting == 6
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert fake.batcher.waiting == 1
        fake.go()
        assert await stay == [36]

    asyncio.run(leave())
    assert fake.calls == [("square", [6])]


def test_what_was_not_done_when_it_was_closed_is_given_up(fake: Fake) -> None:
    begun = fake.hold()
    future = fake.batcher.put(SQUARE, [1])
    fake.batcher.close()
    for given_up in (begun, future):
        with pytest.raises(Closing):
            given_up.result(5)
    with pytest.raises(Closing):
        fake.batcher.put(SQUARE, [1])
    fake.go()
    assert fake.batcher.join(5) and not fake.batcher.alive
