"""Random numbers that depend on a sample's seed and nothing else: not on its place in a batch, the rank or the device.

Element j of stream k of seed s is a hash of (s, k, j), so that any part can be drawn anywhere (a counter-based
generator, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the mixer is SplitMix64's, OOPSLA 2014).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers: torch wraps, as the hash wants
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def hash64(seeds: Tensor, count: int, stream: int) -> Tensor:
    """int64 `[B, count]` of well-mixed bits from seeds `[B]`."""
    base = _mix(seeds[:, None] ^ _mix(torch.tensor([stream + 1], device=seeds.device) * _GOLDEN))  # [B, 1]
    counter = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64)
    return _mix(base + counter * _GOLDEN)


def uniform(seeds: Tensor, count: int, stream: int) -> Tensor:
    """float32 `[B, count]` in [0, 1), 24 bits each."""
    return (_shift_right(hash64(seeds, count, stream), 40)).float() * 2.0**-24


def normal(seeds: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """Standard normal float32 `[B, *shape]` (Box-Muller, two a hash)."""
    count = math.prod(shape)
    bits = hash64(seeds, (count + 1) // 2, stream)
    radius = (((_shift_right(bits, 40)).float() + 0.5) * 2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = ((bits & 0xFFFFFF).float()).mul_(2.0 * math.pi * 2.0**-24)
    pairs = torch.empty(*bits.shape, 2, device=seeds.device)  # [B, ceil(count / 2), 2]
    torch.mul(radius, angle.cos(), out=pairs[..., 0])
    torch.mul(radius, angle.sin_(), out=pairs[..., 1])
    return pairs.flatten(1)[:, :count].reshape(len(seeds), *shape)


def _shift_right(x: Tensor, by: int) -> Tensor:
    """A logical shift: torch's >> copies the sign."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    """In place: for whole pictures, new memory costs more than the arithmetic."""
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_MIX1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MIX2)
    return x.bitwise_xor_(_shift_right(x, 31))
