"""How a process gets its batches, and what it tells the others: here it is alone, or in company of one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mm.config import ConfigError
from mm.data.index import Entry
from mm.data.order import key_sums
from mm.distributed.world import World
from mm.training.agreement import Agreement, Feed
from mm.training.preemption import Stop
from mm.types import Batch
from ranks import Team


class Batches:
    """As a loader: batch n has the keys n-0 and n-1; reading takes `seconds`, and fails at batch `bad`."""

    def __init__(self, seconds: float = 0.0, bad: int = -1) -> None:
        self.start, self.seconds, self.bad = 0, seconds, bad
        self.ledger: list[Entry] = []
        self.starts: list[int] = []

    def __iter__(self) -> Iterator[Batch]:
        self.starts.append(self.start)
        for number in range(self.start, 99):
            time.sleep(self.seconds)
            if number == self.bad:
                raise OSError("the disk is gone")
            yield Batch({}, {}, torch.arange(2), [f"{number}-0", f"{number}-1"])


def feed(batches: Batches, stop: Stop | None = None) -> Feed:
    return Feed(batches, Stop() if stop is None else stop)  # type: ignore[arg-type]


def test_batches_come_in_order_from_one_reading() -> None:
    batches = Batches()
    fed = feed(batches)
    for number in range(5, 9):
        batch = fed.take(number)
        assert batch is not None and batch.keys[0] == f"{number}-0"
    assert batches.starts == [5]


def test_a_run_that_goes_back_reads_from_there() -> None:
    batches = Batches()
    fed = feed(batches)
    for number in (0, 1, 2, 1, 2, 3):
        batch = fed.take(number)
        assert batch is not None and batch.keys[0] == f"{number}-0"
    assert batches.starts == [0, 1]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_wait_for_data_at_once(number: int) -> None:
    start = time.monotonic()
    with Stop().listening() as stop:
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        assert feed(Batches(seconds=15), stop).take(0) is None
        assert stop.signal == number and time.monotonic() - start < 10
        fed = feed(Batches(), stop)
        assert fed.take(0) is None, "nothing is read any more"
        assert Agreement(World(), 0).before(fed, None, stop).stop == number


def test_an_error_is_raised_when_all_know_of_it() -> None:
    fed = feed(Batches(bad=1))
    agreement = Agreement(World(), 0)
    agreement.before(fed, fed.take(0), Stop())
    assert fed.take(1) is None
    with pytest.raises(OSError, match="the disk is gone"):
        agreement.before(fed, None, Stop())


def test_a_save_is_due_by_the_clock() -> None:
    fed = feed(Batches())
    agreement = Agreement(World(), minutes=1)
    assert not agreement.before(fed, fed.take(0), Stop()).save
    agreement.saved -= 61
    assert agreement.before(fed, fed.take(1), Stop()).save
    never = Agreement(World(), minutes=0)
    never.saved -= 1e6
    assert not never.before(fed, fed.take(2), Stop()).save


def test_what_cannot_be_used_is_told_once() -> None:
    batches = Batches()
    fed, agreement = feed(batches), Agreement(World(), 0)
    entry = Entry("train-0.tar", "key", "not a picture")
    for number in range(3):
        batches.ledger.append(entry)
        agreed = agreement.before(fed, fed.take(number), Stop())
    assert agreement.entries == [entry] and agreed.metrics["unusable"] == 1


def two_steps(world: World) -> list[dict[str, Any]]:
    """Process 1 waits for its data in both; then the others have waited for it."""
    fed = feed(Batches(seconds=0.3 * world.rank))
    agreement, found = Agreement(world, 0), []
    for number in range(2):
        agreed = agreement.before(fed, fed.take(number), Stop())
        found.append(agreed.metrics | {"sums": agreed.sums})
    return found


def one_signal(world: World) -> int:
    stop = Stop()
    stop.signal = signal.SIGUSR1 if world.main else None
    fed = feed(Batches())
    return Agreement(world, 0).before(fed, fed.take(0), stop).stop


def one_error(world: World) -> None:
    fed = feed(Batches(bad=0 if world.rank else -1))
    Agreement(world, 0).before(fed, fed.take(0), Stop())


@pytest.mark.timeout(60)
def test_two_processes_agree() -> None:
    team = Team(2)
    first, second = team(two_steps)
    assert first == second
    wanted = [a + b for a, b in zip(key_sums(["0-0", "0-1"], 0), key_sums(["0-0", "0-1"], 2), strict=True)]
    assert first[0]["sums"] == wanted, "every key counts at its place in the global batch"
    assert [step["data_wait_rank"] for step in first] == [1, 1] and first[0]["data_wait"] >= 0.3
    assert first[1]["straggler"] == 1 and first[1]["straggler_wait"] > 0.1
    assert team(one_signal) == [signal.SIGUSR1] * 2
    assert team(one_error) == ["ConfigError: process 1: the disk is gone", "OSError: the disk is gone"]
    team.close()


def test_a_world_of_one_answers_at_once() -> None:
    world = World()
    assert world.main and world.total([3, 4]) == [3, 4] and world.most([1.5]) == [1.5]
    assert world.any(True) and not world.any(False)
    assert world.gather("x") == ["x"] and world.share("x") == "x"
    assert world.lead(lambda: 5) == world.in_turn(lambda: 5) == 5
    with pytest.raises(ConfigError, match="as it is"):
        world.lead(refuse)


def refuse() -> None:
    raise ConfigError("as it is")
