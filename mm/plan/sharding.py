"""A rank's share of parameters, and when it holds more than that: what DDP and FSDP2 allocate, without processes.

torch's `fully_shard` takes minutes for a thousand ranks even on tensors without data, so its shards are computed (each
parameter cut along its first dimension, the first rank's part rounded up) and its buffers allocated where it does so:
a block's parameters are gathered before its forward, freed after it, gathered again before its backward while those of
the next are on their way, and its gradients are reduced and scattered once they are complete. A test holds this to
what torch's own tracker says of the real `fully_shard`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mm.config import ConfigError
from mm.distributed.parallelize import blocks
from mm.plan.hardware import GPUS_PER_MACHINE

if TYPE_CHECKING:
    from mm.config import ParallelConfig
    from mm.plan.tracker import Tracker


@dataclass(frozen=True)
class Layout:
    """`gpus` ranks in groups of `shard` that hold one copy of the model together."""

    gpus: int
    shard: int

    @property
    def copies(self) -> int:
        """How many whole models there are."""
        return self.gpus // self.shard


def layout_of(config: ParallelConfig, gpus: int) -> Layout:
    """How `gpus` ranks share the model. Raises ConfigError where groups of `parallel.shard` do not come out even."""
    if config.strategy == "ddp":
        return Layout(gpus, 1)
    if config.strategy == "fsdp":
        return Layout(gpus, gpus)
    shard = config.shard or min(gpus, GPUS_PER_MACHINE)
    if gpus % shard:
        raise ConfigError(f"parallel.shard = {shard}: {gpus} GPUs are no multiple of it; try a divisor of {gpus}")
    return Layout(gpus, shard)


class Shards(nn.Module):
    """Stands for the first rank's parts of a module's parameters, under their names."""

    def __init__(self, module: nn.Module, ranks: int) -> None:
        super().__init__()
        self.parts = {name: _part(p, ranks) for name, p in module.named_parameters()}

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.parts.items()

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield from self.parts.values()


def _part(parameter: Tensor, ranks: int) -> nn.Parameter:
    shape = (ceil(parameter.shape[0] / ranks), *parameter.shape[1:])
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=parameter.requires_grad)


class Group:
    """Parameters that are gathered and reduced together: those of a block, or all that are in none."""

    def __init__(self, named: dict[str, nn.Parameter]) -> None:
        self.named = named
        self.trained = {name: p for name, p in named.items() if p.requires_grad}
        self.elements = sum(p.numel() for p in named.values())
        self.flat: Tensor | None = None  # while it is gathered
        self.whole: Tensor | None = None  # once it is
        self.arrived = 0  # gradients


class FullyShard:
    """Hooks on a module that allocate what FSDP2 does; `micro_batches` backward passes make one gradient."""

    def __init__(self, module: nn.Module, shards: Shards, tracker: Tracker, reshard: bool, micro_batches: int) -> None:
        self.shards, self.tracker, self.reshard, self.micro_batches = shards, tracker, reshard, micro_batches
        self.traffic: Counter[str] = Counter()  # bytes of whole tensors: all_gather, reduce_scatter
        self.last: Tensor | None = None  # buffer of the last all-gather of a forward
        self.sent: Tensor | None = None  # buffer of the last reduce-scatter
        names = {p: name for name, p in module.named_parameters()}
        self.order: list[Group] = []
        for block in blocks(module):
            group = Group({names[p]: p for p in block.parameters()})
            self._attach(block, group)
            self.order.append(group)
        inside = {p for group in self.order for p in group.named.values()}
        self.root = Group({name: p for p, name in names.items() if p not in inside})
        module.register_forward_hook(lambda *_: setattr(self.root, "whole", None))
        for p in self.root.trained.values():
            p.register_post_accumulate_grad_hook(lambda p: tracker.count([p.grad], "gradients"))

    def _attach(self, block: nn.Module, group: Group) -> None:
        block.register_forward_pre_hook(lambda *_: self._before_forward(group))
        block.register_forward_hook(lambda _, __, out: self._after_forward(group, out))
        for p in group.trained.values():
            p.register_post_accumulate_grad_hook(lambda p: self._gradient(group, p))

    def _fetch(self, group: Group) -> None:
        """Start the all-gather: its buffer, in which the parameters do not lie as they are used."""
        if group.whole is not None or group.flat is not None or not group.elements:
            return
        dtype = next(iter(group.named.values())).dtype
        group.flat = self._buffer(group.elements, dtype)
        self.traffic["all_gather"] += group.elements * dtype.itemsize

    def _gather(self, group: Group) -> None:
        """Wait for it, and copy the parameters out. In a forward the buffer stays until the next one is there."""
        self._fetch(group)
        if group.flat is not None:
            self.last = None
            group.whole = self._buffer(group.elements, group.flat.dtype)
            self.last = group.flat if self.tracker.phase != "backward" else None
            group.flat = None

    def _buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        kind, self.tracker.kind = self.tracker.kind, "communication"
        made = torch.empty(elements, dtype=dtype)
        self.tracker.kind = kind
        return made

    def _before_forward(self, group: Group) -> None:
        self._gather(self.root)
        if self.tracker.phase != "backward":  # there it is a block that is computed again
            self._gather(group)

    def _after_forward(self, group: Group, out: Any) -> None:
        if self.tracker.phase == "backward":
            return
        if self.reshard:
            group.whole = None
        for tensor in out if isinstance(out, tuple) else (out,):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self._before_backward(group))

    def _before_backward(self, group: Group) -> None:
        self._gather(self.root)
        self._gather(group)
        place = self.order.index(group)
        if place and not group.arrived % max(1, len(group.trained)):  # fetched while this one is computed
            self._fetch(self.order[place - 1])

    def _gradient(self, group: Group, parameter: Tensor) -> None:
        self.tracker.count([parameter.grad], "gradients")
        group.arrived += 1
        if group.arrived % len(group.trained) == 0:
            group.whole = None
        if group.arrived == len(group.trained) * self.micro_batches:
            self._reduce(group)

    def _reduce(self, group: Group) -> None:
        self.sent = self._buffer(sum(p.numel() for p in group.trained.values()), torch.float32)
        self.traffic["reduce_scatter"] += self.sent.numel() * 4
        kind, self.tracker.kind = self.tracker.kind, "gradients"
        for name, p in group.trained.items():
            p.grad = None
            self.shards.parts[name].grad = torch.empty_like(self.shards.parts[name])
        self.tracker.kind = kind

    def finish(self) -> None:
        """The end of the backward pass: what belongs to no block is reduced, and no buffer stays."""
        for group in (*self.order, self.root):
            if group is self.root or group.arrived < len(group.trained) * self.micro_batches:
                self._reduce(group)
            group.whole, group.arrived = None, 0
        self.last = self.sent = None
