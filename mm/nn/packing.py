"""Ragged sequences without their padding: linear layers see real tokens only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_kernels import Ragged


def layout(mask: Tensor) -> Ragged:
    """The packing of the real tokens, the first ones of each row, of mask `[B, L]`.

    It has as many rows as there are real tokens, rounded up to a multiple of an eighth of the power of two below: at
    most an eighth is wasted, batches of one kind give one or two numbers of rows, and little is compiled twice.
    """
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    tokens = int(offsets[-1])
    step = 1 << max(0, tokens.bit_length() - 4)
    return Ragged.of(offsets, mask.shape[1], -(-tokens // step) * step)
