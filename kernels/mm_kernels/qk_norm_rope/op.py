"""`mm::qk_norm_rope` as torch sees it: the op with fake and gradient, and the function with a forward-mode rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_kernels import forward_mode
from mm_kernels.qk_norm_rope import reference
from mm_kernels.runtime import use_triton


@torch.library.custom_op("mm::qk_norm_rope", mutates_args=())
def qk_norm_rope_op(
    q: Tensor,
    k: Tensor,
    wq: Tensor,
    wk: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`reference.forward`, contiguous; raises NotImplementedError under forward-mode derivatives."""
    forward_mode.refuse("qk_norm_rope")
    if use_triton(q):
        from mm_kernels.qk_norm_rope import launch

        return launch.forward(q, k, wq, wk, cos, sin, positions, eps)
    out_q, out_k = reference.forward(q, k, wq, wk, cos, sin, positions, eps)
    return out_q.contiguous(), out_k.contiguous()


@qk_norm_rope_op.register_fake
def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("mm::qk_norm_rope_backward", mutates_args=())
def qk_norm_rope_backward_op(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    wq: Tensor,
    wk: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.backward`, contiguous; raises NotImplementedError under forward-mode derivatives."""
    forward_mode.refuse("qk_norm_rope_backward")
    if use_triton(q):
        from mm_kernels.qk_norm_rope import launch

        return launch.backward(grad_q, grad_k, q, k, wq, wk, cos, sin, positions, eps)
    dq, dk, dwq, dwk = reference.backward(grad_q, grad_k, q, k, wq, wk, cos, sin, positions, eps)
    return dq.contiguous(), dk.contiguous(), dwq, dwk


@qk_norm_rope_backward_op.register_fake
def _(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), wq.new_empty(wq.shape), wk.new_empty(wk.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    if any(ctx.needs_input_grad[4:6]):
        raise NotImplementedError("cos and sin take no gradient in a kernel: detach them")
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, *_ = saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    grad_q, grad_k = forward_mode.moved(grad_q, q), forward_mode.moved(grad_k, k)
    grads = qk_norm_rope_backward_op(grad_q, grad_k, *saved, ctx.eps)
    return *grads, None, None, None, None


qk_norm_rope_op.register_autograd(_backward, setup_context=_setup_context)


class QkNormRope(torch.autograd.Function):
    """The Triton form of the op with a forward-mode rule; its tangent has no backward of its own."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        from mm_kernels.qk_norm_rope import launch

        return launch.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)  # None, not zeros, for what does not move
        ctx.save_for_forward(*inputs[:-1])

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        if tangents[4] is not None or tangents[5] is not None:
            raise NotImplementedError("cos and sin take no tangent in a kernel: detach them")
        saved = ctx.saved_tensors
        moves = [forward_mode.moved(tangent, primal) for tangent, primal in zip(tangents, saved[:4], strict=False)]
        return Tangent.apply(*saved[:4], *moves, *saved[4:], ctx.eps)


class Tangent(torch.autograd.Function):
    """The tangent, which may be used but not differentiated: few-step objectives stop its gradient."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        from mm_kernels.qk_norm_rope import launch

        return launch.tangent(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError("the tangent of qk_norm_rope has no backward: detach it")
