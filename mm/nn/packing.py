"""Ragged sequences without their padding: linear layers see real tokens only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_kernels import Ragged


def span(mask: Tensor, step: int = 16) -> int:
    """Columns of mask `[B, L]` up to the last real token of any row, rounded up to a multiple of `step`, at most L.

    What follows is padding in every row. Few numbers are possible, so that little is compiled twice.
    """
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = int((places * mask).max()) if mask.numel() else 0
    return min(mask.shape[1], -(-max(last, 1) // step) * step)


def layout(mask: Tensor) -> Ragged:
    """The packing of the real tokens of mask `[B, L]`, in order, wherever in a row they are.

    It has as many rows as there are real tokens, rounded up to a multiple of an eighth of the power of two below: at
    most an eighth is wasted, batches of one kind give one or two numbers of rows, and little is compiled twice.
    """
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    found = mask.flatten().nonzero()[:, 0]
    step = 1 << max(0, len(found).bit_length() - 4)
    rows = -(-len(found) // step) * step
    kept = torch.arange(rows, device=mask.device) < len(found)
    slot = (mask.flatten().cumsum(0) - 1).clamp_min(0)
    return Ragged(offsets, mask, slot, F.pad(found, (0, rows - len(found))), kept)
