"""Ragged sequences without their padding: linear layers see real tokens only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mm_kernels import Ragged


def layout(mask: Tensor) -> Ragged:
    """The packing of the real tokens, the first ones of each row, of mask `[B, L]`.

    It has as many rows as there are real tokens, rounded up to a multiple of L sqrt(B) / 2: that is a few standard
    deviations of their number, so that batches of one shape give few numbers of rows and little is compiled twice.
    """
    lengths = mask.sum(1)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    step = max(1, round(mask.shape[1] * math.sqrt(mask.shape[0]) / 2))
    return Ragged.of(offsets, mask.shape[1], -(-int(offsets[-1]) // step) * step)
