"""Scaled dot-product attention, dense and of packed sequences, and its directional derivative."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mm_kernels import forward_mode
from mm_kernels.attention import check, reference
from mm_kernels.attention.op import Attention, AttentionTangent, attention_by_sample_op, attention_op
from mm_kernels.runtime import use_triton

# On a CPU the fused form takes more than twice as long, backward included, while the scores still fit in the cache
# (benchmarks/attention_cpu.json); beyond this many scores a head, memory decides and the fused form is used.
EXPLICIT_SCORES = 512 * 512
FEWEST_SCORES = 128 * 128  # a head, from which the fused form of inference in bf16 loses to plain products
WIDEST_TANGENT = 96  # in float32, beyond which a tangent's tiles do not fit into registers
WIDEST = 128  # heads that the kernels take, in the types below; torch takes the others on any device
TYPES = (torch.float32, torch.float16, torch.bfloat16)


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, cu_q: Tensor | None = None,
              cu_k: Tensor | None = None, max_q: int | None = None, max_k: int | None = None, causal: bool = False,
              scale: float | None = None, return_lse: Literal[False] = False) -> Tensor: ...  # fmt: skip
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, cu_q: Tensor | None = None,
              cu_k: Tensor | None = None, max_q: int | None = None, max_k: int | None = None, causal: bool = False,
              scale: float | None = None, return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v, shaped as q, from q `[B, Nq, H, D]` and k, v `[B, Nk, H_k, D]`, H a multiple of H_k.

    Packed: q `[T, H, D]`, k and v `[S, H_k, D]`, whose sequences begin at `cu_q` and `cu_k` (as cu_q if not given),
    int32 `[B + 1]`, the first at 0; `max_q` and `max_k`, at least the longest, are read back from the device if not
    given. Tokens after the last sequence give zeros. `mask` `[B, Nk]`, for dense tensors, is True where a key is real.
    `causal` is aligned to the last key: query i sees keys <= i + Nk - Nq. `scale` is D ** -0.5 by default. A row that
    sees no key gives zeros. With `return_lse` also the natural logarithm of each row's sum of exponentials, float32
    (float64 of float64), `[B, H, Nq]` or packed `[H, T]`, -inf for a row without keys; it has a gradient too.

    Raises ValueError for shapes that do not fit, for a scale that is not positive and, where that costs no
    synchronization, for offsets and maxima that cannot be right: not in compiled graphs, and on a GPU only where the
    maxima are not given. NotImplementedError for the kernels, and for packed calls, under `torch.func.grad` and `vmap`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check.inputs(q, k, v, mask, cu_q, cu_k, scale)
    cu_k = cu_q if cu_k is None else cu_k
    unknown = cu_q is not None and (max_q is None or max_k is None)
    max_q, max_k = check.longest("q", q, cu_q, max_q), check.longest("k", k, cu_k, max_k)
    if _kernels_take(q):
        forward_mode.refuse_functorch("attention")
        q, k, v = _one_type(q, k, v)
        inputs = (q, k, v, mask, cu_q, cu_k, max_q, max_k, causal, scale)
        out, lse = forward_mode.apply(Attention, *inputs) if forward_mode.active() else attention_op(*inputs)
        return (out, lse) if return_lse else out
    if unknown and torch.compiler.is_compiling():  # the op reads the lengths; a graph would pad each sequence to all
        out, lse = attention_op(q, k, v, mask, cu_q, cu_k, max_q, max_k, causal, scale)
        return (out, lse) if return_lse else out
    if return_lse or cu_q is not None:
        out, lse = reference.forward(q, k, v, mask, cu_q, cu_k, max_q, max_k, causal, scale)
        return (out, lse) if return_lse else out
    k, v = reference.repeated(q, k, v)
    visible = reference.visible_keys(mask, causal, q.shape[1], k.shape[1], q.device)
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    small = q.device.type == "cpu" and training and q.shape[1] * k.shape[1] <= EXPLICIT_SCORES
    if small or forward_mode.active() or k.shape[1] == 0:  # torch's fused form has no forward mode
        return reference.explicit_attention(q, k, v, visible=visible, scale=scale)[0]
    if not (training or causal) and _plain_products(q, k, v):
        by_sample = attention_by_sample_op if torch.compiler.is_compiling() else reference.attention_by_sample
        return by_sample(q, k, v, mask, scale)
    return reference.fused_attention(q, k, v, visible=visible, scale=scale)


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, *, causal: bool = False,
    scale: float | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Dense attention and its derivative along tq, tk, tv, shaped as q, k, v: in one pass where the kernels run.

    Gradients flow through the first result; the kernels raise NotImplementedError for one of the second, which
    few-step objectives detach (arXiv 2505.13447). A function that calls `attention` may also be given to
    `torch.func.jvp`. Under torch.compile tangents are a break in the graph. Raises ValueError as `attention` does.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check.inputs(q, k, v, None, None, None, scale)
    for name, tangent, of in (("tq", tq, q), ("tk", tk, k), ("tv", tv, v)):
        if not isinstance(tangent, Tensor) or tangent.shape != of.shape:
            raise ValueError(f"{name}: must be a tensor {[*of.shape]}, as {name[1]}; zeros where nothing moves")
    tq, tk, tv = tq.to(q.dtype), tk.to(k.dtype), tv.to(v.dtype)
    wide = q.dtype == torch.float32 and q.shape[-1] > WIDEST_TANGENT
    if _kernels_take(q) and not wide:
        forward_mode.refuse_functorch("attention_jvp")
        (q, k, v), (tq, tk, tv) = _one_type(q, k, v), (tq.to(q.dtype), tk.to(q.dtype), tv.to(q.dtype))
        places = None, None, None, q.shape[1], k.shape[1]
        out, moved, _, _ = forward_mode.apply(AttentionTangent, q, k, v, tq, tk, tv, *places, causal, scale)
        return out, moved

    def primal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=causal, scale=scale)

    return torch.func.jvp(primal, (q, k, v), (tq, tk, tv))[:2]


def _kernels_take(q: Tensor) -> bool:
    if forward_mode.active() and q.dtype == torch.float32 and q.shape[-1] > WIDEST_TANGENT:
        return False
    return use_triton(q) and q.shape[-1] <= WIDEST and q.dtype in TYPES


def _plain_products(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Where they take less time than torch's fused attention, forward: bf16 on a CPU, scores that fit in the cache."""
    bf16 = q.device.type == "cpu" and q.dtype == k.dtype == v.dtype == torch.bfloat16
    return bf16 and FEWEST_SCORES <= q.shape[1] * k.shape[1] <= EXPLICIT_SCORES


def _one_type(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast in its type, as torch's own attention; else as they are."""
    if check.autocast(q.device):
        kind = torch.get_autocast_dtype(q.device.type)
        return q.to(kind), k.to(kind), v.to(kind)
    return q, k, v
