"""What `mm chaos` tries, what it takes for right and wrong, and what it refuses. No run is started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import saves
from mm.chaos import judge, shards, storage, table
from mm.chaos import run as suite_run
from mm.chaos.launch import Outcome, Wrong
from mm.chaos.suite import Finding, Scenario, Stage, Suite, prepare
from mm.config import ConfigError

CONFIG = str(Path(__file__).resolve().parents[2] / "configs/debug.py")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_the_suite_has_every_fault_of_the_contract() -> None:
    names = [one.name for one in suite_run.scenarios(2, 20, 0)]
    assert len(set(names)) == len(names)
    wanted = [f"kill-save.{point}-rank0" for point in saves.POINTS]
    wanted += [f"{kind}-collective-rank{rank}" for kind in ("kill", "stop") for rank in range(2)]
    wanted += [f"{s}-{p}" for s in ("term", "usr1", "int") for p in ("step", "evaluate", "data", "save.written")]
    wanted += [f"checkpoint-{damage}" for damage in ("bit-flip", "zero-page", "missing-file", "all-damaged")]
    wanted += ["disk-full", "disk-too-small", "save-fails-once", "save-fails-twice", "world-size", "workers"]
    wanted += [f"{kind}-{policy}" for kind in ("nan", "spike") for policy in ("stop", "skip", "rewind")]
    wanted += [f"shard-{damage}" for damage in shards.DAMAGES] + ["two-jobs", "config-changed", "tokenizer-changed"]
    assert set(wanted) <= set(names) and "random-kills" in names
    assert all("collective" not in one.name for one in suite_run.scenarios(1, 0, 0))


# -- what is judged


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Path, Path]:
    """The same run twice, with two checkpoints each."""
    for name in ("one", "other"):
        for step in (1, 2):
            saves.save(tmp_path / name, step, keep=2)
        (tmp_path / name / "export").mkdir()
        (tmp_path / name / "export/model.safetensors").write_bytes(b"weights")
    return tmp_path / "one", tmp_path / "other"


def test_runs_that_ended_alike_do_not_differ(two_runs: tuple[Path, Path]) -> None:
    assert judge.difference(*two_runs) == "" and judge.distance(*two_runs) == 0
    assert judge.whole(two_runs[0]) == [2, 1]


def test_another_bit_another_order_another_step_and_another_export_are_differences(two_runs: tuple[Path, Path]) -> None:
    one, other = two_runs
    (other / "export/model.safetensors").write_bytes(b"weighty")
    assert judge.difference(one, other) == "the exports differ"
    tensors = saves.content(2)
    tensors["model/weight"].view(-1)[3:4].view(dtype=saves.torch.int32).bitwise_xor_(1)
    saves.checkpoints(other).save(2, tensors, {"order": "o2"}, wait=True)
    assert "model/weight differs" in judge.difference(one, other)
    saves.checkpoints(other).save(2, saves.content(2), {"order": "another"}, wait=True)
    assert judge.difference(one, other) == "saw other samples"
    shutil.rmtree(other / "checkpoints/step-00000002")
    assert judge.difference(one, other) == "ended at step 2, not 1"


@pytest.mark.parametrize("damage", storage.DAMAGES)
def test_every_damage_to_a_checkpoint_is_one(two_runs: tuple[Path, Path], damage: str) -> None:
    storage.DAMAGES[damage][1](two_runs[0] / "checkpoints/step-00000002")
    assert judge.whole(two_runs[0]) == [1]


@pytest.mark.parametrize("damage", shards.DAMAGES)
def test_every_damage_to_a_shard_changes_it(damage: str) -> None:
    members = [(f"{key}.{end}", data) for key, parts in shards.samples(32) for end, data in parts.items()]
    content, lost = shards.DAMAGES[damage][1](members)
    assert content != shards.tar(members) and set(lost) <= {shards.key_of(name) for name, _ in members}


def outcome(text: str, code: int = 0, status: str = "") -> Outcome:
    return Outcome(code, text, 1.0, status)


def test_errors_are_counted_and_those_of_torchrun_are_not() -> None:
    noise = "E1122 18:37:51.654000 31297 torch/x/api.py:1002] failed (exitcode: 2) local_rank: 0\n"
    error = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"
    trace = f"Traceback (most recent call last):\n  File x\n{error}:\n"
    found = outcome(f"mm: error: a\nmm: resuming\nrank 1: ValueError: b\n{noise}{trace}")
    assert found.errors == ["mm: error: a", "rank 1: ValueError: b"] and found.tracebacks == 0
    assert outcome("Traceback (most recent call last):\n" + trace).tracebacks == 1
    assert found.line("exitcode") == "failed (exitcode: 2) local_rank: 0"
    assert outcome("resuming after step 8").resumed == 8 and outcome("").resumed == 0
    with pytest.raises(Wrong, match="no line says 'spike'"):
        found.line("spike")


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    suite = prepare(CONFIG, [], tmp_path / "out", 1, lambda line: None)
    return Stage(suite, "a fault", 1)


@pytest.mark.parametrize(
    ("text", "code", "problem"),
    [
        ("mm: error: free some", 0, "ended with 0, not 2"),
        ("mm: error: free some\nmm: error: again", 2, "2 error lines"),
        ("Traceback (most recent call last):\nmm: error: free some", 2, "1 tracebacks"),
        ("mm: error: other", 2, "says nothing of 'free'"),
        ("", 2, "0 error lines"),
    ],
)
def test_a_run_that_is_refused_in_another_way_is_wrong(stage: Stage, text: str, code: int, problem: str) -> None:
    assert stage.refused(outcome("mm: error: free some", 2), "free") == "mm: error: free some"
    with pytest.raises(Wrong, match=problem):
        stage.refused(outcome(text, code), "free")


def resume(stage: Stage, monkeypatch: pytest.MonkeyPatch, step: int, end: Path) -> Finding:
    """Going on, where the next start says that it resumed after `step`, and the uninterrupted run is `end`."""
    monkeypatch.setattr(stage, "train", lambda: outcome(f"resuming after step {step}", 0, "finished 2"))
    monkeypatch.setattr(stage.suite, "reference", lambda processes: end)
    return stage.goes_on("killed", expected=2)


def test_going_on_from_an_older_checkpoint_or_to_another_end_is_wrong(
    stage: Stage, two_runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.run, other = two_runs
    assert resume(stage, monkeypatch, 2, other) == Finding("killed", resumed=2, lost=0)
    with pytest.raises(Wrong, match="went on from step 1, and step 2 was whole"):
        resume(stage, monkeypatch, 1, other)
    (other / "export/model.safetensors").write_bytes(b"weighty")
    with pytest.raises(Wrong, match="the exports differ"):
        resume(stage, monkeypatch, 2, other)
    storage.DAMAGES["bit-flip"][1](stage.run / "checkpoints/step-00000002")
    with pytest.raises(Wrong, match="newest whole checkpoint is of step 1, not 2"):
        resume(stage, monkeypatch, 1, other)


def test_a_fault_that_went_wrong_is_a_row_and_does_not_end_the_suite(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(stage: Stage) -> Finding:
        raise Wrong("the weights differ")

    def good(stage: Stage) -> Finding:
        return Finding(f"a line of {stage.run}", resumed=4, lost=1)

    monkeypatch.setattr(Suite, "reference", lambda self, processes: self.out)
    wanted = [Scenario("bad", "something", bad, 1), Scenario("good", "another thing", good, 2)]
    rows = suite_run.run(stage.suite, wanted, lambda row, number: None)
    found = table.result(rows, 1.0)
    assert found["failed"] == 1 and [row["ok"] for row in found["faults"]] == [False, True]
    assert found["faults"][0]["verdict"] == "failed: the weights differ"
    assert "BAD something" in table.text(rows) and "2 faults: 1 as they should be, 1 not" in table.text(rows)
    line = "| good | another thing (2 processes) | a line of RUN | step 4, 1 step again |"
    assert line in table.markdown(found)


# -- what is refused


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--run.steps", "8"], "run.steps = 8: faults need"),
        (["--checkpoint.every", "1"], "checkpoint.every = 1"),
        (["--data.batch_size", "15"], "data.batch_size"),
    ],
)
def test_a_config_without_room_for_faults_is_refused(tmp_path: Path, flags: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        prepare(CONFIG, flags, tmp_path / "out", 2, lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else"):
        prepare(CONFIG, [], tmp_path, 1, lambda line: None)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_unknown_fault_is_refused_with_the_nearest() -> None:
    known = suite_run.scenarios(2, 20, 0)
    assert [one.name for one in suite_run.chosen(known, ["nan", "disk-full"])] == [
        "disk-full",
        "nan-stop",
        "nan-skip",
        "nan-rewind",
    ]
    with pytest.raises(ConfigError, match="did you mean disk-full?"):
        suite_run.chosen(known, ["disk-ful1"])
