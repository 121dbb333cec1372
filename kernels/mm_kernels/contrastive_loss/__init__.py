"""InfoNCE (CLIP) and sigmoid (SigLIP) losses over all pairs of a batch, without a matrix of all its logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mm_kernels import forward_mode
from mm_kernels.contrastive_loss.op import contrastive_loss_op
from mm_kernels.contrastive_loss.reference import contrastive_loss_reference
from mm_kernels.runtime import use_triton

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SMALL = 1024  # pairs: up to here all logits at once are as fast on a CPU, and torch.compile can fuse them


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    kind: str = "softmax",
    group: ProcessGroup | None = None,
    chunk: int | None = None,
    ring: bool = False,
) -> Tensor:
    """A scalar, float32 or wider, from unit-norm image, text `[N, E]` and the factor `logit_scale` `[1]` (an exp).

    softmax: mean of both directions of InfoNCE over the N rows (arXiv 2103.00020). sigmoid: the sum over all pairs
    divided by N (arXiv 2303.15343); `logit_bias` `[1]` is added to the logits. `chunk`: the edge of the square of
    logits that is held at a time; None chooses it, and takes all N × N for small batches on a CPU.

    With `group` the batch is the rows of all its processes, which may have different numbers of them. A process' value
    is (processes / N) × the sum over its own rows, and its gradients are processes × the derivatives of the whole
    batch's loss: for embeddings with respect to its own rows, for scale and bias its rows' part. So plain means over
    processes, which is what DistributedDataParallel takes of parameters' gradients, are value and gradients of one
    process with the whole batch. Embeddings are gathered in their own type, gradients never; `ring` (sigmoid only)
    passes texts and their gradients round instead, in memory that does not grow with the number of processes.

    There is no second derivative, no forward-mode one and no `torch.func.grad`, except for small batches on a CPU.
    Raises ValueError for another kind, unequal or empty shapes, a scale or bias that is not one number, a chunk below 1
    and a ring for softmax; NotImplementedError for tangents.
    """
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f'kind = "{kind}": choose "softmax" or "sigmoid"')
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"image {tuple(image.shape)}, text {tuple(text.shape)}: both must be [N, E]")
    for name, number in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if number is not None and (not isinstance(number, Tensor) or number.numel() != 1):
            raise ValueError(f"{name} = {number!r}: must be a tensor of one number, [1]")
    if ring and kind == "softmax":
        raise ValueError('ring = True: softmax needs statistics over all rows first; leave it out or choose "sigmoid"')
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk = {chunk}: a tile has at least one row")
    if group is None:
        if image.shape[0] == 0:
            raise ValueError("no pairs: the mean over them is not defined")
        if chunk is None and image.shape[0] <= SMALL and not use_triton(image):
            return contrastive_loss_reference(image, text, logit_scale, logit_bias, kind)
    inputs = [tensor for tensor in (image, text, logit_scale, logit_bias) if tensor is not None]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs if forward_ad._current_level >= 0):
        raise NotImplementedError("contrastive_loss in tiles has no forward-mode derivative")
    forward_mode.refuse_functorch("contrastive_loss in tiles", f"it, or at most {SMALL:,} pairs on a CPU")
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    name = "" if group is None else group.group_name
    return contrastive_loss_op(image, text, logit_scale, logit_bias, kind, chunk or 0, name, ring, gradients)[0]
