"""The loss as its formula says, with all N × N logits: small batches on a CPU, and what the tiled forms are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss_reference(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None, kind: str = "softmax"
) -> Tensor:
    """A scalar from image, text `[N, E]`: see `mm_kernels.contrastive_loss`. At least float32, also inside autocast."""
    wide = torch.promote_types(image.dtype, torch.float32)
    with torch.autocast(image.device.type, enabled=False):  # bf16 is off by 0.2 in a logit at scale 100
        logits = logit_scale * (image.to(wide) @ text.to(wide).T)  # [N, N]
    if logit_bias is not None:
        logits = logits + logit_bias
    if kind == "softmax":
        diagonal = logits.diagonal()
        return ((logits.logsumexp(1) + logits.logsumexp(0)) / 2 - diagonal).mean()
    labels = 2 * torch.eye(logits.shape[0], device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / logits.shape[0]  # softplus is a straight line above 20
