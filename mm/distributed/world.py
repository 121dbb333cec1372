"""The processes of a run: which one this is, and how all of them agree.

What is decided (stop, save, skip, walk back) is decided by all processes together, over a group of its own on the CPU
(gloo), so that nothing on a GPU waits for it. In one process every function here answers at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mm.config import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`; `local_rank` of the `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: dist.ProcessGroup | None = None  # on the CPU, for agreement; None in one process
    saving: dist.ProcessGroup | None = None  # the same for the thread that writes checkpoints

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def total(self, numbers: Sequence[int]) -> list[int]:
        """The sums over all processes."""
        return self._reduced(torch.tensor(numbers, dtype=torch.int64), dist.ReduceOp.SUM)

    def most(self, numbers: Sequence[float]) -> list[float]:
        """The largest of each number over all processes."""
        return self._reduced(torch.tensor(numbers, dtype=torch.float64), dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.most([float(flag)])[0] > 0

    def gather(self, item: Any) -> list[Any]:
        """Every process' item, by rank. Small things only: they are pickled, between processes of one run."""
        if self.control is None:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def share(self, item: Any) -> Any:
        """The item of process 0."""
        if self.control is None:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def lead(self, function: Callable[[], T]) -> T:
        """What `function` returns in process 0, which alone calls it; what it raises there is raised in all."""
        found: list[Any] = [None, None]
        if self.main:
            try:
                found[0] = function()
            except (ValueError, OSError) as error:
                if self.control is None:
                    raise
                found[1] = error
        found = self.share(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def in_turn(self, function: Callable[[], T]) -> T:
        """What `function` returns in each process: first in process 0, so that the others find what it leaves."""
        made: list[T] = []
        self.lead(lambda: made.append(function()))
        return made[0] if made else function()

    def _reduced(self, numbers: torch.Tensor, how: Any) -> list[Any]:
        if self.control is not None:
            dist.all_reduce(numbers, op=how, group=self.control)
        return numbers.tolist()


def awaited(work: dist.Work | None) -> None:
    """Wait for a collective, in a frame whose name says so: torch's own leaves none for the watchdog to see."""
    if work is not None:
        work.wait()


@contextlib.contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[World]:
    """The world that torchrun describes in the environment; its process groups end with the block, unless it raises."""
    size = expected()
    if size == 1:
        yield World()
        return
    wait = timedelta(seconds=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=wait, device_id=device if device.type == "cuda" else None)
    # the first process may index shards for hours; who is dead closes its connection, who hangs the watchdog names
    control, saving = (dist.new_group(backend="gloo", timeout=timedelta(days=1)) for _ in range(2))
    assert isinstance(control, dist.ProcessGroup) and isinstance(saving, dist.ProcessGroup)
    yield World(dist.get_rank(), size, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1), control, saving)
    dist.destroy_process_group()  # not after an error: the others may never come


def expected() -> int:
    """How many processes there are to be. Raises ConfigError where the environment says so and no more."""
    size = _number("WORLD_SIZE", 1)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size > 1 and missing:
        raise ConfigError(f"WORLD_SIZE = {size}, but {', '.join(missing)} is not set; start with torchrun")
    return size


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"{name} = {text!r}: must be a number; torchrun sets it")
    return int(text)
