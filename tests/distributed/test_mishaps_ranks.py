"""What goes wrong in one process, all meet together: a bad number, bad data, a batch that cannot be shared."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from mm.distributed.world import World
from ranks import STEPS, Trained, orders, training
from runs import records, same

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
BAD = {"MM_FAULT": "nan:step@step=4,rank=1"}


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "health.jsonl").read_text().splitlines()]


def test_all_stop_for_a_bad_number_in_one_process_and_name_its_samples(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = trained.start(2, run, "--health.nonfinite", "stop", **BAD)
    assert ended[0] == ended[1] and ended[0].startswith("Diverged: step 4: loss = nan")
    (event,) = events(run)
    assert (event["step"], event["action"]) == (4, "stop")
    assert len(event["samples"]) == 8 and {sample["rank"] for sample in event["samples"]} == {1}
    for sample in event["samples"]:
        with tarfile.open(sample["shard"]) as shard:
            assert f"{sample['key']}.png" in shard.getnames()
        assert sample["key"] in ended[0] or sample in event["samples"][6:]


@pytest.mark.slow
def test_all_skip_or_go_back_for_a_bad_number_in_one_process(trained: Trained, tmp_path: Path) -> None:
    """And both come to the same weights: the step changes nothing, and the schedule moves on."""
    made = {}
    for action in ("skip", "rewind"):
        run = made[action] = tmp_path / action
        ended = trained.start(2, run, "--health.nonfinite", action, "--checkpoint.every", "2", **BAD)
        assert ended == [f"finished {STEPS}"] * 2
        (event,) = events(run)
        assert (event["step"], event["action"]) == (4, action)
        assert {sample["rank"] for sample in event["samples"]} == {1}
        lines = records(run)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert [line.get("left_out", 0.0) for line in lines] == [0, 0, 0, 1, 0, 0]
        assert orders(run) == orders(trained(1))
    assert same(made["skip"], made["rewind"])
    assert not same(made["skip"], trained(2))


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_skips_and_rewinds_are_bounded(trained: Trained, tmp_path: Path, action: str) -> None:
    run, faults = tmp_path / "run", "nan:step@step=2,rank=0;nan:step@step=4,rank=1"
    ended = trained.start(2, run, "--health.nonfinite", action, "--health.most", "1", MM_FAULT=faults)
    assert ended[0] == ended[1] and ended[0].startswith("Diverged: step 4: ")
    assert "the 1 that health.most allows are used up" in ended[0]
    assert [event["action"] for event in events(run)] == [action, "stop"]


def test_an_error_in_the_data_of_one_process_stops_all(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = trained.start(2, run, "--checkpoint.every", "2", MM_FAULT="error:data@step=4,rank=1")
    what = "[Errno 5] Input/output error: '(data, on purpose)'"
    assert ended == [f"ConfigError: process 1: {what}", f"OSError: {what}"]
    assert trained.start(2, run) == [f"finished {STEPS}"] * 2
    assert same(run, trained(2))


def test_a_batch_that_processes_cannot_share_is_refused(trained: Trained, tmp_path: Path) -> None:
    ended = trained.start(4, tmp_path / "run", "--data.batch-size", "18")
    assert ended == ["ConfigError: data.batch_size = 18: must be a multiple of 4 processes = 4; try 16 or 20"] * 4
    assert not (tmp_path / "run").exists()


def tokenizers(world: World, flags: tuple[str, ...]) -> int:
    """How many tokenizers this process trains in a run."""
    from mm.training import run_folder

    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        train = run_folder.train_tokenizer
        patch.setattr(run_folder, "train_tokenizer", lambda *given: calls.append(1) or train(*given))
        training(world, flags)
    return len(calls)


def test_one_process_makes_the_tokenizer_of_all(trained: Trained, tmp_path: Path) -> None:
    """Several at once would write one file."""
    flags = ("--data.train", f"{trained.shards}/train-*.tar", "--run.dir", str(tmp_path / "run"), "--run.steps", "1")
    assert trained.team(4)(tokenizers, flags) == [1, 0, 0, 0]
