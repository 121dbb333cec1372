"""Layer norm without weights, then a shift and a scale that depend on the sample (adaLN, arXiv 2212.09748)."""

from __future__ import annotations

from torch import Tensor

from mm_kernels import forward_mode
from mm_kernels.adaln_modulate import reference
from mm_kernels.adaln_modulate.op import AdalnModulate, adaln_modulate_op
from mm_kernels.runtime import use_triton

__all__ = ["adaln_modulate"]


def adaln_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(x) * (1 + scale) + shift for x `[B, N, D]` and shift, scale `[B, D]`, in the type of shift.

    With `residual` `[B, N, D]` and, if given, `gate` `[B, D]`, the gated branch is added first: h = residual + gate*x,
    and the pair (modulated norm of h, h) is returned. Statistics are in float32; float64 in float64. Raises ValueError
    where shapes do not fit, and for a gate without a residual.
    """
    if x.ndim != 3:
        raise ValueError(f"x {[*x.shape]}: must be [B, N, D]; there is no packed form")
    samples, _, width = x.shape
    for name, vector in (("shift", shift), ("scale", scale), ("gate", gate)):
        if vector is None and name == "gate":
            continue
        if not isinstance(vector, Tensor) or vector.shape != (samples, width):
            found = [*vector.shape] if isinstance(vector, Tensor) else repr(vector)
            raise ValueError(f"{name} {found} for x {[*x.shape]}: must be [{samples}, {width}]")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {[*residual.shape]} for x {[*x.shape]}: the same shape")
    if gate is not None and residual is None:
        raise ValueError("gate without residual: there is nothing to add the gated x to")
    if not use_triton(x):
        out, h = reference.forward(x, shift, scale, gate, residual, eps)
        return out if residual is None else (out, h)
    forward_mode.refuse_functorch("adaln_modulate")
    if forward_mode.active():
        out, h = forward_mode.apply(AdalnModulate, x, shift, scale, gate, residual, eps)
    else:
        out, h = adaln_modulate_op(x, shift, scale, gate, residual, eps)
    return out if residual is None else (out, h)
