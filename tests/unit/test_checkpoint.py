"""What a checkpoint folder keeps, and what comes of it when a save fails, is killed, or is damaged afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mm.config import ConfigError
from mm.data.index import Entry
from mm.training import manifest, writing
from mm.training.checkpoint import SaveFailed, preflight
from mm.training.metrics import LedgerFile
from saves import BEFORE, POINTS, checkpoints, content, names, save, state, whole

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Run = Callable[..., subprocess.CompletedProcess[str]]
TESTS = Path(__file__).resolve().parents[1]


def folder(run: Path, step: int) -> Path:
    return run / f"checkpoints/step-{step:08d}"


# -- what stays


def test_the_newest_are_kept_and_latest_names_one_of_them(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    assert whole(tmp_path, 3)


def test_every_so_many_steps_one_stays(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step, keep=1, keep_every=30)
    assert names(tmp_path) == ["step-00000030", "step-00000060", "step-00000070"]


def test_a_run_that_walked_back_keeps_what_it_saves_and_drops_the_damaged_one(tmp_path: Path) -> None:
    save(tmp_path, 100, keep=2)
    save(tmp_path, 200, keep=2)
    (folder(tmp_path, 200) / "state.json").write_bytes(b"damaged")
    save(tmp_path, 150, keep=1)
    assert names(tmp_path) == ["step-00000150"]
    assert (tmp_path / "latest").read_text() == "step-00000150\n"


def test_a_damaged_one_takes_no_whole_ones_place(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (folder(tmp_path, 3) / "state.json").write_bytes(b"damaged")
    run = checkpoints(tmp_path, keep=3)
    assert (run.newest() or pytest.fail()).step == 2
    run.save(4, content(4), {"order": ""}, wait=True)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000004"]
    for step in (3, 5):  # a run that goes on from step 2 comes to step 3 again, and that one is whole
        run.save(step, content(step), {"order": ""}, wait=True)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000005"]


def test_a_step_that_is_saved_again_replaces_the_former(tmp_path: Path) -> None:
    save(tmp_path, 100)
    (folder(tmp_path, 100) / "state.json").write_bytes(b"damaged")
    save(tmp_path, 100)
    assert names(tmp_path) == ["step-00000100"] and whole(tmp_path, 100)


def test_the_only_checkpoint_is_there_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.is_dir() and path.suffix == ".tmp":
            raise OSError(5, "stopped here")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(SaveFailed, match="step-00000001.old0 is still whole"):
            save(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001.old0"] and whole(tmp_path, 1)
    save(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"] and whole(tmp_path, 1)


def test_what_an_interrupted_save_left_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(folder(tmp_path, 1), tmp_path / "checkpoints/step-00000007.tmp")
    assert whole(tmp_path, 1)
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


# -- in the background


def test_what_is_saved_is_the_moment_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, write_tensors = threading.Event(), writing._write_tensors

    def late(*arguments: object) -> object:
        assert changed.wait(10)
        return write_tensors(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "_write_tensors", late)
    saved, tensors, scalars = checkpoints(tmp_path), content(1), {"order": "o1"}
    saved.save(1, tensors, scalars)
    for tensor in tensors.values():
        tensor.zero_()
    scalars["order"] = "later"
    changed.set()
    saved.finish()
    assert whole(tmp_path, 1)


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    order: list[str] = []
    saved = checkpoints(tmp_path)
    for step in (1, 2, 3):
        saved.save(step, content(step), {"order": f"o{step}"}, lambda step=step: order.append(f"written {step}"))
        order.append(f"returned {step}")
    saved.finish()
    assert order.index("written 1") < order.index("returned 2") and order.index("written 2") < order.index("returned 3")
    assert whole(tmp_path, 3)


@pytest.mark.parametrize("point", POINTS)
def test_an_error_in_the_background_is_told_and_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setenv("MM_FAULT", f"full:save.{point}@step=2")
    saved = checkpoints(tmp_path)
    saved.save(1, content(1), {"order": "o1"})
    saved.save(2, content(2), {"order": "o2"})
    with pytest.raises(SaveFailed, match=f"save.{point}, on purpose.: No space left on device.*is still whole"):
        saved.finish()
    assert saved.poll() == ""  # it was told
    saved.finish()
    assert whole(tmp_path, 1 if point in BEFORE else 2)
    saved.save(3, content(3), {"order": "o3"}, wait=True)
    assert whole(tmp_path, 3) and not manifest.leftovers(tmp_path)


def test_poll_tells_a_failure_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_FAULT", "error:save.written@step=1")
    saved = checkpoints(tmp_path)
    assert saved.poll() == ""
    saved.save(1, content(1), {})
    saved.save(2, content(2), {"order": "o2"}, wait=True)
    line = saved.poll()
    assert "step 1" in line and "there is no earlier one" in line and "\n" not in line
    assert saved.poll() == ""


def test_a_failed_export_fails_the_save(tmp_path: Path) -> None:
    def export() -> None:
        raise OSError(13, "Permission denied", "export")

    with pytest.raises(SaveFailed, match="export: Permission denied"):
        checkpoints(tmp_path, background=False).save(1, content(1), {}, export)
    assert names(tmp_path) == []


# -- killed

KILLED = """
import os, sys
from pathlib import Path
from saves import POINTS, checkpoints, content

