"""Who is to blame for a stall; what is no stall; where the processes of a run write."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mm.distributed.world import World
from mm.training import watchdog
from mm.training.blame import Sign, culprits, frames_of, here, verdict
from mm.training.logs import prepare_flight_recorder, redirect
from mm.training.watchdog import Watchdog, _within

COLLECTIVE = ("torch/distributed/distributed_c10d.py:3913 all_reduce", "mm/training/loop.py:1 step")
READING = ("mm/data/tar.py:88 read", "mm/training/loop.py:1 step")


def signs(**changed: dict[str, Any]) -> dict[int, Sign]:
    """Three processes in the same collective of step 7, but for what is said of them: r1=dict(step=6)."""
    same = {rank: Sign(rank, "node", "elsewhere", 100 + rank, "forward", 7, 30, 5.0, COLLECTIVE) for rank in range(3)}
    return same | {int(name[1:]): replace(same[int(name[1:])], **fields) for name, fields in changed.items()}


@pytest.mark.parametrize(
    ("said", "answered", "blamed"),
    [
        (signs(), [0, 1, 2], []),
        (signs(), [0, 2], [1]),
        (signs(r0={"step": 6}), [1, 2], [0]),
        (signs(r2={"step": 6}), [0, 1, 2], [2]),
        (signs(r1={"phase": "data", "frames": READING}), [0, 1, 2], [1]),
        (signs(r0={"phase": "save", "frames": READING}), [0, 1, 2], [0]),
        (signs(r1={"changes": 29}), [0, 1, 2], [1]),
        (signs(r0={"step": 6}, r1={"step": 6, "frames": READING}), [0, 1, 2], [1]),
        (signs(r0={"phase": "data", "frames": READING}, r1={"phase": "data", "frames": READING}), [0, 1, 2], [0, 1]),
    ],
    ids="same-place silent silent-beats-behind fewest-steps in-data own-code fewest-phases several-rules two".split(),
)
def test_the_process_that_the_others_wait_for_is_found(
    said: dict[int, Sign], answered: list[int], blamed: list[int]
) -> None:
    assert culprits(said, answered, 3) == blamed


def test_who_waits_for_anothers_part_of_the_work_is_not_to_blame() -> None:
    waiting = {"frames": ("mm/distributed/world.py:1 awaited", "mm/training/muon.py:2 _updates")}
    said = signs(r0=waiting, r1={"frames": ("mm/training/muon.py:3 orthogonal",)}, r2=waiting)
    assert culprits(said, [0, 1, 2], 3) == [1]


def test_a_message_names_host_process_phase_and_place() -> None:
    text = verdict(signs(r1={"phase": "data", "frames": READING, "seconds": 118.2, "step": 6}), [0, 1, 2], 3)
    assert text == (
        "no progress for 118 s at step 6: waiting for rank 1 (node, pid 101), in data for 118 s at: "
        "mm/data/tar.py:88 read < mm/training/loop.py:1 step"
    )


def test_a_message_stays_short_when_a_machine_is_lost() -> None:
    text = verdict({0: signs()[0], 1: signs()[1]}, [0], 9)
    assert "waiting for rank 1 (node, pid 101), silent: stopped, dead, or its machine is gone" in text
    assert "rank 2, which was never heard from" in text and text.endswith("and 5 more") and "rank 5" not in text


def test_a_process_that_has_left_is_not_taken_for_dead() -> None:
    assert "pid 101), has left the run, last heard from in end at step 7" in verdict(
        signs(r1={"phase": "end"}), [0, 2], 3
    )


def test_a_silent_process_of_this_machine_is_looked_up() -> None:
    host, pids, _ = here()
    mine = {"host": host, "pids": pids, "pid": 2**22 + 1}  # above any process id of Linux
    assert "), gone, last heard from" in verdict(signs(r1=mine), [0, 2], 3)


def test_where_nobody_is_behind_the_network_is_suspected() -> None:
    assert "all 3 processes are in forward and none is behind" in verdict(signs(), [0, 1, 2], 3)


def test_a_sign_survives_the_store() -> None:
    assert Sign.from_json(signs()[0].to_json()) == signs()[0]


def test_frames_are_named_as_modules_are() -> None:
    assert frames_of(threading.get_ident())[1].endswith("test_frames_are_named_as_modules_are")
    assert frames_of(threading.get_ident())[0].startswith("mm/training/blame.py:")
    assert frames_of(-1) == ()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set where a watchdog would have ended the process."""
    event = threading.Event()
    monkeypatch.setattr(Watchdog, "_end", lambda self: event.set())
    return event


def test_progress_in_the_same_phase_is_no_stall(tmp_path: Path, ended: threading.Event) -> None:
    with Watchdog(tmp_path, World(), 1.0) as dog:
        for _ in range(30):
            dog.at("evaluate", 3)
            time.sleep(0.05)
        assert not ended.is_set()
        assert ended.wait(5), "and none at all is"


def test_a_compilation_may_take_five_times_as_long(tmp_path: Path, ended: threading.Event) -> None:
    with Watchdog(tmp_path, World(), 0.6) as dog:
        dog.at("compile", 0)
        assert not ended.wait(1.8)
        assert ended.wait(10)


def test_who_waits_for_another_ones_compilation_is_as_patient(tmp_path: Path, ended: threading.Event) -> None:
    store = dist.HashStore()
    with Watchdog(tmp_path, World(0, 2), 0.6, store=store) as dog:
        dog.at("forward", 0)
        for tenth in range(25):
            store.set("sign/1", signs(r1={"phase": "compile", "seconds": tenth / 10})[1].to_json())
            assert not ended.wait(0.1)
        assert ended.wait(10)


