"""`mm checkpoints`: what it shows of a run, and what it exits with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mm.cli import main
from saves import save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2):
        save(tmp_path, step)
    return tmp_path


def test_whole_checkpoints_are_listed_newest_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run)]) == 0
    newest, older = capsys.readouterr().out.splitlines()
    assert newest.startswith("step-00000002") and newest.endswith("s ago  good, latest")
    assert older.startswith("step-00000001") and older.endswith("s ago  good")
    assert "4 files of 1 process " in newest


def test_a_damaged_one_is_named_and_exits_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints/step-00000001/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (run / "checkpoints/step-00000002/manifest.json").unlink()
    (run / "checkpoints/step-00000003.tmp").mkdir()
    assert main(["checkpoints", str(run)]) == 1
    newest, older, left = capsys.readouterr().out.splitlines()
    assert newest.endswith("damaged: manifest.json: is missing, latest") and "of ? processes" in newest
    assert older.endswith("damaged: __0_0.distcp: does not match its sha256")
    assert left == "step-00000003.tmp: being written, or left by an interrupted save"


def test_json_has_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/step-00000001/extra").touch()
    assert main(["checkpoints", str(run), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["latest"] == "step-00000002" and shown["leftovers"] == []
    assert [(one["step"], one["problem"], one["latest"], one["processes"]) for one in shown["checkpoints"]] == [
        (2, "", True, 1),
        (1, "extra: is not in the manifest", False, 1),
    ]
    size = sum(path.stat().st_size for path in (run / "checkpoints/step-00000002").iterdir())
    assert shown["checkpoints"][0]["bytes"] == size


def test_a_run_before_its_first_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no checkpoint yet\n"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main(["checkpoints", str(folder)]) == 2
        assert capsys.readouterr().err == f"mm: error: {folder}: not a run folder; give the run.dir of a training\n"


def test_it_answers_without_torch(run: Path, run_python: Run) -> None:
    code = f"import sys; from mm.cli import main; main(['checkpoints', {str(run)!r}]); print('torch' in sys.modules)"
    assert run_python("-c", code).stdout.splitlines()[-1] == "False"
