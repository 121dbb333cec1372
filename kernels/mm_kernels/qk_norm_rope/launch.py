"""Launches of the Triton kernels, and the configurations in which they ship."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_kernels.qk_norm_rope.kernels import backward_kernel, forward_kernel, tangent_kernel
from mm_kernels.runtime import launches

VALUES = 2048  # a program holds about that many of a block of rows, 16 a thread
WARPS = 4
PARTS = 512  # programs that share the rows of q, or of k, in the backward pass: as many partial weight gradients


def forward(
    q: Tensor,
    k: Tensor,
    wq: Tensor,
    wk: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`; the results are contiguous."""
    q, k = _unit(q), _unit(k)
    constants, blocks = _sizes(q, k)
    out_q, out_k = _new(q), _new(k)
    if sum(blocks):
        launches["qk_norm_rope"] += 1
        with torch.cuda.device_of(q):
            forward_kernel[(sum(blocks),)](
                q, k, wq.contiguous(), wk.contiguous(), *_tables(cos, sin, positions), out_q, out_k,
                *_counts(q, k, cos), eps, **constants, **_strides(q=q, k=k),
            )  # fmt: skip
    return out_q, out_k


def tangent(
    q: Tensor,
    k: Tensor,
    wq: Tensor,
    wk: Tensor,
    tq: Tensor,
    tk: Tensor,
    twq: Tensor,
    twk: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The tangents of `forward`'s results where q, k, wq, wk move along tq, tk, twq, twk."""
    q, k = _unit(q), _unit(k)
    constants, blocks = _sizes(q, k)
    out_q, out_k = _new(q), _new(k)
    if sum(blocks):
        launches["qk_norm_rope_tangent"] += 1
        others = (tensor.contiguous() for tensor in (wq, wk, tq, tk, twq, twk))
        with torch.cuda.device_of(q):
            tangent_kernel[(sum(blocks),)](
                q, k, *others, *_tables(cos, sin, positions), out_q, out_k,
                *_counts(q, k, cos), eps, **constants, **_strides(q=q, k=k),
            )  # fmt: skip
    return out_q, out_k


def backward(
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
    """As `reference.backward`; deterministic: weights' gradients are summed in two fixed stages, without atomics."""
    q, k, grad_q, grad_k = _unit(q), _unit(k), _unit(grad_q), _unit(grad_k)
    constants, blocks = _sizes(q, k)
    dq, dk = _new(q), _new(k)
    parts = [min(PARTS, count) for count in blocks]
    type_of_sums = torch.float64 if constants["WIDE"] == tl.float64 else torch.float32
    partial = [torch.empty(part, q.shape[-1], dtype=type_of_sums, device=q.device) for part in parts]
    if sum(parts):
        launches["qk_norm_rope_backward"] += 1
        with torch.cuda.device_of(q):
            backward_kernel[(sum(parts),)](
                grad_q, grad_k, q, k, wq.contiguous(), wk.contiguous(), *_tables(cos, sin, positions), dq, dk,
                *partial, *parts, *_counts(q, k, cos), eps, **constants, **_strides(gq=grad_q, gk=grad_k, q=q, k=k),
            )  # fmt: skip
    return dq, dk, partial[0].sum(0).to(wq.dtype), partial[1].sum(0).to(wk.dtype)


def _unit(x: Tensor) -> Tensor:
    """Kernels step through a head one value at a time; other strides may be anything."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _new(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _tables(*tables: Tensor | None) -> list[Tensor | None]:
    return [None if table is None else table.contiguous() for table in tables]


def _counts(q: Tensor, k: Tensor, cos: Tensor | None) -> tuple[int, int, int, int]:
    """Rows of q and of k, tokens a sample, positions in the tables."""
    return q.shape[:-1].numel(), k.shape[:-1].numel(), q.shape[-3], 0 if cos is None else len(cos)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of sample, token and head in units of ALIGN, which tells the compiler how wide it may load.

    By itself Triton sees only multiples of 16, which a head of 72 is not. A packed tensor is one sample.
    """
    strides = {
        f"{name}_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip("bnh", (0, *tensor.stride()[:-1])[-3:], strict=True)
    }
    align = math.gcd(16, *strides.values())
    return {name: stride // align for name, stride in strides.items()} | {"ALIGN": align}


def _sizes(q: Tensor, k: Tensor) -> tuple[dict[str, Any], list[int]]:
    """The other constants of a kernel, and the blocks of q and of k.

    Raises ValueError for more rows than an int32 counts.
    """
    constants = _constants(q.shape[-1], q.shape[-2], k.shape[-2], torch.float64 in (q.dtype, k.dtype))
    rows = [x.shape[:-1].numel() for x in (q, k)]
    if max(rows) >= 2**31 - VALUES:
        raise ValueError(f"q and k have {rows[0]} and {rows[1]} rows (tokens times heads), more than an int32 counts")
    return constants | {"num_warps": WARPS}, [triton.cdiv(count, constants["ROWS"]) for count in rows]


def _constants(width: int, heads_q: int, heads_k: int, double: bool) -> dict[str, Any]:
    half = (width + 1) // 2
    columns = triton.next_power_of_2(half)
    return {
        "HEADS_Q": heads_q,
        "HEADS_K": heads_k,
        "D": width,
        "HALF": half,
        "COLUMNS": columns,
        "ROWS": max(1, VALUES // (2 * columns)),
        "WIDE": tl.float64 if double else tl.float32,
    }


def shipped() -> list[tuple[Any, ...]]:
    """Each kernel with rotation at three head widths, forward and backward of the norm alone, and of positions."""
    kernels = {"forward": forward_kernel, "backward": backward_kernel, "tangent": tangent_kernel}
    kinds = [(name, width, "rotary") for name in kernels for width in (64, 72, 128)]
    kinds += [(name, 64, form) for name in ("forward", "backward") for form in ("norm", "packed")]
    halves = dict.fromkeys(("Q", "K", "TQ", "TK", "GRAD_Q", "GRAD_K", "OUT_Q", "OUT_K", "DQ", "DK"), "*bf16")
    singles = dict.fromkeys(("WQ", "WK", "TWQ", "TWK", "COS", "SIN", "PARTIAL_Q", "PARTIAL_K"), "*fp32")
    types = halves | singles | {"POSITIONS": "*i32", "eps": "fp32"}
    found: list[tuple[Any, ...]] = []
    for name, width, form in kinds:
        constants = _constants(width, 12, 12, False) | {"ALIGN": math.gcd(16, width)}
        if form != "packed":
            constants["POSITIONS"] = None
        if form == "norm":
            constants |= {"COS": None, "SIN": None}
        kernel = kernels[name]
        signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
        found.append((f"{name} bf16 {width} {form}", kernel, signature, constants, WARPS, 3, {}))
    return found