def test_who_waits_for_one_that_was_stopped_while_it_compiled_is_not(tmp_path: Path, ended: threading.Event) -> None:
    store = dist.HashStore()
    store.set("sign/1", signs(r1={"phase": "compile"})[1].to_json())
    with Watchdog(tmp_path, World(0, 2), 0.6, store=store) as dog:
        dog.at("forward", 0)
        assert not ended.wait(1.0), "a sign or two may be late"
        assert ended.wait(1.4), "0.6 s and six signs, not five times 0.6 s"


def test_a_store_that_does_not_answer_once_ends_nothing(tmp_path: Path, ended: threading.Event) -> None:
    class Late(dist.HashStore):
        asked = 0

        def check(self, names: list[str]) -> bool:
            if names[0].startswith("sign/"):
                self.asked += 1
                if self.asked == 3:
                    time.sleep(0.3)  # two beats
            return bool(super().check(names))

    store = Late()
    with Watchdog(tmp_path, World(0, 2), 0.6, store=store) as dog:
        dog.at("forward", 0)
        for tenth in range(20):
            store.set("sign/1", signs(r1={"phase": "compile", "seconds": tenth / 10})[1].to_json())
            assert not ended.wait(0.1)
        assert store.asked > 3


def test_a_stall_elsewhere_is_heard_of(tmp_path: Path, ended: threading.Event) -> None:
    store = dist.HashStore()
    with Watchdog(tmp_path, World(0, 2), 4.0, store=store) as dog:
        dog.at("forward", 0)
        store.set("stall", "1")
        assert ended.wait(3.5)


def test_without_a_limit_no_thread_is_started(tmp_path: Path) -> None:
    before = threading.active_count()
    with Watchdog(tmp_path, World(), 0) as dog:
        dog.at("data", 1)
        assert threading.active_count() == before
    assert not (tmp_path / "logs").exists()


def test_the_threads_end_with_the_block(tmp_path: Path) -> None:
    before = threading.active_count()
    with Watchdog(tmp_path, World(0, 2), 600, store=dist.HashStore()):
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


def test_work_that_hangs_or_fails_has_no_result() -> None:
    forever = threading.Event()
    assert _within(0.05, forever.wait) is None
    assert _within(5, lambda: os.stat("/nowhere")) is None
    assert _within(5, lambda: 3) == 3
    forever.set()


def stall(run: Path) -> None:
    os.dup2(os.open(run / "screen", os.O_WRONLY | os.O_CREAT), 2)
    with Watchdog(run, World(), 1.0) as dog:
        dog.at("data", 57)
        threading.Event().wait(60)


def be_slow(run: Path) -> None:
    with Watchdog(run, World(), 3.0) as dog:
        dog.at("data", 57)
        (run / "ready").touch()
        for _ in range(20):
            time.sleep(0.05)


def started(work: Callable[[Path], None], run: Path) -> Any:
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    process = context.Process(target=work, args=(run,))
    process.start()
    return process


@pytest.mark.timeout(60)
def test_a_stalled_process_says_where_it_is_and_ends(tmp_path: Path) -> None:
    process = started(stall, tmp_path)
    process.join(50)
    said, stacks = (tmp_path / "screen").read_text(), (tmp_path / "logs" / "stall-rank-0.txt").read_text()
    assert process.exitcode == watchdog.STALLED
    assert "no progress for 1 s at step 57, in data at: threading.py:" in said and "test_watchdog.py:" in said
    assert said.endswith("start the same command again to go on from its newest checkpoint\n")
    assert "in stall\n" in stacks and " 57 data" in stacks


@pytest.mark.timeout(60)
def test_a_process_that_was_suspended_for_longer_than_the_limit_goes_on(tmp_path: Path) -> None:
    process = started(be_slow, tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3.5)
    os.kill(process.pid, signal.SIGCONT)
    process.join(50)
    assert process.exitcode == 0


def write_as(rank: int, run: Path) -> None:
    os.dup2(os.open(run / f"screen-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    tell = redirect(run, rank)
    print("to stdout", flush=True)
    os.write(2, b"from C\n")
    tell("something for a person")


def second(run: Path) -> None:
    write_as(1, run)


def first(run: Path) -> None:
    write_as(0, run)


@pytest.mark.timeout(60)
def test_only_the_first_process_writes_to_the_screen_but_any_can_speak(tmp_path: Path) -> None:
    processes = [started(work, tmp_path) for work in (first, second, second)]
    for process in processes:
        process.join(50)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "screen-0").read_text() == "from C\nmm: something for a person\n"
    assert (tmp_path / "screen-1").read_text() == "rank 1: something for a person\n"
    log = (tmp_path / "logs" / "rank-1.txt").read_text()
    assert log.count("to stdout\n") == log.count("from C\n") == 2, "the second start adds to the log of the first"
    for process in processes[1:]:
        assert f"pid {process.pid}\n" in log
    assert not (tmp_path / "logs" / "rank-0.txt").exists()


def test_the_users_flight_recorder_settings_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("TORCH_FR", "TORCH_NCCL"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ, TORCH_NCCL_TRACE_BUFFER_SIZE="7"))
    prepare_flight_recorder(tmp_path)
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ and os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "logs" / "nccl-rank-")
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
