"""Ragged sequences without their padding: linear layers see real tokens only.

A batch `[B, L, D]` with a mask becomes `[T, D]`, T being the number of real tokens rounded up to the next fifth of
B L, so that batches of one shape give few values of T and little is compiled twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where each token of a packed batch lies in the padded one, and the other way round."""

    place: Tensor  # [T] int64: index into B * L of each packed token; 0 for the rows that only fill up
    real: Tensor  # [T] bool: False for those rows
    slot: Tensor  # [B * L] int64: index into T of each position; 0 for padding
    mask: Tensor  # [B, L] bool: False for padding

    def pack(self, x: Tensor) -> Tensor:
        """`[T, ...]` from `[B, L, ...]`."""
        return _Gather.apply(x.flatten(0, 1), self.place, self.slot, self.mask.flatten())

    def unpack(self, x: Tensor) -> Tensor:
        """`[B, L, ...]` from `[T, ...]`; padding holds arbitrary rows, whose gradient is taken to be zero."""
        return _Gather.apply(x, self.slot, self.place, self.real).unflatten(0, tuple(self.mask.shape))


def layout(mask: Tensor) -> Layout:
    """The layout of the real tokens of mask `[B, L]`."""
    flat = mask.flatten()
    found = flat.nonzero()[:, 0]
    bucket = -(-len(flat) // 5)
    size = -(-len(found) // bucket) * bucket
    place = torch.zeros(size, dtype=torch.int64, device=mask.device)
    place[: len(found)] = found
    real = torch.arange(size, device=mask.device) < len(found)
    slot = torch.zeros(len(flat), dtype=torch.int64, device=mask.device)
    slot[found] = torch.arange(len(found), device=mask.device)
    return Layout(place, real, slot, mask)


class _Gather(torch.autograd.Function):
    """Rows by `index`. Each row that matters is taken once, so that the gradient is a gather too, not a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, keep)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, keep = ctx.saved_tensors
        found = gradient.index_select(0, inverse)
        return found * keep.view(-1, *[1] * (found.ndim - 1)), None, None, None
