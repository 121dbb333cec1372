"""Where a token is: grids, rotary angles, and the embedding of a noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def grid_positions(rows: int, columns: int) -> Tensor:
    """(row, column) of each cell in reading order, int64 `[rows * columns, 2]`."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([row.flatten(), column.flatten()], dim=-1)


def rotary_angles(positions: Tensor, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin `[N, head_dim / 2]` for positions `[N]` or `[N, axes]`.

    Each axis turns its own share of the pairs, from one radian a cell down to 1 / base (arXiv 2104.09864).
    """
    positions = positions.float()
    if positions.ndim == 1:
        positions = positions[:, None]
    axes = positions.shape[1]
    pairs = head_dim // 2 // axes
    frequency = base ** (-torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs)
    angles = (positions[:, :, None] * frequency).flatten(1)  # [N, axes * pairs]
    return angles.cos(), angles.sin()


def timestep_embedding(t: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """Sinusoids `[B, width]` of a noise level t in [0, 1] `[B]`, as DDPM's (arXiv 2006.11239), t scaled by 1000."""
    half = width // 2
    frequency = torch.exp(-math.log(period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = 1000.0 * t.float()[:, None] * frequency
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
