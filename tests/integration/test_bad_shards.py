"""Damaged shards through the commands that users type: trained around, listed, counted, or refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tars import END, header, member, members, png, sample, write

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.timeout(120)


class Marker:
    """Unpickled anywhere, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def train(run: Run, shards: Path, *more: str) -> subprocess.CompletedProcess[str]:
    flags = ["--run.dir", "run", "--run.steps", "4", "--run.log_every", "1", "--data.train", str(shards)]
    return run("-m", "mm.cli", "train", str(ROOT / "configs/debug.py"), *flags, *more)


def bad_samples(marker: Path) -> bytes:
    """Twelve samples of which nine can be used, and members that nobody may touch."""
    content = b"".join(sample(f"fine{number}", number) for number in range(9))
    content += member("fine0.pyd", pickle.dumps(Marker(marker))) + header("link.png", 0, b"2")
    content += member("noise.png", b"noise" * 99) + member("noise.txt", b"text")
    content += member("bytes.png", png()) + member("bytes.txt", b"\xff\xff")
    return content + member("../out.png", png()) + member("../out.txt", b"text") + END


@pytest.fixture
def damaged(tmp_path: Path, run_python: Run) -> Path:
    """Six shards: two whole, one cut since it was indexed, and three with damage of their own."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        write(folder / f"{number}.tar", members(40 * number))
    indexed = run_python("-m", "mm.cli", "shards", "index", str(folder))
    assert indexed.returncode == 0 and "indexed 3 shards, 120 samples" in indexed.stdout
    os.truncate(folder / "1.tar", (folder / "1.tar").stat().st_size * 3 // 4)
    (folder / "bad.tar").write_bytes(bad_samples(tmp_path / "marker"))
    (folder / "empty.tar").touch()
    (folder / "page.tar").write_text("<html>404</html>" * 99)
    return folder


def test_training_goes_around_damage_and_lists_it(damaged: Path, run_python: Run, tmp_path: Path) -> None:
    result = train(
        run_python, damaged, "--data.max_error_rate", "0.2", "--run.steps", "9"
    )  # 16 each: one epoch at least
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    found = {(Path(line["shard"]).name, line["key"]): line["reason"] for line in lines}
    assert found["empty.tar", ""] == "empty file" and found["page.tar", ""] == "no tar file"
    assert "cut at byte" in found["1.tar", ""]
    lost = [key for shard, key in found if shard == "1.tar" and key]
    assert len(lost) == 10 and "00079" in lost and all("cut at byte" in found["1.tar", key] for key in lost)
    assert "not a JPEG" in found["bad.tar", "noise"] and "not UTF-8" in found["bad.tar", "bytes"]
    assert found["bad.tar", "link"] == "no image" and found["bad.tar", "../out"] == "no image"
    assert len(lines) == 3 + 10 + 4 + 3  # three shards, their lost samples, the bad ones, and three members refused
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["unusable"] == len(lines) and metrics[0]["unusable"] >= len(lines) - 2
    assert not (tmp_path / "marker").exists()
    checked = run_python("-m", "mm.cli", "shards", "verify", str(damaged))
    assert checked.returncode == 1
    problems = {Path(line.split(": ")[0]).name: line for line in checked.stdout.splitlines() if ".tar: " in line}
    assert problems.keys() == {"1.tar", "empty.tar", "page.tar"}
    assert "10 samples lost (" in problems["1.tar"] and "3 with problems, 10 samples lost" in checked.stdout


def test_damage_over_the_limit_stops_the_run_with_the_counts(damaged: Path, run_python: Run) -> None:
    result = train(run_python, damaged)
    line = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "12 of 133 samples cannot be used, over data.max_error_rate = 0.05" in line
    assert "mend the shards or raise the limit" in line


def test_shards_with_nothing_usable_say_what_is_in_them(run_python: Run, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "0.tar").write_bytes(member("a.tiff", b"x") + member("a.cls", b"1") + member("/etc/b.png", png()) + END)
    (folder / "1.tar").touch()
    result = train(run_python, folder)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "none of 2 samples has an image (jpg, jpeg, png, webp) and a caption (txt)" in result.stderr
    assert "extensions seen: cls, png, tiff" in result.stderr and "b.png refused: name leaves" in result.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_one_bad_shard_does_not_keep_the_others_from_being_indexed(run_python: Run, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    (folder / "folder.tar").mkdir(parents=True)
    os.mkfifo(folder / "pipe.tar")
    (folder / "page.tar").write_text("<html>404</html>" * 99)
    for number in range(2):
        write(folder / f"{number}.tar", members(40 * number))
    for _ in range(2):  # and again, when the good ones are up to date
        result = run_python("-m", "mm.cli", "shards", "index", str(folder), timeout=30)
        assert result.returncode == 1 and not result.stderr
        for name in ("folder.tar", "pipe.tar"):
            assert f"{folder / name}: cannot be indexed: not a regular file" in result.stdout
        assert f"{folder / 'page.tar'}: no tar file" in result.stdout
    assert "3 were up to date" in result.stdout
    assert sorted(path.name for path in folder.glob("*.mmindex")) == [f"{n}.tar.mmindex" for n in ("0", "1", "page")]
    result = run_python("-m", "mm.cli", "shards", "verify", str(folder), timeout=30)
    assert result.returncode == 1 and result.stdout.count("cannot be read: not a regular file") == 2
    result = run_python("-m", "mm.cli", "shards", "verify", str(folder / "{0,1}.tar"), timeout=30)
    assert result.returncode == 0 and "nothing is wrong" in result.stdout
