"""What a step allocates and computes, seen operation by operation on tensors that have no data."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Of memory, in the order in which a plan lists them.
KINDS = ("parameters", "gradients", "optimizer", "ema", "activations", "temporary", "communication")

Hidden = Callable[..., tuple[int, int]]  # an operation's arguments -> bytes and FLOPs of what happens inside it


class Tracker(TorchDispatchMode):
    """Bytes alive by kind and their highest sum, and FLOPs, of everything that runs inside.

    A storage counts as of the `kind` set when it was made, until it dies. Workspaces inside an operation are not seen,
    but for those of `hidden`. FLOPs are those of torch's own formulas, by `phase`; what runs with gradients recorded
    during "backward" is activation checkpointing, and counted as "recompute".
    """

    def __init__(self, hidden: dict[Any, Hidden] | None = None) -> None:
        super().__init__()
        self.kind, self.phase = "parameters", "setup"
        self.hidden = hidden or {}
        self.live: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._known: dict[int, tuple[Any, list[Any]]] = {}  # storage -> its weak reference, and [kind, bytes]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # only asks a tensor about itself
            return out
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        packet = func._overloadpacket
        if packet in self.hidden:
            extra, flops = self.hidden[packet](*args, **kwargs)
            self._highest(self.total + extra, {"communication": extra})
            self.flops[self.phase] += flops
        elif packet in flop_registry:
            # a custom operator's forward runs without gradients recorded, and in a backward only as part of a forward
            forward = torch.is_grad_enabled() or packet == torch.ops.mm.attention
            phase = "recompute" if self.phase == "backward" and forward else self.phase
            self.flops[phase] += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    def count(self, tensors: Iterable[Tensor | None], kind: str | None) -> None:
        """From now on the tensors are of this kind; with None they are not counted at all."""
        for tensor in tensors:
            assert tensor is not None
            self._see(tensor)
            entry = self._known[tensor.untyped_storage()._cdata][1]
            self._add(entry[0], -entry[1])
            if kind is None:
                entry[1] = 0
            else:
                entry[0] = kind
                self._add(kind, entry[1])

    def forget_peak(self) -> None:
        """Begin to look for the highest sum anew."""
        self.peak, self.at_peak = self.total, dict(self.live)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        entry: list[Any] = [self.kind, storage.nbytes()]

        def gone(_: Any) -> None:
            del self._known[key]
            self._add(entry[0], -entry[1])

        self._known[key] = (weakref.ref(storage, gone), entry)
        self._add(entry[0], entry[1])

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] += size
        self.total += size
        if self.total > self.peak:
            self._highest(self.total, {})

    def _highest(self, total: int, extra: dict[str, int]) -> None:
        if total > self.peak:
            self.peak = total
            self.at_peak = dict(Counter(self.live) + Counter(extra))
