"""What a checkpoint folder keeps, and what it does when something in it is damaged; and the ledger beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mm.config import ConfigError
from mm.data.index import Entry
from mm.training import checkpoint
from mm.training.metrics import LedgerFile


def save(run: Path, step: int, keep: int) -> None:
    checkpoint.save(run, step, {"x": torch.full((3,), float(step))}, {"order": "o"}, keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_are_kept_and_latest_names_one_of_them(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    found = checkpoint.load(tmp_path)
    assert found is not None and found[1]["step"] == 3 and found[0]["x"].tolist() == [3.0] * 3


def test_a_run_that_walked_back_keeps_what_it_saves_and_drops_the_damaged_one(tmp_path: Path) -> None:
    save(tmp_path, 100, keep=2)
    save(tmp_path, 200, keep=2)
    (tmp_path / "checkpoints/step-00000200/state.safetensors").write_bytes(b"damaged")
    save(tmp_path, 150, keep=1)
    assert names(tmp_path) == ["step-00000150"]
    assert (tmp_path / "latest").read_text() == "step-00000150\n"


def test_nothing_is_started_anew_over_damaged_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    save(tmp_path, 1, keep=1)
    (tmp_path / "checkpoints/step-00000001/state.json").write_text("{}")
    with pytest.raises(ConfigError, match="all 1 checkpoints are damaged"):
        checkpoint.load(tmp_path)


def test_the_ledger_grows_over_resumes_and_repeats_nothing(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path)
    ledger.write([])
    assert not (tmp_path / "ledger.jsonl").exists()
    first, second = Entry("a.tar", "1", "no image"), Entry("a.tar", "2", "no caption")
    ledger.write([first])
    ledger.write([first, second])
    LedgerFile(tmp_path).write([second, first])  # a run that was resumed
    keys = [json.loads(line)["key"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert keys == ["1", "2"]
