"""`torch.ops.mm.contrastive_loss`: the tiled loss as one operator that torch.compile and torch.export see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from mm_kernels.contrastive_loss.chunked import loss_and_gradients
from mm_kernels.contrastive_loss.exchange import Ranks


@torch.library.custom_op("mm::contrastive_loss", mutates_args=())
def contrastive_loss_op(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    kind: str,
    chunk: int,
    group: str,
    ring: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The value, and its derivatives with respect to image, text, scale and bias, of size 0 without `gradients`.

    The derivatives are made here, while tiles are at hand, and stay float32 until the backward pass has multiplied
    them: float16 would lose them without a loss scale. `chunk`: a tile's edge, 0 for the default; `group`: a process
    group's name, "" for one process.
    """
    ranks = None
    if group:
        members = distributed_c10d._resolve_process_group(
            distributed_c10d.GroupName(group)
        )  # as torch's collectives do
        ranks = Ranks.of(members, len(image), image.device) if members.size() > 1 else None
    common = torch.promote_types(image.dtype, text.dtype)
    image, text = (x.to(common).contiguous() for x in (image, text))
    with torch.autocast(image.device.type, enabled=False):
        result = loss_and_gradients(image, text, logit_scale, logit_bias, kind, chunk, ranks, ring, gradients)
    value, by_image, by_text, by_scale, by_bias = result
    none = value.new_empty(0)
    if by_image is None or by_text is None or by_scale is None or by_bias is None:
        return value, none, none.clone(), none.clone(), none.clone()
    by_bias = none if logit_bias is None else by_bias.view_as(logit_bias)
    return value, by_image, by_text, by_scale.view_as(logit_scale), by_bias


@contrastive_loss_op.register_fake
def _(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    kind: str,
    chunk: int,
    group: str,
    ring: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)

    def like(tensor: Tensor | None) -> Tensor:
        return image.new_empty(tensor.shape if gradients and tensor is not None else (0,), dtype=wide)

    return image.new_empty((), dtype=wide), like(image), like(text), like(logit_scale), like(logit_bias)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    derivatives = output[1:]
    ctx.mark_non_differentiable(*derivatives)
    ctx.save_for_backward(*derivatives)
    ctx.types = [None if tensor is None else tensor.dtype for tensor in inputs[:4]]
    ctx.gradients = inputs[-1]


def backward(ctx: Any, by_value: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.gradients:
        raise RuntimeError("contrastive_loss ran without gradients: its inputs asked for none")
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "contrastive_loss has no second derivative for this batch size: it is computed in tiles"
        )
    saved = zip(ctx.saved_tensors, ctx.types, strict=True)
    return *(None if kind is None else (tensor * by_value).to(kind) for tensor, kind in saved), *(None,) * 5


contrastive_loss_op.register_autograd(backward, setup_context=keep)
