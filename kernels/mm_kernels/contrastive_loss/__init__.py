"""InfoNCE (CLIP) and sigmoid (SigLIP) losses over all pairs of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None, kind: str = "softmax"
) -> Tensor:
    """A scalar from unit-norm image, text `[N, E]` and the factor `logit_scale` `[1]` (already exponentiated).

    softmax: mean of both directions of InfoNCE over the N rows (arXiv 2103.00020). sigmoid: the sum over all pairs
    divided by N (arXiv 2303.15343); `logit_bias` `[1]` is added to the logits. Raises ValueError for another kind.
    """
    wide = torch.promote_types(image.dtype, torch.float32)
    with torch.autocast(image.device.type, enabled=False):  # bf16 is off by 0.2 in a logit at scale 100
        logits = logit_scale * (image.to(wide) @ text.to(wide).T)  # [N, N]
    if logit_bias is not None:
        logits = logits + logit_bias
    if kind == "softmax":
        diagonal = logits.diagonal()
        return ((logits.logsumexp(1) + logits.logsumexp(0)) / 2 - diagonal).mean()
    if kind == "sigmoid":
        labels = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
        return F.softplus(-labels * logits).sum() / len(logits)
    raise ValueError(f'kind = "{kind}": choose "softmax" or "sigmoid"')
