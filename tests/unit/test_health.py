"""What is judged to be wrong with a step, and what follows from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mm.config import HealthConfig
from mm.training.health import Diverged, Health

SAMPLES = [{"key": f"key{number}", "shard": f"/data/train-{number}.tar", "rank": 1} for number in range(8)]


def health(**config: Any) -> Health:
    return Health(HealthConfig(**config))


def judge(health: Health, loss: float, norm: float = 1.0) -> str:
    """What is to be done; "" where nothing is wrong."""
    problem, action = health.judge({"loss": loss, "grad_norm": norm})
    assert bool(problem) == bool(action)
    return action


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("action", ["stop", "skip", "rewind"])
def test_what_is_no_number_meets_the_policy(bad: float, action: Any) -> None:
    for numbers in ((bad, 1.0), (1.0, bad)):
        assert judge(health(nonfinite=action), *numbers) == action


def test_a_spike_is_far_above_the_median_of_a_full_window() -> None:
    watched = health(spike="rewind", spike_factor=2.0, spike_window=5)
    for loss in (9.0, 3.0, 1.0, 2.0):
        assert judge(watched, loss) == ""
    assert judge(watched, 100.0) == "", "the window is not full: early losses are high"
    assert sorted(watched.losses) == [1.0, 2.0, 3.0, 9.0, 100.0]
    assert judge(watched, 6.0) == "", "not above twice the median of 3"
    assert judge(watched, 6.1) == "rewind"


def test_a_spike_does_not_raise_the_median() -> None:
    watched = health(spike="skip", spike_factor=2.0, spike_window=3)
    for loss in (1.0, 1.0, 1.0, *[50.0] * 9):
        action = judge(watched, loss)
    assert action == "skip" and list(watched.losses) == [1.0, 1.0, 1.0]


def test_no_spike_is_looked_for_unless_asked() -> None:
    watched = health(spike_window=2)
    assert [judge(watched, loss) for loss in (1.0, 1.0, 1e9)] == ["", "", ""]


def test_a_stop_names_the_first_samples_and_the_file_names_all(tmp_path: Path) -> None:
    with pytest.raises(Diverged) as caught:
        health().act(tmp_path, 7, "loss = nan", "stop", SAMPLES, main=True)
    line = str(caught.value)
    assert line.startswith("step 7: loss = nan; samples key0 (train-0.tar), key1 (train-1.tar)") and "\n" not in line
    assert "key5 (train-5.tar) ...;" in line and "key6" not in line and "optim.lr" in line
    (event,) = [json.loads(text) for text in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert event == {"step": 7, "problem": "loss = nan", "action": "stop", "samples": SAMPLES}


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    health().act(tmp_path, 7, "loss = nan", "skip", SAMPLES, main=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_the_bound_holds_over_restarts(tmp_path: Path, action: str) -> None:
    first = health(most=2)
    first.act(tmp_path, 3, "loss = nan", action, SAMPLES, main=True)
    first.act(tmp_path, 4, "loss = nan", action, SAMPLES, main=True)
    resumed = health(most=2)
    resumed.load(json.loads(json.dumps(first.state())))
    with pytest.raises(Diverged, match="the 2 that health.most allows are used up"):
        resumed.act(tmp_path, 5, "loss = nan", action, SAMPLES, main=True)
    written = [json.loads(line)["action"] for line in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert written == [action, action, "stop"]


def test_going_back_does_not_forget_what_was_met_since() -> None:
    watched = health(most=9, spike_window=3)
    for loss in (1.0, 2.0):
        judge(watched, loss)
    saved = json.loads(json.dumps(watched.state()))
    judge(watched, 3.0)
    watched.left_out.add(2)
    watched.events = 1
    watched.load(saved)
    assert list(watched.losses) == [1.0, 2.0], "the losses are those of the checkpoint"
    assert watched.left_out == {2} and watched.events == 1, "else the run would meet the same batch for ever"
