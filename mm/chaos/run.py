"""The whole suite: every scenario after the other, each judged, none of them leaving anything behind."""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from mm.chaos import folder, numbers, random_kills, shards, stops, storage
from mm.chaos.launch import Wrong
from mm.chaos.suite import Finding, Scenario, Stage, Suite
from mm.chaos.table import Row
from mm.config import ConfigError
from mm.fields import suggestion


def scenarios(processes: int, kills: int, seed: int) -> list[Scenario]:
    """All faults, in the order in which they are tried; `kills` at random moments, drawn from `seed`."""
    control = Scenario("nothing", "nothing: two uninterrupted runs", _nothing, processes)
    found = [one for room in (stops, storage, numbers, folder) for one in room.scenarios(processes)]
    return [control, *found, *shards.scenarios(), *random_kills.scenarios(processes, kills, seed)]


def chosen(found: Sequence[Scenario], patterns: Sequence[str]) -> list[Scenario]:
    """The scenarios whose name begins with, or is matched by, one of the patterns; all where there is none.

    Raises ConfigError for a pattern that names none.
    """
    kept = []
    for pattern in patterns:
        matching = [one for one in found if fnmatch.fnmatch(one.name, pattern) or one.name.startswith(pattern)]
        if not matching:
            hint = suggestion(pattern, [one.name for one in found]) or "; --faults list names them"
            raise ConfigError(f"--faults {pattern}: there is no such fault{hint}")
        kept += matching
    return [one for one in found if one in kept] if patterns else list(found)


def run(suite: Suite, wanted: Sequence[Scenario], told: Callable[[Row, int], None]) -> list[Row]:
    """A row for each scenario; `told(row, number)` as soon as it is known.

    The folder of a scenario that went well keeps what its runs said, and one that did not keeps everything.
    """
    suite.reference(wanted[0].processes)  # how long a run takes bounds all that follow
    rows = []
    for number, scenario in enumerate(wanted, 1):
        begun, problem, finding = time.monotonic(), "", None
        stage = Stage(suite, scenario.name, scenario.processes)
        try:
            finding = scenario.run(stage)
            finding = replace(finding, seen=_anywhere(finding.seen, stage))
            for path in stage.folder.iterdir():
                if path.is_dir() and not suite.needed(path):
                    shutil.rmtree(path)
        except (Wrong, OSError, ValueError, AssertionError, subprocess.SubprocessError) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
        rows.append(Row(scenario, finding, problem, time.monotonic() - begun))
        told(rows[-1], number)
    return rows


def _anywhere(line: str, stage: Stage) -> str:
    """A line without the paths of this machine."""
    for path, name in ((stage.run, "RUN"), (stage.suite.out, "OUT"), (sys.executable, "python")):
        line = line.replace(str(path), name)
    return line


def _nothing(stage: Stage) -> Finding:
    """Without this, no other comparison means anything: the same command twice gives the same bits."""
    outcome = stage.done(stage.train())
    stage.ends_like(stage.suite.reference(stage.processes))
    return Finding(outcome.line(r"^step .* 0 s left"))
