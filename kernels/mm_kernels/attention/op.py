"""`mm::attention` as torch sees it: the ops with their fakes and gradients, and the function with forward mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from mm_kernels import forward_mode
from mm_kernels.attention import reference
from mm_kernels.runtime import use_triton


@torch.library.custom_op("mm::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int,
    max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.forward`, contiguous. Raises NotImplementedError under forward-mode derivatives."""
    forward_mode.refuse("attention")
    if use_triton(q):
        from mm_kernels.attention import launch

        return launch.forward(q, k, v, mask, cu_q, cu_k, max_q, max_k, causal, scale)
    out, lse = reference.forward(q, k, v, mask, cu_q, cu_k, max_q, max_k, causal, scale)
    return out.contiguous(), lse.contiguous()


@attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int,
    max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(statistic_shape(q), dtype=statistic_type(q))


def statistic_shape(q: Tensor) -> tuple[int, ...]:
    """`[B, H, Nq]`, or `[H, T]` where q is packed."""
    return (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])


def statistic_type(q: Tensor) -> torch.dtype:
    """float32, or float64 where q is."""
    return torch.promote_types(q.dtype, torch.float32)


@torch.library.custom_op("mm::attention_backward", mutates_args=())
def attention_backward_op(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
    cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, contiguous. Raises NotImplementedError under forward-mode derivatives."""
    forward_mode.refuse("attention_backward")
    if dlse is not None:  # of a row without keys, whose lse is -inf, any gradient is that of a constant
        dlse = dlse.where(lse.isfinite(), 0.0)
    rest = mask, cu_q, cu_k, max_q, max_k, causal, scale
    if use_triton(q):
        from mm_kernels.attention import launch

        return launch.backward(dout, dlse, q, k, v, out, lse, *rest)

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference.forward(q, k, v, *rest)

    pull = torch.func.vjp(both, q, k, v)[1]  # inside an op autograd records nothing; functorch does
    dq, dk, dv = pull((dout, torch.zeros_like(lse) if dlse is None else dlse))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@attention_backward_op.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
    cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, cu_q, cu_k, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, mask, cu_q, cu_k)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, mask, cu_q, cu_k = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    return *attention_backward_op(dout, dlse, q, k, v, out, lse, mask, cu_q, cu_k, *ctx.rest), *[None] * 7


attention_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.mm.attention, torch.ops.mm.attention_backward], get_raw=True)
def _flop(*args: Any, **_: Any) -> int:
    """For torch's FlopCounterMode, with which training reports its use of the machine; causal counts in full."""
    backward = len(args) > 10  # the arguments of one op or of the other
    q, k, _, *rest = args[2:5] + args[7:] if backward else args
    cu_q, cu_k, max_q, max_k = rest[1:5]
    if cu_q is None:
        pairs = q.shape[0] * q.shape[1] * k.shape[1]
    elif isinstance(cu_q, FakeTensor):
        pairs = (len(cu_q) - 1) * max_q * max_k
    else:
        pairs = int((cu_q.diff().long() * cu_k.diff()).sum())
    products = 5 if backward else 2
    return products * 2 * pairs * q.shape[-2] * q.shape[-1]


@torch.library.custom_op("mm::attention_by_sample", mutates_args=())
def attention_by_sample_op(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`reference.attention_by_sample` in a compiled graph, whose own softmax takes several times as long."""
    return reference.attention_by_sample(q, k, v, mask, scale)


@attention_by_sample_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@register_flop_formula(torch.ops.mm.attention_by_sample)
def _flop_by_sample(q: tuple[int, ...], k: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * 2 * q[0] * q[1] * k[1] * q[2] * q[3]


class Attention(torch.autograd.Function):
    """The Triton form of the op with a forward-mode rule; the tangent has no backward of its own."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        from mm_kernels.attention import launch

        return launch.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:6])

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, mask, cu_q, cu_k = ctx.saved_tensors
        moves = [forward_mode.moved(move, of) for move, of in zip(tangents[:3], (q, k, v), strict=True)]
        _, tangent, _, tangent_lse = AttentionTangent.apply(q, k, v, *moves, mask, cu_q, cu_k, *ctx.rest)
        return tangent, tangent_lse


class AttentionTangent(torch.autograd.Function):
    """out, its tangent, lse and its tangent, in one pass. The backward is the primal's: it refuses tangents' gradients.

    Few-step objectives stop the gradient of the tangent (arXiv 2505.13447).
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from mm_kernels.attention import launch

        return launch.tangent(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        out, _, lse, _ = output
        _setup_context(ctx, (*inputs[:3], *inputs[6:]), (out, lse))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, dtangent, dlse, dtangent_lse = grads
        if dtangent is not None or dtangent_lse is not None:
            raise NotImplementedError("the tangent of attention has no backward: detach it")
        *primals, _, _, _, _, _, _, _ = _backward(ctx, dout, dlse)
        return *primals, *[None] * 10
