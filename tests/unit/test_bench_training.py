"""The two trainers of tools/bench/train_shards.py take turns: a stopped one makes no step, and is not timed."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mm.adapters.text import ClipTokenizer

BENCH = Path(__file__).parents[2] / "tools" / "bench"
TRAINER = """
import sys, time
with open(sys.argv[1], "a") as log:
    while True:
        time.sleep(0.02)
        log.write("loss 1.5\\n")
        log.flush()
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("train_shards")


@pytest.fixture
def side(bench: Any, tmp_path: Path) -> Iterator[Any]:
    log = tmp_path / "run" / "log.txt"
    log.parent.mkdir()
    side = bench.Side([sys.executable, "-c", TRAINER, str(log)], log, lambda line: float(line.split()[1]), {})
    yield side
    side.end()


@pytest.mark.timeout(60)
def test_a_stopped_trainer_makes_no_step_and_its_stop_is_not_timed(side: Any, bench: Any) -> None:
    side.wait(3)
    side.signal(signal.SIGSTOP)
    time.sleep(0.1)  # until it stands
    done = len(side.losses())
    time.sleep(1.0)
    assert len(side.losses()) == done and side.losses()[0] == 1.5
    rate = side.window(10)
    assert rate > bench.BATCH / 0.09  # a step takes a little over 0.02 s; with the second in which it stood, 0.12


@pytest.mark.timeout(60)
def test_a_trainer_that_ends_is_told_of_with_its_last_words(bench: Any, tmp_path: Path) -> None:
    log = tmp_path / "run" / "log.txt"
    side = bench.Side([sys.executable, "-c", "raise SystemExit('no such model')"], log, float, {})
    with pytest.raises(RuntimeError, match="no such model"):
        side.wait(1)


def test_the_loss_is_read_from_open_clips_log(bench: Any) -> None:
    line = "2026-11-28,07:49:10 | INFO | Train Epoch: 0 [ 64/1000064 (0%)] Data (t): 0.7 Batch (t): 3.5, 18.2/s, 18.2/s/gpu LR: 0.0 Logit Scale: 14.286 Contrastive_loss: 4.2058 (4.2058) Loss: 4.2058 (4.2058)"  # fmt: skip  # noqa: E501
    assert bench._peer_loss(line) == 4.2058 and bench._peer_loss("Start epoch 0") is None


def test_captions_are_as_long_as_alt_texts(bench: Any) -> None:
    words = [len(ClipTokenizer().encode(text)) for text in bench.captions(500)]
    assert 12 <= sum(words) / len(words) <= 16 and max(words) < 30
    assert bench.captions(5) == bench.captions(5) != bench.captions(5, seed=1)
