"""The torch form of norm and modulation, and its gradients written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_kernels import forward_mode


def forward(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(modulated norm of h, h), where h = residual + gate * x; without a residual h is x itself."""
    if residual is not None:
        x = residual + (x if gate is None else gate[:, None] * x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if forward_mode.active():  # the gradient of a tangent of torch's layer norm is wrong, up to torch 2.14 at least
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        normed = (wide - mean) * torch.rsqrt(variance + eps)
    else:
        normed = F.layer_norm(wide, wide.shape[-1:], eps=eps)
    return (normed * (1 + scale[:, None]) + shift[:, None]).to(shift.dtype), x


def type_of_h(x: Tensor, gate: Tensor | None, residual: Tensor | None) -> torch.dtype:
    """What torch makes of residual + gate * x, or of x alone."""
    kind = x.dtype
    for other in (gate, residual):
        kind = kind if other is None or residual is None else torch.promote_types(kind, other.dtype)
    return kind


def backward(
    grad: Tensor, grad_h: Tensor | None, h: Tensor, x: Tensor | None, scale: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of h, gate * x, shift, scale and gate; the second and the last are empty without a gate.

    `grad` is that of the result, `grad_h` that of the returned h, x the branch that the gate multiplies.
    """
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    grad = grad.to(wide.dtype)
    centred = wide - wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = centred * inverse
    inner = grad * (1 + scale[:, None])
    dh = inverse * (inner - inner.mean(-1, keepdim=True) - normed * (inner * normed).mean(-1, keepdim=True))
    if grad_h is not None:
        dh = dh + grad_h
    dshift, dscale = grad.sum(1), (grad * normed).sum(1)
    if gate is None or x is None:
        return dh.to(h.dtype), h.new_empty(0), dshift.to(scale.dtype), dscale.to(scale.dtype), h.new_empty(0)
    dgate = (dh * x).sum(1).to(gate.dtype)
    dx = (gate[:, None] * dh).to(x.dtype)
    return dh.to(h.dtype), dx, dshift.to(scale.dtype), dscale.to(scale.dtype), dgate
