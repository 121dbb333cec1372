"""Scaled dot-product attention, dense and of packed sequences, and its directional derivative."""

from __future__ import annotations

import itertools
from typing import Literal, overload

import torch
from torch import Tensor

from mm_kernels import forward_mode
from mm_kernels.attention import reference
from mm_kernels.attention.op import Attention, AttentionTangent, attention_op
from mm_kernels.runtime import use_triton

# On a CPU the fused form takes more than twice as long, backward included, while the scores still fit in the cache
# (benchmarks/attention_cpu.json); beyond this many scores a head, memory decides and the fused form is used.
EXPLICIT_SCORES = 512 * 512
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
    synchronization, for a maximum that is too small. The kernels raise NotImplementedError under `torch.func.grad`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, mask, cu_q, cu_k, scale)
    cu_k = cu_q if cu_k is None else cu_k
    unknown = cu_q is not None and (max_q is None or max_k is None)
    max_q, max_k = _longest("q", q, cu_q, max_q), _longest("k", k, cu_k, max_k)
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
    _check(q, k, v, None, None, None, scale)
    if (tq.shape, tk.shape, tv.shape) != (q.shape, k.shape, v.shape):
        raise ValueError(f"tangents {(tq.shape, tk.shape, tv.shape)} are not shaped as q, k, v")
    wide = q.dtype == torch.float32 and q.shape[-1] > WIDEST_TANGENT
    if _kernels_take(q) and not wide:
        forward_mode.refuse_functorch("attention_jvp")
        (q, k, v), (tq, tk, tv) = _one_type(q, k, v), (tq.to(q.dtype), tk.to(q.dtype), tv.to(q.dtype))
        places = None, None, None, q.shape[1], k.shape[1]
        out, tangent, _, _ = forward_mode.apply(AttentionTangent, q, k, v, tq, tk, tv, *places, causal, scale)
        return out, tangent

    def of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=causal, scale=scale)

    return torch.func.jvp(of, (q, k, v), (tq, tk, tv))[:2]


def _kernels_take(q: Tensor) -> bool:
    if forward_mode.active() and q.dtype == torch.float32 and q.shape[-1] > WIDEST_TANGENT:
        return False
    return use_triton(q) and q.shape[-1] <= WIDEST and q.dtype in TYPES


def _one_type(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast in its type, as torch's own attention; else as they are."""
    if torch.is_autocast_enabled(q.device.type):
        kind = torch.get_autocast_dtype(q.device.type)
        return q.to(kind), k.to(kind), v.to(kind)
    return q, k, v


def _longest(name: str, x: Tensor, offsets: Tensor | None, given: int | None) -> int:
    """The longest sequence; where reading it from the device would break a compiled graph, all tokens stand for it.

    Checks the offsets where they are read, and where that costs no synchronization.
    """
    if offsets is None:
        return x.shape[1]
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.ndim != 1 or offsets.numel() < 1:
        raise ValueError(f"cu_{name} {tuple(offsets.shape)}, {offsets.dtype}: int32 [B + 1], for B sequences")
    if torch.compiler.is_compiling() or (given is not None and offsets.device.type != "cpu"):
        return x.shape[0] if given is None else given
    places = offsets.tolist()
    lengths = [end - start for start, end in itertools.pairwise(places)]
    if places[0] or places[-1] > x.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_{name}: from {places[0]} to {places[-1]} for {x.shape[0]} tokens; must rise from 0 to those"
        )
    longest = max(lengths, default=0)
    if given is not None and longest > given:
        raise ValueError(f"max_{name} = {given}: a sequence has {longest} tokens")
    return longest if given is None else given


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
           scale: float) -> None:  # fmt: skip
    dims = 4 if cu_q is None else 3
    if not q.ndim == k.ndim == v.ndim == dims or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k, v {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} do not fit ({dims} dimensions)")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{q.shape[-2]} heads of q are not a multiple of {k.shape[-2]} of k")
    if cu_q is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"{q.shape[0]} samples of q and {k.shape[0]} of k")
    autocast = torch.is_autocast_enabled(q.device.type)
    if not autocast and not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: of one type, please")
    if mask is not None and (cu_q is not None or mask.shape != k.shape[:2] or mask.dtype != torch.bool):
        raise ValueError("mask is a bool [B, Nk] for dense keys; packed sequences need none")
    if cu_k is not None and (cu_q is None or cu_k.shape != cu_q.shape):
        raise ValueError("cu_q and cu_k have an entry for each sequence and one more")
    if scale <= 0:
        raise ValueError(f"scale {scale} is not positive")
