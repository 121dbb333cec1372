"""Starts that differ from the one before: other processes, other workers, another config, two at once."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

from mm.chaos import judge
from mm.chaos.launch import Wrong
from mm.chaos.suite import RIGHT, Finding, Scenario, Stage

CLOSE = 1e-4  # of a tensor's largest value: processes share sums out differently, and float32 has 24 bits
SAME_ORDER = "same samples in the same order"


def scenarios(processes: int) -> Iterator[Scenario]:
    """Resumes that may differ, and those that must be refused."""
    if processes > 1:
        where = f"stopped by TERM twice, and resumed on {processes}, 1, {processes} processes"
        yield Scenario("world-size", where, _world_size, processes)
    yield Scenario("workers", "killed twice, and resumed with data.workers = 0, 2, 0", _workers, 1)
    yield Scenario("two-jobs", "a second job in the same run folder", _two_jobs, 1)
    yield Scenario("config-changed", "optim.lr changed between save and resume", _config, 1)
    yield Scenario("tokenizer-changed", "two tokens swapped in tokenizer.json between save and resume", _tokenizer, 1)


def _world_size(stage: Stage) -> Finding:
    suite, many = stage.suite, stage.processes
    first, second = suite.middle, 2 * suite.every + 1
    stage.train(f"term:step@step={first},rank=0", processes=many).line("stopped by signal 15")
    alone = stage.train(f"term:step@step={second}", processes=1)
    last = stage.done(stage.train(processes=many))
    if (alone.resumed, last.resumed) != (first, second):
        raise Wrong(f"went on from the steps {alone.resumed} and {last.resumed}, not {first} and {second}")
    reference = suite.reference(many)
    if judge.order(stage.run) != judge.order(reference):
        raise Wrong("saw other samples, or in another order, than the uninterrupted run")
    if (distance := judge.distance(stage.run, reference)) > CLOSE:
        raise Wrong(f"the weights differ by {distance:.1e} of their largest value, over {CLOSE:.0e}")
    seen = last.line("resuming after step")
    return Finding(seen, f"{SAME_ORDER}; weights within {distance:.0e} of their largest value", second, 0)


def _workers(stage: Stage) -> Finding:
    suite = stage.suite
    stage.train(f"kill:step@step={suite.middle}", "--data.workers", "0")
    step = 2 * suite.every + 1
    stage.train(f"kill:step@step={step}", "--data.workers", "2")
    if not stage.happened(f"kill:step@step={step}"):
        raise Wrong(f"did not come to step {step} with two workers")
    newest, reached = judge.whole(stage.run)[0], judge.reached(stage.run)
    last = stage.done(stage.train("", "--data.workers", "0"))
    stage.ends_like(suite.reference(1))
    return Finding(last.line("resuming after step"), RIGHT, newest, reached - newest)


def _two_jobs(stage: Stage) -> Finding:
    suite = stage.suite
    with stage.start(f"stall:step@step={suite.middle},for=1") as first:
        first.until(lambda: stage.happened("stall"), f"come to step {suite.middle}")
        first.signal(signal.SIGSTOP)  # it stays where it is until the second one has answered
        seen = stage.refused(stage.train(), "another process is training there")
        first.signal(signal.SIGCONT)
        stage.done(first.wait())
    stage.ends_like(suite.reference(1))
    return Finding(seen, f"the second was refused; the first: {RIGHT}")


def _config(stage: Stage) -> Finding:
    suite = stage.suite
    stage.copy(suite.stopped())
    outcome = stage.train("", "--optim.lr", str(2 * suite.config.optim.lr))
    seen = stage.refused(outcome, rf"optim\.lr: {suite.config.optim.lr} -> {2 * suite.config.optim.lr}")
    return stage.goes_on(seen, expected=2 * suite.every)


def _tokenizer(stage: Stage) -> Finding:
    suite = stage.suite
    if suite.config.model.text.tokenizer != "corpus":
        return Finding("", "does not apply: CLIP's tokenizer is not in the run folder")
    stage.copy(suite.stopped())
    path = stage.run / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content), encoding="utf-8")
    seen = stage.refused(stage.train(), "changed since step-.* was saved")
    path.write_text(text, encoding="utf-8")
    return stage.goes_on(seen, expected=2 * suite.every)
