"""Sequences of unequal length, packed one after another or padded to one length, and the way between the two."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm_kernels import forward_mode


class Ragged(NamedTuple):
    """Where the tokens of B sequences lie: packed `[T, ...]`, and padded `[B, L, ...]`.

    Rows of the packed form after the last sequence only fill up.
    """

    offsets: Tensor  # [B + 1] int32: where each sequence begins, and where the last one ends
    real: Tensor  # [B, L] bool: False for padding
    slot: Tensor  # [B * L] int64: the packed row of each position; of padding, some row
    place: Tensor  # [T] int64: the position, an index into B * L, of each packed row; of those that fill up, 0
    kept: Tensor  # [T] bool: False for the rows that fill up

    @classmethod
    def of(cls, offsets: Tensor, longest: int, rows: int) -> Ragged:
        """Sequences that begin at `offsets` `[B + 1]`, of at most `longest` tokens, in `rows` packed rows."""
        start, end = offsets[:-1].long(), offsets[1:].long()
        near = torch.arange(longest, device=offsets.device)
        real = near < (end - start)[:, None]
        slot = (start[:, None] + near).where(real, 0).flatten()
        row = torch.arange(rows, device=offsets.device)
        if start.shape[0] == 0 or longest == 0:
            return cls(offsets, real, slot, torch.zeros_like(row), torch.zeros_like(row, dtype=torch.bool))
        sequence = torch.searchsorted(end, row, right=True)
        kept = (sequence < start.shape[0]) & (row >= start[0])
        at = sequence.clamp(max=start.shape[0] - 1)
        return cls(offsets, real, slot, (at * longest + row - start.index_select(0, at)).where(kept, 0), kept)

    def longest(self, step: int = 16) -> int:
        """Tokens of the longest sequence, rounded up so that few lengths are compiled for, at most L; read back."""
        found = int(self.offsets.diff().max()) if len(self.offsets) > 1 else 0
        return min(-(-max(found, 1) // step) * step, self.real.shape[1])

    def pack(self, x: Tensor) -> Tensor:
        """`[T, ...]` from `[B, L, ...]`, zero in the rows that fill up."""
        return _taken(x.flatten(0, 1), self.place, self.kept, self.slot, self.real.flatten())

    def pad(self, x: Tensor) -> Tensor:
        """`[B, L, ...]` from `[T, ...]`, zero where there is padding."""
        return _taken(x, self.slot, self.real.flatten(), self.place, self.kept).unflatten(0, tuple(self.real.shape))


def _taken(x: Tensor, index: Tensor, keep: Tensor, inverse: Tensor, wanted: Tensor) -> Tensor:
    """Row `index[i]` of x at i where `keep[i]`, else zero; `inverse` and `wanted` say the same of the way back."""
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], *x.shape[1:]) + x.sum()  # which is 0, and keeps x in the graph
    if forward_mode.active():  # torch.compile takes no autograd.Function that has a forward-mode rule
        return _rows(x, index, keep)
    taken: Tensor = _Rows.apply(x, index, keep, inverse, wanted)
    return taken


def _rows(x: Tensor, index: Tensor, keep: Tensor) -> Tensor:
    return x.index_select(0, index).masked_fill(~keep.view(-1, *[1] * (x.ndim - 1)), 0)


class _Rows(torch.autograd.Function):
    """Rows by index. Each is taken at most once, so that the gradient is a gather too, not a scatter."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, keep: Tensor, inverse: Tensor, wanted: Tensor) -> Tensor:
        return _rows(x, index, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, keep, inverse, wanted = inputs
        ctx.save_for_backward(index, keep, inverse, wanted)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        index, keep, inverse, wanted = ctx.saved_tensors
        if gradient.shape[0] == 0:
            return gradient.new_zeros(wanted.shape[0], *gradient.shape[1:]), None, None, None, None
        return _taken(gradient, inverse, wanted, index, keep), None, None, None, None
