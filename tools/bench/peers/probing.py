"""What every probe shares: it runs in its library's own environment, is told what to do, and writes down what it saw.

`python probe_X.py REQUEST`: REQUEST is JSON (see `Request`); to the file `out` goes a line of JSON a batch, at once, so
that a probe that hangs has told how far it came, and a last line with what went wrong and what was said.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

_MOST = 400  # batches: a stream that does not end by itself is cut here


@dataclass
class Request:
    """One pass of one process; rank and world are in the environment, as torchrun sets them."""

    out: str
    do: str = "read"  # or "each": all folders of `data` one after the other, whatever becomes of them; or
    #   "convert" to `to`; or "poison": write to `to` a data set that makes the file `marker`
    data: list[str] = field(default_factory=list)  # folders; several are mixed by `weights`
    to: str = ""
    marker: str = ""
    weights: list[float] = field(default_factory=list)
    batch: int = 20  # global
    workers: int = 0
    seed: int = 7
    seeded: bool = False  # webdataset: its other shuffle, detshuffle, which takes a seed
    stop: int = 0  # batches after which the state is written to `save`; 0: the whole epoch
    save: str = ""
    resume: str = ""

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", 0))

    @property
    def world(self) -> int:
        return int(os.environ.get("WORLD_SIZE", 1))

    @property
    def rows(self) -> int:
        return self.batch // self.world

    @property
    def state(self) -> Any:
        """What was saved, or None; pickled by this very tool."""
        return pickle.loads(Path(self.resume).read_bytes()) if self.resume else None


class Pass(NamedTuple):
    """An epoch: sample numbers, a batch at a time; its state after the batch just given; what it reported itself."""

    batches: Iterable[list[int]]
    state: Callable[[], Any] | None = None
    said: Callable[[], list[str]] = list


def samples(shards: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Number, image bytes and caption of every sample, for those that have to convert them."""
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in sorted(members):
            if name.endswith(".jpg"):
                key = name.removesuffix(".jpg")
                yield {"number": int(key), "jpg": members[name], "txt": members[f"{key}.txt"].decode()}


def shards_of(folder: str) -> list[str]:
    return sorted(map(str, Path(folder).glob("*.tar")))


class Payload:
    """Pickled it is a call of `open`, so that whoever unpickles it makes an empty file: harmless, and plain to see."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return io.open, (self.marker, "w")


def torchrun() -> None:
    """What a training script does first under torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import torch.distributed

        torch.distributed.init_process_group("gloo")


class _Said(logging.Handler):
    """Warnings and log lines, from the level of a warning up, since they were last taken."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.caught = caught
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def take(self) -> list[str]:
        lines = self.lines + [str(warning.message) for warning in self.caught]
        self.lines = []
        self.caught.clear()
        return [" ".join(line.split())[:300] for line in lines]


def serve(read: Callable[[Request], Pass], **others: Callable[[Request], None]) -> None:
    """Does what the command line asks; what a library raises is written down, for that is what is asked here."""
    request = Request(**json.loads(sys.argv[1]))
    with open(request.out, "w") as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for category in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)  # Python shows these to nobody
        said = _Said(caught)

        def tell(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        error = ""
        if request.do == "each":
            for folder in request.data:
                numbers: list[int] = []
                error = _read(read, replace(request, data=[folder]), numbers.extend, said)
                tell(each={"folder": folder, "numbers": numbers, "error": error, "said": said.take()})
            error = ""
        elif request.do == "read":
            error = _read(read, request, lambda batch: tell(batch=batch), said)
        else:
            error = _caught(lambda: others[request.do](request))
        tell(end={"error": error, "said": said.take()})


def _read(read: Callable[[Request], Pass], request: Request, give: Callable[[list[int]], object], said: _Said) -> str:
    def all_of_it() -> None:
        epoch = read(request)
        try:
            for count, batch in enumerate(epoch.batches, 1):
                give(batch)
                if request.save and count == request.stop and request.rank == 0 and epoch.state is not None:
                    Path(request.save).write_bytes(pickle.dumps(epoch.state()))
                if count == (request.stop or _MOST):
                    break
        finally:
            said.lines += epoch.said()

    return _caught(all_of_it)


def _caught(work: Callable[[], None]) -> str:
    try:
        work()
    except Exception as error:  # any: it is the answer
        text = f"{type(error).__name__}: {error}".strip()
        if "Original Traceback" in text:  # from a worker of torch's DataLoader: the error is its last line
            text = text.splitlines()[-1]
        return " ".join(text.split()).rstrip(":")[:500]
    return ""
