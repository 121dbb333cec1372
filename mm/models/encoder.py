"""The one encoder of every modality: a stack of blocks, a norm, a pool, and a projection to the shared space."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mm.nn.block import Block
from mm.nn.packing import layout
from mm.nn.pool import pool_tokens
from mm.types import Encoded, Tokens
from mm_kernels import Ragged


class Encoder(nn.Module):
    """Tokens, `[B, N, D]` or packed `[T, D]`, to tokens after the final norm and a unit-norm vector each, `[B, E]`."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        embed_dim: int,
        *,
        mlp_ratio: float = 4.0,
        pool: str = "mean",
        causal: bool = False,
    ):
        super().__init__()
        self.pool = pool
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, causal) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, embed_dim, bias=False)

    def forward(self, tokens: Tokens) -> Encoded:
        """Dense tokens give dense ones, packed tokens packed ones.

        In training, padding is left out of every layer. At inference a dense batch stays dense: which rows a matrix
        product has changes its last bits, and a sample must not depend on its neighbours'.
        """
        if tokens.cu_seqlens is not None:
            longest = tokens.max_len or int(tokens.cu_seqlens.diff().max())
            ragged, x = Ragged.of(tokens.cu_seqlens, longest, len(tokens.x)), tokens.x
        elif tokens.mask is not None and self.training:
            ragged = layout(tokens.mask)
            x = ragged.pack(tokens.x)  # [T, D]
        else:
            x = self._blocks(tokens.x, tokens.mask)
            return Encoded(tokens._replace(x=x), self._pooled(x, tokens.mask))
        x = self._blocks(x, None, ragged.offsets, ragged.real.shape[1])
        dense = ragged.pad(x)
        return Encoded(tokens._replace(x=dense if tokens.cu_seqlens is None else x), self._pooled(dense, ragged.real))

    def _blocks(self, x: Tensor, *where: Tensor | int | None) -> Tensor:
        for block in self.blocks:
            x = block(x, *where)
        return self.norm(x)

    def _pooled(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return F.normalize(self.proj(pool_tokens(x, mask, self.pool)).float(), dim=-1)
