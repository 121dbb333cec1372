"""Numbers that are none, and a loss far above the others, in one process of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from mm.chaos import judge
from mm.chaos.launch import Outcome, Wrong
from mm.chaos.suite import Finding, Scenario, Stage

KINDS = {"nan": "a loss that is no number", "spike": "a loss 1,000 times too large"}
SETTING = {"nan": "health.nonfinite", "spike": "health.spike"}


def scenarios(processes: int) -> Iterator[Scenario]:
    """Each kind under each policy."""
    for kind, what in KINDS.items():
        for policy, run in (("stop", _stop), ("skip", _skip), ("rewind", _rewind)):
            where = f"{what}, in rank {processes - 1} alone, {SETTING[kind]} = {policy}"
            yield Scenario(f"{kind}-{policy}", where, partial(run, kind), processes)


def _stop(kind: str, stage: Stage) -> Finding:
    outcome = _train(kind, "stop", stage)
    seen = stage.refused(outcome, rf"step {stage.suite.middle}: loss = .* samples \S+")
    _named(kind, stage)
    return stage.goes_on(seen)


def _skip(kind: str, stage: Stage) -> Finding:
    """The step changes no weight, and everything after it happens as ever."""
    seen = stage.done(_train(kind, "skip", stage)).line("left out")
    _named(kind, stage)
    left_out = [record["step"] for record in judge.records(stage.run) if record.get("left_out")]
    if left_out != [stage.suite.middle]:
        raise Wrong(f"left out the steps {left_out}")
    reference = stage.suite.reference(stage.processes)
    if judge.order(stage.run) != judge.order(reference):
        raise Wrong("saw other samples than the uninterrupted run")
    if not judge.difference(stage.run, reference):
        raise Wrong("left nothing out: the weights are those of the uninterrupted run")
    stage.suite.keep(f"{kind}-skip", stage)
    return Finding(seen, "finished without that step; same samples in the same order")


def _rewind(kind: str, stage: Stage) -> Finding:
    """Back to the checkpoint and past the step: the same weights as where it was left out at once."""
    outcome = stage.done(_train(kind, "rewind", stage))
    seen = outcome.line("back to the newest checkpoint")
    _named(kind, stage)
    other = stage.suite.kept(f"{kind}-skip", stage.processes, partial(_skip, kind))
    stage.ends_like(other)
    every = stage.suite.every
    return Finding(seen, f"bitwise the run under {SETTING[kind]} = skip", every, stage.suite.middle - 1 - every)


def _train(kind: str, policy: str, stage: Stage) -> Outcome:
    suite = stage.suite
    stage.flags += [f"--{SETTING[kind]}", policy, "--health.spike_window", str(suite.every)]
    stage.flags += ["--health.spike_factor", "10"]
    return stage.train(f"{kind}:step@step={suite.middle},rank={stage.processes - 1}")


def _named(kind: str, stage: Stage) -> None:
    """Raises Wrong unless health.jsonl names the step and the samples, of a loss that is no number those to blame."""
    events = [json.loads(line) for line in (stage.run / "health.jsonl").read_text(encoding="utf-8").splitlines()]
    if [event["step"] for event in events] != [stage.suite.middle]:
        raise Wrong(f"health.jsonl has {events}")
    ranks = {sample["rank"] for sample in events[0]["samples"] if sample["key"] and sample["shard"]}
    expected = {stage.processes - 1} if kind == "nan" else set(range(stage.processes))
    if ranks != expected:
        raise Wrong(f"health.jsonl names samples of the processes {sorted(ranks)}, not {sorted(expected)}")
