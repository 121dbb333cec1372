"""The one encoder of every modality: a stack of blocks, a norm, a pool, and a projection to the shared space."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from mm.nn.block import Block
from mm.nn.packing import layout
from mm.nn.pool import pool_tokens
from mm.types import Encoded, Tokens


class Encoder(nn.Module):
    """Tokens `[B, N, D]` to tokens after the final norm and a unit-norm vector `[B, E]`."""

    def __init__(self, width: int, depth: int, heads: int, embed_dim: int, *, pool: str = "mean", causal: bool = False):
        super().__init__()
        self.pool = pool
        self.blocks = nn.ModuleList(Block(width, heads, causal=causal) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, embed_dim, bias=False)

    def forward(self, tokens: Tokens) -> Encoded:
        x = tokens.x
        if self.training and tokens.mask is not None:  # at inference a sample must not depend on its neighbours' bits
            packed = layout(tokens.mask)
            x = packed.pack(x)  # [T, D]
            for block in self.blocks:
                x = block(x, packed=packed)
            x = packed.unpack(self.norm(x))
        else:
            for block in self.blocks:
                x = block(x, tokens.mask)
            x = self.norm(x)
        pooled = self.proj(pool_tokens(x, tokens.mask, self.pool))
        return Encoded(tokens._replace(x=x), F.normalize(pooled.float(), dim=-1))
