"""Layer norm without weights, then a shift and a scale that depend on the sample (adaLN, arXiv 2212.09748)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def adaln_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(x) * (1 + scale) + shift for x `[B, N, D]` and shift, scale `[B, D]`, in the type of shift.

    With `gate` `[B, D]` and `residual` `[B, N, D]`, the gated branch is first added: h = residual + gate * x, and the
    pair (modulated norm of h, h) is returned.
    """
    if residual is not None:
        x = residual + (x if gate is None else gate[:, None] * x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = F.layer_norm(wide, wide.shape[-1:], eps=eps)
    out = (normed * (1 + scale[:, None]) + shift[:, None]).to(shift.dtype)
    return out if residual is None else (out, x)
