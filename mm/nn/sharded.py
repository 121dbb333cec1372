"""The part of a sharded tensor that lies in this process. Models and objectives know no more than this of sharding."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


@torch.no_grad()
def own_part(tensor: Tensor) -> Tensor:
    """This process' part of a sharded tensor (a DTensor), in the same memory; any other tensor itself."""
    local = getattr(tensor, "to_local", None)
    return tensor.detach() if local is None else cast("Tensor", local())


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered from all processes, which must all ask; any other tensor itself."""
    full = getattr(tensor, "full_tensor", None)
    return tensor.detach() if full is None else cast("Tensor", full())
