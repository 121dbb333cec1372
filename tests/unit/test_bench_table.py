"""The table of `make bench`: results, marks and failures in it, and that README shows a file's own numbers."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_spec = importlib.util.spec_from_file_location("bench_table", ROOT / "tools" / "bench" / "_table.py")
assert _spec is not None and _spec.loader is not None
_table = importlib.util.module_from_spec(_spec)  # by its path: other names there are also names of tests' helpers
_spec.loader.exec_module(_table)
BEGIN, END = _table.BEGIN, _table.END
in_readme, markdown, reached = _table.in_readme, _table.markdown, _table.reached

FASTER = {"name": "a", "what": "a step", "against": "open_clip, compiled", "ours": 34.2, "peer": 20.0, "ratio": 1.71}
FASTER |= {"unit": "images/s", "mark": 1.7, "better": "higher"}
SHARE = {"name": "b", "what": "… share", "ours": 0.5, "unit": "of 400 GFLOP/s", "mark": 0.52, "better": "higher"}


def test_a_result_is_held_against_its_mark() -> None:
    assert reached(FASTER) is True and reached({**FASTER, "ratio": 1.69}) is False
    assert reached(SHARE) is False and reached({**SHARE, "better": "lower"}) is True
    assert reached({**FASTER, "mark": 0}) is None


def test_the_table_says_what_failed_and_what_was_missed() -> None:
    failed = {"what": "joint_step", "error": "losses | differ"}
    lines = markdown([FASTER, SHARE, failed]).splitlines()
    assert lines[2] == "| a step | 34.2 images/s | 20 (open_clip, compiled) | **1.71×** | ≥ 1.7× | reached |"
    assert lines[3] == "| … share | **0.5** of 400 GFLOP/s | | | ≥ 0.52 | **missed** |"
    assert lines[4] == "| joint_step | | | failed: losses / differ | | |"
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_only_what_is_between_the_comments_changes(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    in_readme(readme, "| new |", "x.json")
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "| new |" in text and "(benchmarks/x.json)" in text
    readme.write_text("no place")
    with pytest.raises(ValueError, match="no place for the table"):
        in_readme(readme, "", "x.json")


def test_readme_shows_the_numbers_of_the_file_that_it_names() -> None:
    block = (ROOT / "README.md").read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    named = re.search(r"\(benchmarks/([^)]+)\)", block)
    assert named is not None
    rows = json.loads((ROOT / "benchmarks" / named[1]).read_text(encoding="utf-8"))["results"]
    assert markdown(rows) in block


def test_a_wrong_name_is_one_line() -> None:
    command = [sys.executable, str(ROOT / "tools" / "bench"), "--only", "train_stp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "train_stp: must be of train_step" in done.stderr and "Traceback" not in done.stderr
