"""Launches of the attention kernels: tensors in, tensors out, below autograd and below torch.compile."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mm_kernels import runtime
from mm_kernels.attention import backward as backward_kernels
from mm_kernels.attention import forward as forward_kernels
from mm_kernels.attention import tangent as tangent_kernels
from mm_kernels.attention.shipped import DELTA_ROWS, pieces, tile


class Call:
    """One call's tensors as packed tokens `[T, H, D]`, and its launches; dense samples are all equally long.

    `max_q` and `max_k` are the longest sequences; `mask` `[B, Nk]` is for dense tensors only.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
                 max_q: int, max_k: int, causal: bool, scale: float):  # fmt: skip
        self.packed = cu_q is not None
        self.samples = cu_q.numel() - 1 if cu_q is not None else q.shape[0]
        self.heads, self.key_heads, self.width = q.shape[-2], k.shape[-2], q.shape[-1]
        self.max_q, self.max_k, self.causal, self.scale = max_q, max_k, causal, scale
        self.q, self.k, self.v = self.tokens(q), self.tokens(k), self.tokens(v)
        self.mask = mask
        nothing = self.q  # a pointer that no kernel reads
        visible = (nothing, nothing) if mask is None else (mask.contiguous().view(torch.uint8), key_bounds(mask))
        offsets = (nothing if cu is None else cu.contiguous() for cu in (cu_q, cu_k))
        self.places = (*offsets, *visible)
        self.strides = (0, q.shape[0]) if self.packed else (self.heads * max_q, max_q)  # of lse: sample, head

    def tokens(self, tensor: Tensor) -> Tensor:
        """`[T, H, D]` in which a token's heads are contiguous; a view where the strides allow it."""
        tensor = tensor if self.packed else tensor.flatten(0, 1)
        whole = tensor.stride(-1) == 1 and (tensor.shape[1] == 1 or tensor.stride(1) == self.width)
        return tensor if whole else tensor.contiguous()

    def empty(self, like: Tensor) -> Tensor:
        """A result, contiguous. Packed rows after the last sequence belong to no program: they are zero."""
        return (torch.zeros if self.packed else torch.empty)(like.shape, dtype=like.dtype, device=like.device)

    def statistic(self, fill: float) -> Tensor:
        """A float32 for each query and head: `[B, H, Nq]`, or packed `[H, T]`, `fill` after the last sequence."""
        shape = (self.heads, self.strides[1]) if self.packed else (self.samples, self.heads, self.max_q)
        out = torch.empty(shape, dtype=torch.float32, device=self.q.device)
        return out.fill_(fill) if self.packed else out

    def launch(self, name: str, kernel: Any, tensors: tuple[Tensor, ...]) -> None:
        """One program a block of queries (dkdv: of keys), head and sample, if there are any."""
        group = self.heads // self.key_heads
        size = tile(name, self.q.dtype, self.width, group, self.q.device)
        heads, blocks = self.heads, triton.cdiv(self.max_q, size.queries)
        if name == "dkdv":
            heads, blocks = self.key_heads, triton.cdiv(self.max_k, size.keys)
        if blocks * heads * self.samples == 0:
            return
        first, second = pieces(self.width)
        runtime.launches[f"attention_{name}"] += 1
        with torch.cuda.device_of(self.q):
            kernel[(blocks * heads * self.samples,)](
                *tensors, *self.places, self.scale, blocks, heads, self.max_q, self.max_k,
                self.q.stride(0), self.k.stride(0), self.v.stride(0), *self.strides,
                GROUP=group, D=self.width, D1=first, D2=second, BM=size.queries, BN=size.keys,
                PACKED=self.packed, MASKED=self.mask is not None, CAUSAL=self.causal,
                num_warps=size.warps, num_stages=size.stages,
            )  # fmt: skip

    def launch_delta(self, tensors: tuple[Tensor, ...], with_lse: bool) -> None:
        """One program a block of queries, head and sample, if there are any."""
        blocks = triton.cdiv(self.max_q, DELTA_ROWS)
        if blocks * self.heads * self.samples == 0:
            return
        first, second = pieces(self.width)
        runtime.launches["attention_delta"] += 1
        with torch.cuda.device_of(self.q):
            backward_kernels.delta_kernel[(blocks * self.heads * self.samples,)](
                *tensors, self.places[0], blocks, self.heads, self.max_q, *self.strides, D=self.width, D1=first,
                D2=second, BM=DELTA_ROWS, PACKED=self.packed, WITH_LSE=with_lse, num_warps=4,
            )  # fmt: skip


def key_bounds(mask: Tensor) -> Tensor:
    """`[B, 2]` int32: keys before the first hidden one, and the end of the last visible one; mask `[B, Nk]`.

    Both on the device: a mask of ragged lengths then costs no synchronization, and no byte of it is read in the blocks
    before its end.
    """
    if mask.shape[1] == 0:
        return mask.new_zeros(mask.shape[0], 2, dtype=torch.int32)
    place = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device)
    whole = torch.where(mask, mask.shape[1], place).amin(1)
    return torch.stack([whole.to(torch.int32), torch.where(mask, place + 1, 0).amax(1).to(torch.int32)], 1)


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Attention's result as q and its log-sum-exp; `rest` is mask, cu_q, cu_k, max_q, max_k, causal, scale."""
    call = Call(q, k, v, *rest)
    out, lse = call.empty(q), call.statistic(float("-inf"))
    call.launch("forward", forward_kernels.forward_kernel, (call.q, call.k, call.v, out, lse))
    return out, lse


def backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
             *rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous; `out` and `lse` as `forward` returned them."""
    call = Call(q, k, v, *rest)
    dout = dout.contiguous()
    delta = call.statistic(0.0)
    call.launch_delta((out, dout, delta if dlse is None else dlse.contiguous(), delta), dlse is not None)
    dq, dk, dv = call.empty(q), call.empty(k), call.empty(v)
    call.launch("dq", backward_kernels.dq_kernel, (call.q, call.k, call.v, dout, dq, lse, delta))
    call.launch("dkdv", backward_kernels.dkdv_kernel, (call.q, call.k, call.v, dout, dk, dv, lse, delta))
    return dq, dk, dv


def tangent(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor,
            *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention's result, its tangent, its log-sum-exp and the tangent of that, in one pass."""
    call = Call(q, k, v, *rest)
    moves = []
    for name, move in (("q", tq), ("k", tk), ("v", tv)):
        move = call.tokens(move)
        if move.stride(0) != getattr(call, name).stride(0):  # a primal and its tangent share strides
            setattr(call, name, getattr(call, name).contiguous())
            move = move.contiguous()
        moves.append(move)
    out, tout = call.empty(q), call.empty(q)
    lse, tlse = call.statistic(float("-inf")), call.statistic(0.0)
    tensors = (call.q, call.k, call.v, *moves, out, tout, lse, tlse)
    call.launch("tangent", tangent_kernels.tangent_kernel, tensors)
    return out, tout, lse, tlse
