"""Processes that train together and stay: many small runs for one start of torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mm.distributed.world import World, joined
from mm.nn.sharded import own_part
from runs import ROOT, records, state

if TYPE_CHECKING:
    from mm.training.trainer import Trainer

STEPS = 6  # unless a test asks for more
PATIENCE = 100  # seconds that a job may take


class Team:
    """So many gloo processes on one machine, one thread each; call it with a function of the world."""

    def __init__(self, size: int) -> None:
        context = get_context("forkserver")  # torch is imported once, in a process without threads
        context.set_forkserver_preload(["mm.training.loop", "mm.evaluation.callbacks"])
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes, self._members = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_member, args=(rank, size, self._store.port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._members.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any, **variables: str) -> list[Any]:
        """What `function(world, *arguments)` returned in each process, by rank, or the text of what it raised.

        `variables` are in the environment meanwhile.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments, variables))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(PATIENCE), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        return answers

    def train(self, *flags: str, **variables: str) -> list[str]:
        """Train configs/debug.py with these flags; how it ended, by rank: `finished STEP`, or `ERROR: its text`."""
        return self(training, flags, **variables)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._members:
            process.join(10)
            process.kill()


def _member(rank: int, size: int, port: int, pipe: Connection) -> None:
    from mm.training import prepare

    prepare.matrix_rate = lambda *_: 1e9  # type: ignore[assignment] # measuring takes seconds, and only mfu follows from it
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), PATIENCE / 2) as world:
        while (job := pipe.recv()) is not None:
            function, arguments, variables = job
            with _environment(variables):
                try:
                    answer = function(world, *arguments)
                except Exception as error:
                    answer = f"{type(error).__name__}: {error}"
            pipe.send(answer)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    os.environ |= variables
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def training(world: World, flags: tuple[str, ...]) -> str:
    """One run in these processes."""
    from mm import config as settings
    from mm.evaluation.callbacks import callbacks
    from mm.training.loop import run

    config = settings.override(settings.load(ROOT / "configs/debug.py"), ["--parallel.threads", "1", *flags])
    settings.validate(config)
    return f"finished {run(config, lambda config: [*callbacks(config), Sharding()], world=world)['step']}"


class Sharding:
    """`own/RANK`: numbers that each process holds, of parameters, averages and moments; `all`: that there are.

    `helpers`: the processes that share the optimizer's work.
    """

    every = 0

    def part(self, context: Trainer) -> tuple[int, int]:
        moments = [tensor for tensor in context.optimizers.state().values() if tensor.ndim]
        held = [*context.ema.named.values(), *context.ema.average.values(), *moments]
        return sum(own_part(tensor).numel() for tensor in held), sum(tensor.numel() for tensor in held)

    def whole(self, context: Trainer, parts: list[tuple[int, int]]) -> dict[str, float]:
        helpers = float(getattr(context.optimizers.all[-1], "world", World()).size)
        return {f"own/{rank}": float(own) for rank, (own, _) in enumerate(parts)} | {
            "all": float(parts[0][1]),
            "helpers": helpers,
        }


class Trained:
    """Finished runs, each made once: `trained(processes, *flags)` is its folder."""

    def __init__(self, shards: Path, runs: Path) -> None:
        self.shards, self.runs = shards, runs
        self._teams: dict[int, Team] = {}
        self._made: dict[tuple[Any, ...], Path] = {}

    def team(self, processes: int) -> Team:
        """The processes, started when they are first wanted."""
        if processes not in self._teams:
            self._teams[processes] = Team(processes)
        return self._teams[processes]

    def start(self, processes: int, run: Path, *flags: str, **variables: str) -> list[str]:
        """Train in this folder, or go on there; how it ended, by rank.

        A checkpoint is made at the end, and at no other step unless `flags` say so.
        """
        always = ["--data.train", f"{self.shards}/train-*.tar", "--run.dir", str(run), "--run.steps", str(STEPS)]
        return self.team(processes).train(*always, "--checkpoint.every", "0", *flags, **variables)

    def __call__(self, processes: int, *flags: str) -> Path:
        case = (processes, *flags)
        if case not in self._made:
            run = self.runs / str(len(self._made))
            ended = self.start(processes, run, *flags)
            assert all(end.startswith("finished") for end in ended), ended
            self._made[case] = run
        return self._made[case]

    def close(self) -> None:
        for team in self._teams.values():
            team.close()


def distance(one: Path, other: Path) -> float:
    """Of two runs' weights, as one vector: difference over length; or of their averages, where more."""
    a, b = state(one), state(other)
    found = []
    for kind in ("model/", "ema/"):
        names = [name for name in a if name.startswith(kind) and a[name].is_floating_point()]
        assert names and all(name in b for name in names)
        ours, theirs = (torch.cat([tensors[name].flatten().double() for name in names]) for tensors in (a, b))
        found.append(float((ours - theirs).norm() / ours.norm()))
    return max(found)


def apart(one: Path, other: Path, name: str) -> float:
    """The largest relative difference of a number of metrics.jsonl over the steps of two runs, which are the same."""
    a, b = records(one), records(other)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    return max(abs(x[name] - y[name]) / abs(x[name]) for x, y in zip(a, b, strict=True))


def orders(run: Path) -> list[str]:
    """What the run says of the samples of its steps."""
    return [line["order"] for line in records(run)]
