"""Ragged sequences without their padding: linear layers see real tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_kernels import Ragged


def layout(mask: Tensor) -> Ragged:
    """The packing of the real tokens, the first ones of each row, of mask `[B, L]`.

    It has as many rows as there are real tokens, rounded up to the next sixteenth of B L (the next whole position of
    the batch where L < 16), so that batches of one shape give few numbers of rows and little is compiled twice.
    """
    lengths = mask.sum(1)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    step = max(1, mask.shape[0] * -(-mask.shape[1] // 16))
    return Ragged.of(offsets, mask.shape[1], -(-int(offsets[-1]) // step) * step)
