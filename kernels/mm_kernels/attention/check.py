"""What attention refuses, in words; kernels read by shapes and offsets, and would read elsewhere."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def autocast(device: torch.device) -> bool:
    """Whether torch.autocast is on for a device; torch knows nothing of it for `meta`."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def inputs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
           scale: float) -> None:  # fmt: skip
    """Raises ValueError where tensors do not fit together, by their shapes and types alone."""
    shapes = f"q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}"
    dims = 4 if cu_q is None else 3
    if not q.ndim == k.ndim == v.ndim == dims:
        wanted = "[B, N, H, D]; packed [T, H, D] needs cu_q" if cu_q is None else "[T, H, D] with cu_q"
        raise ValueError(f"{shapes}: must be {wanted}")
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"{shapes}: k and v must be alike, and heads of one width D >= 1")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{shapes}: {q.shape[-2]} heads of q are not a multiple of {k.shape[-2]}; heads come before D")
    if cu_q is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"{shapes}: {q.shape[0]} samples of q and {k.shape[0]} of k")
    if not q.is_floating_point() or (not autocast(q.device) and not q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: must be of one floating type")
    if mask is not None and (cu_q is not None or mask.shape != k.shape[:2] or mask.dtype != torch.bool):
        wanted = f"bool {[*k.shape[:2]]}, True where a key is real" if cu_q is None else "left out of packed calls"
        raise ValueError(f"mask {[*mask.shape]}, {mask.dtype}: must be {wanted}")
    if cu_k is not None and (cu_q is None or _shape(cu_k) != _shape(cu_q)):
        raise ValueError("cu_k: goes with a cu_q of as many entries, one for each sequence and one more")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale = {scale}: must be a positive number")


def longest(name: str, x: Tensor, offsets: Tensor | None, given: int | None) -> int:
    """The longest sequence; where reading it from the device would break a compiled graph, all tokens stand for it.

    Raises ValueError for offsets that cannot be meant, where they are read and where that costs no synchronization.
    """
    if offsets is None:
        return x.shape[1]
    shape = _shape(offsets)
    if shape is None or len(shape) != 1 or shape[0] < 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_{name} {offsets!r}: must be an int32 (or int64) tensor [B + 1], for B sequences")
    if given is not None and not isinstance(given, (int, torch.SymInt)):
        raise ValueError(f"max_{name} = {given!r}: must be a whole number")
    unread = torch.compiler.is_compiling() or offsets.device.type == "meta"
    if unread or (given is not None and offsets.device.type != "cpu"):
        return x.shape[0] if given is None else given
    places = offsets.tolist()
    lengths = [end - start for start, end in itertools.pairwise(places)]
    if places[0] or places[-1] > x.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_{name}, from {places[0]} to {places[-1]}: must rise from 0 to at most the {x.shape[0]} tokens"
        )
    most = max(lengths, default=0)
    if given is not None and most > given:
        raise ValueError(f"max_{name} = {given}: a sequence has {most} tokens")
    return most if given is None else given


def _shape(offsets: Tensor) -> torch.Size | None:
    return offsets.shape if isinstance(offsets, Tensor) else None
