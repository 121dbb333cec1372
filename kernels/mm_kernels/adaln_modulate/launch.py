"""Launches of the Triton kernels, and the configurations in which they ship."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_kernels.adaln_modulate.kernels import backward_kernel, forward_kernel, tangent_kernel
from mm_kernels.adaln_modulate.reference import type_of_h
from mm_kernels.runtime import launches

VALUES = 2048  # a program holds about that many, but at least one row
VALUES_A_WARP = 512  # 16 a thread
PROGRAMS = 1024  # about as many share the tokens in the backward pass, each leaving its own partial sums


def forward(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`, contiguous; without a residual h is empty."""
    x, shift, scale = _unit(x), _unit(shift), _unit(scale)
    gate, residual = _unit(gate), _unit(residual)
    out = torch.empty(x.shape, dtype=shift.dtype, device=x.device)
    h = torch.empty(0 if residual is None else x.shape, dtype=type_of_h(x, gate, residual), device=x.device)
    if out.numel():
        constants = _constants(x.shape[-1], torch.float64 in (h.dtype, shift.dtype))
        programs = len(x) * triton.cdiv(x.shape[1], constants["ROWS"])
        launches["adaln_modulate"] += 1
        with torch.cuda.device_of(x):
            forward_kernel[(programs,)](
                x, shift, scale, gate, residual, out, h, x.shape[1], eps, *_rows(x), *_vectors(shift, scale, gate),
                *_rows(residual), **constants,
            )  # fmt: skip
    return out, h


def tangent(
    h: Tensor,
    x: Tensor,
    scale: Tensor,
    gate: Tensor | None,
    tx: Tensor,
    tshift: Tensor,
    tscale: Tensor,
    tgate: Tensor | None,
    tresidual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The tangents of `forward`'s results along tx, tshift, ...; h is what `forward` gave, or x without a residual."""
    h, x, scale = _unit(h), _unit(x), _unit(scale)
    gate = _unit(gate)
    out = torch.empty(x.shape, dtype=tshift.dtype, device=x.device)
    out_h = torch.empty(0 if tresidual is None else x.shape, dtype=h.dtype, device=x.device)
    if out.numel():
        constants = _constants(x.shape[-1], torch.float64 in (h.dtype, out.dtype))
        programs = len(x) * triton.cdiv(x.shape[1], constants["ROWS"])
        moves = (None if move is None else move.contiguous() for move in (tx, tshift, tscale, tgate, tresidual))
        launches["adaln_modulate_tangent"] += 1
        with torch.cuda.device_of(x):
            tangent_kernel[(programs,)](
                h, x, scale, gate, *moves, out, out_h, x.shape[1], eps, *_rows(h), *_rows(x), *_vectors(scale, gate),
                **constants,
            )  # fmt: skip
    return out, out_h


def backward(
    grad: Tensor, grad_h: Tensor | None, h: Tensor, x: Tensor | None, scale: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.backward`; deterministic: tokens are summed in two fixed stages, without atomics."""
    grad, h, scale = _unit(grad), _unit(h), _unit(scale)
    grad_h, x, gate = _unit(grad_h), _unit(x), _unit(gate)
    samples, tokens, width = h.shape
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    gated = gate is not None and x is not None
    dx = torch.empty(h.shape if gated else 0, dtype=h.dtype if x is None else x.dtype, device=h.device)
    double = torch.float64 in (h.dtype, grad.dtype)
    constants = _constants(width, double)
    rows = constants["ROWS"]
    span = rows * max(1, triton.cdiv(samples * tokens, rows * PROGRAMS))  # tokens of one sample for a program
    parts = triton.cdiv(tokens, span)
    shape = (3 if gated else 2, samples, parts, width)
    partial = torch.empty(shape, dtype=torch.float64 if double else torch.float32, device=h.device)
    if dh.numel():
        launches["adaln_modulate_backward"] += 1
        with torch.cuda.device_of(h):
            backward_kernel[(samples * parts,)](
                grad, grad_h, h, x, scale, gate, dh, dx, partial[0], partial[1], partial[-1], tokens, span, eps,
                *_rows(grad), *_rows(grad_h), *_rows(h), *_rows(x), *_vectors(scale, gate), **constants,
            )  # fmt: skip
    dshift, dscale = (each.sum(1).to(scale.dtype) for each in partial[:2])  # an op's results share no memory
    dgate = partial[2].sum(1).to(gate.dtype) if gate is not None and gated else dx.new_empty(0)
    return dh, dx, dshift, dscale, dgate


def _unit(x: Any) -> Any:
    """Kernels step through a row one value at a time; other strides may be anything."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _vectors(*vectors: Tensor | None) -> list[int]:
    return [0 if vector is None else vector.stride(0) for vector in vectors]


def _constants(width: int, double: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    rows = max(1, VALUES // block)
    warps = min(32, max(4, rows * block // VALUES_A_WARP))
    return {"D": width, "BLOCK": block, "ROWS": rows, "WIDE": tl.float64 if double else tl.float32, "num_warps": warps}


def shipped() -> list[tuple[Any, ...]]:
    """Forward and backward, with gate and residual, at three widths, 1,152 no power of two; and there the rest."""
    kernels = {"forward": forward_kernel, "backward": backward_kernel, "tangent": tangent_kernel}
    kinds = [(name, width, True) for name in ("forward", "backward") for width in (384, 1152, 4096)]
    kinds += [("tangent", 1152, True), ("forward", 1152, False), ("backward", 1152, False)]
    types = {"eps": "fp32", "DSHIFT": "*fp32", "DSCALE": "*fp32", "DGATE": "*fp32", "tokens": "i32", "span": "i32"}
    found: list[tuple[Any, ...]] = []
    for name, width, gated in kinds:
        kernel = kernels[name]
        constants = _constants(width, False)
        warps = constants.pop("num_warps")
        if not gated:
            absent = ("GATE", "RESIDUAL", "GRAD_H", "X") if name == "backward" else ("GATE", "RESIDUAL")
            constants |= {argument: None for argument in absent if argument in kernel.arg_names}
        kind = {True: "*bf16", False: "i32:16"}
        signature = {
            argument: types.get(argument, kind[argument.isupper()])
            for argument in kernel.arg_names
            if argument not in constants
        }
        found.append((f"{name} bf16 {width}{' gated' * gated}", kernel, signature, constants, warps, 3, {}))
    return found
