"""Two gloo processes, one of which stops or sleeps: the other says which and where, and both end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

STALL, BAD_STEP = 2.0, 3
CASES = ["stop:1", "stop:0", "sleep:1", "sleep:0", "store:0"]


def process(case: str, rank: int, port: int, run: Path) -> None:
    """One rank of a run that all_reduces until the rank that `case` names does what it says at BAD_STEP."""
    import torch
    import torch.distributed as dist

    from mm.distributed.world import joined
    from mm.training.logs import prepare_flight_recorder, redirect
    from mm.training.watchdog import Watchdog

    os.dup2(os.open(run / f"screen-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    kind, culprit = case.split(":")
    if kind != "store":
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    prepare_flight_recorder(run)
    with joined(torch.device("cpu"), 120) as world, Watchdog(run, world, STALL, tell=redirect(run, rank)) as dog:
        dog.saved = 2
        for step in range(10_000):
            bad = step == BAD_STEP and rank == int(culprit)
            dog.at("data", step)
            time.sleep(STALL / 2 / BAD_STEP)  # long enough for some signs of life before
            if bad and kind == "sleep":
                read_a_shard()
            dog.at("forward", step)
            if bad and kind in ("stop", "store"):
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.all_reduce(torch.ones(1))


def read_a_shard() -> None:
    time.sleep(120)


@dataclass
class Run:
    """The two processes of one case."""

    folder: Path
    ranks: list[BaseProcess]

    def end(self, rank: int) -> tuple[int | None, str]:
        """Exit code and what the process said on the screen; its logs are elsewhere."""
        self.ranks[rank].join(60)
        said = (self.folder / f"screen-{rank}").read_text()
        return self.ranks[rank].exitcode, "\n".join(line for line in said.splitlines() if "no progress" in line)

    def stacks(self, rank: int) -> str:
        return (self.folder / "logs" / f"stall-rank-{rank}.txt").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All cases at once, for most of their time is waiting. As under torchrun, another process holds the store."""
    import torch.distributed as dist

    stores, started = [], {}
    context = get_context("forkserver")  # torch is imported once, in a process without threads
    context.set_forkserver_preload(["torch", "torch.distributed"])
    for case in CASES:
        folder = tmp_path_factory.mktemp("run")
        stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        port = stores[-1].port
        if case.startswith("store"):
            stores.pop()  # its port is free again, and rank 0 holds the store there
        ranks = [context.Process(target=process, args=(case, rank, port, folder)) for rank in range(2)]
        for one in ranks:
            one.start()
        started[case] = Run(folder, ranks)
    yield started
    for run in started.values():
        for one in run.ranks:
            one.kill()
            one.join(10)


@pytest.mark.timeout(120)
def test_a_stopped_process_is_named_and_does_not_keep_the_other(runs: dict[str, Run]) -> None:
    run = runs["stop:1"]
    code, said = run.end(0)
    assert code == 75
    assert f"at step {BAD_STEP}: waiting for rank 1 (" in said
    assert f"pid {run.ranks[1].pid}), stopped (SIGSTOP), last heard from in " in said
    assert "start the same command again to go on from step 2" in said
    assert "all_reduce" in run.stacks(0) and f" {BAD_STEP} forward" in run.stacks(0)
    assert run.ranks[1].exitcode is None, "its launcher kills it; the others did not wait for that"


@pytest.mark.timeout(120)
def test_a_stopped_first_rank_is_named_by_the_second(runs: dict[str, Run]) -> None:
    code, said = runs["stop:0"].end(1)
    assert code == 75
    assert said.startswith("rank 1: ") and "waiting for rank 0 (" in said and "stopped (SIGSTOP)" in said


@pytest.mark.timeout(120)
def test_a_process_that_waits_for_data_is_named_with_the_place_in_its_code(runs: dict[str, Run]) -> None:
    run = runs["sleep:1"]
    (code, said), (other_code, other_said) = run.end(0), run.end(1)
    assert code == other_code == 75
    assert "waiting for rank 1 (" in said and ", in data for " in said
    assert "test_watchdog_ranks.py" in said and "read_a_shard < " in said
    assert other_said == "", "once is enough"
    assert "in read_a_shard" in run.stacks(1) and "in read_a_shard" not in run.stacks(0)
    assert "waiting for rank 1 (" in run.stacks(1)


@pytest.mark.timeout(120)
def test_the_flight_recorder_holds_the_collectives_of_a_stalled_run(runs: dict[str, Run]) -> None:
    run = runs["sleep:1"]
    run.end(0)
    started = [
        sum("all_reduce" in entry["profiling_name"] for entry in json.loads(path.read_text())["entries"])
        for path in sorted((run.folder / "logs").glob("flight-gloo-rank-*.json"))
    ]
    assert len(started) == 2 and started[0] == started[1] + 1


@pytest.mark.timeout(120)
def test_a_first_rank_that_is_to_blame_is_named_by_the_second(runs: dict[str, Run]) -> None:
    (code, said), (other_code, other_said) = runs["sleep:0"].end(0), runs["sleep:0"].end(1)
    assert code == other_code == 75
    assert said == "" and "waiting for rank 0 (" in other_said and "read_a_shard < " in other_said


@pytest.mark.timeout(120)
def test_a_store_that_stops_with_the_first_rank_keeps_nobody(runs: dict[str, Run]) -> None:
    code, said = runs["store:0"].end(1)
    assert code == 75
    assert "store of the process group does not answer, so that rank 0 or its launcher is stopped or gone" in said
