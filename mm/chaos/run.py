"""The whole suite: every scenario after the other, each judged, none of them leaving anything behind."""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence

from mm.chaos import folder, numbers, stops, storage
from mm.chaos.launch import Wrong
from mm.chaos.suite import Finding, Scenario, Stage, Suite
from mm.chaos.table import Row
from mm.config import ConfigError
from mm.fields import suggestion


def scenarios(processes: int, kills: int, seed: int) -> list[Scenario]:
    """All faults, in the order in which they are tried; `kills` at random moments, drawn from `seed`."""
    control = Scenario("nothing", "nothing: two uninterrupted runs", _nothing, processes)
    rooms = (stops, storage, numbers, folder)
    return [control, *(one for room in rooms for one in room.scenarios(processes))]


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
    for processes in dict.fromkeys(one.processes for one in wanted):
        suite.reference(processes)
    rows = []
    for number, scenario in enumerate(wanted, 1):
        begun, problem, finding = time.monotonic(), "", None
        stage = Stage(suite, scenario.name, scenario.processes)
        try:
            finding = scenario.run(stage)
            if not suite.needed(stage.run):
                shutil.rmtree(stage.run, ignore_errors=True)
        except (Wrong, OSError, ValueError, AssertionError, subprocess.SubprocessError) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
        rows.append(Row(scenario, finding, problem, time.monotonic() - begun))
        told(rows[-1], number)
    return rows


def _nothing(stage: Stage) -> Finding:
    """Without this, no other comparison means anything: the same command twice gives the same bits."""
    outcome = stage.done(stage.train())
    stage.ends_like(stage.suite.reference(stage.processes))
    return Finding(outcome.line(r"^step .* 0 s left"))
