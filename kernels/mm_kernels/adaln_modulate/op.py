"""`mm::adaln_modulate` as torch sees it: the op with fake and gradient, and the function with a forward-mode rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_kernels import forward_mode
from mm_kernels.adaln_modulate import reference
from mm_kernels.runtime import use_triton


@torch.library.custom_op("mm::adaln_modulate", mutates_args=())
def adaln_modulate_op(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.forward`, contiguous, but without a residual h is empty; shift, scale, gate are `[B, D]` exactly.

    Raises NotImplementedError under forward-mode derivatives.
    """
    forward_mode.refuse("adaln_modulate")
    if use_triton(x):
        from mm_kernels.adaln_modulate import launch

        return launch.forward(x, shift, scale, gate, residual, eps)
    out, h = reference.forward(x, shift, scale, gate, residual, eps)
    return out.contiguous(), h.new_empty(0) if residual is None else h.contiguous()


@adaln_modulate_op.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    kind = reference.type_of_h(x, gate, residual)
    return shift.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape, dtype=kind)


@torch.library.custom_op("mm::adaln_modulate_backward", mutates_args=())
def adaln_modulate_backward_op(
    grad: Tensor, grad_h: Tensor | None, h: Tensor, x: Tensor | None, scale: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.backward`, contiguous; raises NotImplementedError under forward-mode derivatives."""
    forward_mode.refuse("adaln_modulate_backward")
    if use_triton(h):
        from mm_kernels.adaln_modulate import launch

        return launch.backward(grad, grad_h, h, x, scale, gate, eps)
    dh, dx, dshift, dscale, dgate = reference.backward(grad, grad_h, h, x, scale, gate, eps)
    return dh.contiguous(), dx.contiguous(), dshift, dscale, dgate


@adaln_modulate_backward_op.register_fake
def _(
    grad: Tensor, grad_h: Tensor | None, h: Tensor, x: Tensor | None, scale: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = h.new_empty(0) if x is None or gate is None else x.new_empty(x.shape)
    dgate = h.new_empty(0) if x is None or gate is None else gate.new_empty(gate.shape)
    return h.new_empty(h.shape), like, scale.new_empty(scale.shape), scale.new_empty(scale.shape), dgate


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, scale, gate, residual, ctx.eps = inputs
    h = x if residual is None else output[1]
    ctx.types = x.dtype, shift.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(h, None if gate is None else x, scale, gate)


def _backward(ctx: Any, grad: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
    h, x, scale, gate = ctx.saved_tensors
    of_x, of_shift, of_residual = ctx.types
    grad = h.new_zeros(h.shape, dtype=of_shift) if grad is None else grad
    if of_residual is None:
        dh, _, dshift, dscale, _ = adaln_modulate_backward_op(grad, None, h, None, scale, None, ctx.eps)
        return dh, dshift.to(of_shift), dscale, None, None, None
    dh, dx, dshift, dscale, dgate = adaln_modulate_backward_op(grad, grad_h, h, x, scale, gate, ctx.eps)
    if gate is None:
        return dh.to(of_x), dshift.to(of_shift), dscale, None, dh.to(of_residual), None
    return dx, dshift.to(of_shift), dscale, dgate, dh.to(of_residual), None


adaln_modulate_op.register_autograd(_backward, setup_context=_setup_context)


class AdalnModulate(torch.autograd.Function):
    """The Triton form of the op with a forward-mode rule; its tangent has no backward of its own."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        from mm_kernels.adaln_modulate import launch

        return launch.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)  # None, not zeros, for what does not move
        x, shift, scale, gate, residual, _ = inputs
        ctx.save_for_forward(x, shift, scale, gate, residual, output[1])

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        *inputs, h = ctx.saved_tensors
        x, _, scale, gate, residual = inputs
        moves = [
            None if primal is None else forward_mode.moved(tangent, primal)
            for tangent, primal in zip(tangents, inputs, strict=False)
        ]
        return Tangent.apply(x if residual is None else h, x, scale, gate, *moves, ctx.eps)


class Tangent(torch.autograd.Function):
    """The tangent, which may be used but not differentiated: few-step objectives stop its gradient."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        from mm_kernels.adaln_modulate import launch

        return launch.tangent(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError("the tangent of adaln_modulate has no backward: detach it")
