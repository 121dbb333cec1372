"""From tokens to one vector a sample, and the gradient switch between objectives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm.nn.block import ACTIVATIONS, Norm
from mm_kernels import attention


def pool_tokens(x: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """`[B, D]` from x `[B, N, D]`: the mean of the real tokens; the first one; the last real one; or by place.

    "cls" the first token, "patches" the mean of all but it, "end" what stands in the last place, padding or not.
    """
    if kind == "cls":
        return x[:, 0]
    if kind == "patches":
        return x[:, 1:].mean(1)
    if kind == "end":
        return x[:, -1]
    if kind == "last":
        if mask is None:
            return x[:, -1]
        return x[torch.arange(len(x), device=x.device), last_real(mask)]
    if mask is None:
        return x.mean(1)
    weight = mask.to(x.dtype)[..., None]  # [B, N, 1]
    return (x * weight).sum(1) / weight.sum(1)


def last_real(mask: Tensor) -> Tensor:
    """The place `[B]` of the last real token of each row of mask `[B, N]`; 0 where there is none."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)


class AttentionPool(nn.Module):
    """A learned query attends to all tokens, then an MLP: `[B, N, D]` to `[B, D]` (MAP head, arXiv 2106.04560)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: str, eps: float):
        super().__init__()
        self.heads, self.activation = heads, activation
        self.latent = nn.Parameter(torch.zeros(width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm = Norm(width, eps=eps)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.fc2 = nn.Linear(int(width * mlp_ratio), width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask `[B, N]`, True where a token is real."""
        q = self.q(self.latent.to(x.dtype)).expand(len(x), 1, -1).unflatten(-1, (self.heads, -1))  # [B, 1, H, Dh]
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).unbind(-3)  # [B, N, H, Dh]
        x = self.out(attention(q, k, v, mask=mask).flatten(-2))[:, 0]
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm(x))))


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself, with its gradient multiplied by `scale`: 0 stops it, 1 leaves it alone."""
    if scale == 1.0:
        return x
    if scale == 0.0:
        return x.detach()
    return x * scale + x.detach() * (1.0 - scale)