def child(run, point, again):
    saved = checkpoints(run, keep=1)
    if again:
        saved.save(1, content(1), {"order": "o1"}, wait=True)
    os.environ["MM_FAULT"] = f"kill:save.{point}@step={1 if again else 3}"
    for step in range(1, 5):
        saved.save(step, content(step), {"order": f"o{step}"})
    saved.finish()

for again in (False, True):
    for point in POINTS:
        process = os.fork()
        if not process:
            child(Path(sys.argv[1], f"{point}-{again}"), point, again)
            os._exit(0)
        print(point, os.waitpid(process, 0)[1])
"""


@pytest.mark.timeout(120)
def test_killed_anywhere_in_a_save_a_whole_checkpoint_is_there(tmp_path: Path, run_python: Run) -> None:
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{KILLED}"
    done = run_python("-c", code, str(tmp_path))
    assert done.stdout.split() == [word for point in POINTS * 2 for word in (point, "9")], done.stderr
    for point in POINTS:
        run = tmp_path / f"{point}-False"  # killed in the save of step 3, with room for one checkpoint
        assert whole(run, 2 if point in BEFORE else 3), point
        save(run, 4, keep=1)
        assert names(run) == ["step-00000004"] and whole(run, 4), point
        again = tmp_path / f"{point}-True"  # killed where step 1, the only one, was saved once more
        assert whole(again, 1), point


# -- damaged afterwards


def flip(run: Path) -> str:
    path = folder(run, 2) / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return "__0_0.distcp: does not match its sha256"


def zero_a_page(run: Path) -> str:
    with open(folder(run, 2) / "__0_0.distcp", "r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))
    return "__0_0.distcp: does not match its sha256"


def truncate(run: Path) -> str:
    os.truncate(folder(run, 2) / "__0_0.distcp", 1000)
    return "__0_0.distcp: has 1000 bytes, not"


def lose(run: Path) -> str:
    (folder(run, 2) / ".metadata").unlink()
    return ".metadata: is missing"


def add(run: Path) -> str:
    (folder(run, 2) / "__1_0.distcp").write_bytes(b"of whom?")
    return "__1_0.distcp: is not in the manifest"


def swap_shards(run: Path) -> str:
    shutil.copy(folder(run, 1) / "__0_0.distcp", folder(run, 2) / "__0_0.distcp")
    return "__0_0.distcp: does not match its sha256"


def swap_metadata(run: Path) -> str:
    shutil.copy(folder(run, 1) / ".metadata", folder(run, 2) / ".metadata")
    return ".metadata: does not match its sha256"


def rename(run: Path) -> str:
    shutil.rmtree(folder(run, 2))
    shutil.copytree(folder(run, 1), folder(run, 2))
    return "manifest.json: is of step 1"


def link(run: Path) -> str:
    (folder(run, 2) / "state.json").rename(run / "elsewhere.json")
    (folder(run, 2) / "state.json").symlink_to(run / "elsewhere.json")
    return "state.json: is a link"


def break_manifest(run: Path) -> str:
    os.truncate(folder(run, 2) / "manifest.json", 100)
    return "manifest.json: is no manifest"


def lose_manifest(run: Path) -> str:
    (folder(run, 2) / "manifest.json").unlink()
    return "manifest.json: is missing"


def leave_the_folder(run: Path) -> str:
    text = (folder(run, 2) / "manifest.json").read_text()
    (folder(run, 2) / "manifest.json").write_text(text.replace('".metadata"', '"../step-00000001/.metadata"'))
    return "'../step-00000001/.metadata' is no file of a checkpoint"


def empty(run: Path) -> str:
    (folder(run, 2) / "manifest.json").write_text("[]")
    return "manifest.json: is no manifest"


DAMAGES = [
    flip, zero_a_page, truncate, lose, add, swap_shards, swap_metadata, rename, link, break_manifest, lose_manifest,
    leave_the_folder, empty,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_passed_over_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], str]
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    expected = damage(tmp_path)
    assert whole(tmp_path, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step-00000002 is damaged (") and expected in line


def test_nothing_is_started_anew_over_damaged_checkpoints(tmp_path: Path) -> None:
    assert checkpoints(tmp_path).newest() is None
    save(tmp_path, 1)
    (folder(tmp_path, 1) / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match="all 1 checkpoints are damaged"):
        checkpoints(tmp_path).newest()


# -- of another run, and no room


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found, tensors = state(tmp_path)
    saved = checkpoints(tmp_path)
    with pytest.raises(ConfigError, match="has no model/other"):
        saved.read(found, {"model/other": torch.empty(3)})
    with pytest.raises(ConfigError, match=r"model/weight is \[37, 5\] float32, and \[37, 6\] float32 is wanted"):
        saved.read(found, {**tensors, "model/weight": torch.empty(37, 6)})
    with pytest.raises(ConfigError, match=r"model/half is \[9\] bfloat16, and \[9\] float32 is wanted"):
        saved.read(found, {**tensors, "model/half": torch.empty(9)})


def test_a_part_can_be_read_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found, _ = state(tmp_path)
    part = {"model/half": torch.empty(9, dtype=torch.bfloat16)}
    checkpoints(tmp_path).read(found, part)
    assert torch.equal(part["model/half"], content(1)["model/half"])


def test_a_disk_without_room_is_refused_before_the_start(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    preflight(tmp_path, free // 4, keep=2)
    with pytest.raises(ConfigError, match=r"run.dir = .*\(3 of them, with checkpoint.keep = 2\) and .* is free"):
        preflight(tmp_path, free // 2, keep=2)
    save(tmp_path, 1)
    save(tmp_path, 2)
    preflight(tmp_path, free // 2, keep=2)  # two of the three are there
    with pytest.raises(ConfigError, match=r"a checkpoint needs [0-9.]+ GB and [0-9.]+ GB is free; free some"):
        preflight(tmp_path, 2 * free, keep=2)


FULL = """
import sys, torch
from pathlib import Path
from mm.training import manifest
from mm.training.checkpoint import SaveFailed
from saves import checkpoints, names, save, whole

run = Path(sys.argv[1])
save(run, 1)
large = {"x": torch.ones(3 << 20)}
for foresight in (True, False):
    if not foresight:
        manifest.preflight = lambda *_, **__: None
    try:
        checkpoints(run).save(2, large, {}, wait=True)
    except SaveFailed as error:
        print(error)
    assert names(run) == ["step-00000001"], names(run)
    assert whole(run, 1)
save(run, 3)
assert whole(run, 3)
"""


@pytest.mark.timeout(60)
def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    code = f"import sys; sys.path[:0] = {[str(TESTS), str(TESTS.parent), str(TESTS.parent / 'kernels')]!r}\n{FULL}"
    mounted = 'mount -t tmpfs -o size=8m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-m", "sh", "-c", mounted, "sh", str(tmp_path), sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stderr
    foreseen, met = done.stdout.splitlines()
    assert "a checkpoint needs 12.6 MB and" in foreseen and "step-00000001 is still whole" in foreseen
    assert "__0_0.distcp: No space left on device" in met and "step-00000001 is still whole" in met


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
