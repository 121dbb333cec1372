"""The one encoder of every modality: a stack of blocks, a norm, a pool, and a projection to the shared space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.models.wrapped import wrapped_image, wrapped_text
from mm.nn.block import Block, Norm
from mm.nn.packing import layout, span
from mm.nn.pool import AttentionPool, last_real, pool_tokens
from mm.types import Encoded, Tokens
from mm_kernels import Ragged

if TYPE_CHECKING:
    from mm.config import ImageConfig, TextConfig


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
        masked: bool = True,
        norm_after_pool: bool = False,
        activation: str = "gelu_tanh",
        qk_norm: bool = True,
        eps: float = 1e-5,
        proj: str = "linear",
    ):
        """`masked` False: attention sees the padding, and only pooling knows where it is. Else as in `mm.config`."""
        super().__init__()
        self.width = width
        self.pool, self.masked, self.norm_after_pool = pool, masked, norm_after_pool
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, causal, activation=activation, qk_norm=qk_norm, eps=eps)
            for _ in range(depth)
        )
        self.norm = Norm(width, eps=eps)
        self.attention_pool = AttentionPool(width, heads, mlp_ratio, activation, eps) if pool == "map" else None
        self.proj = nn.Identity() if proj == "none" else nn.Linear(width, embed_dim, bias=proj == "affine")

    def forward(self, tokens: Tokens, pooled_only: bool = False) -> Encoded:
        """Dense tokens give dense ones, packed tokens packed ones.

        In training, padding is left out of every layer, and columns of nothing but padding out of the result. At
        inference a dense batch stays dense: which rows a matrix product has changes its last bits, and a sample must
        not depend on its neighbours'. With `pooled_only` the result has no tokens, x `[B, 0, D]`, and the last block
        computes only what is pooled, where that is one token.
        """
        if tokens.cu_seqlens is not None:
            longest = tokens.max_len or int(tokens.cu_seqlens.diff().max())
            ragged, x = Ragged.of(tokens.cu_seqlens, longest, len(tokens.x)), tokens.x
        elif tokens.mask is not None and self.masked and self.training:
            wide = span(tokens.mask)
            real = tokens.mask[:, :wide]
            tokens = tokens._replace(x=tokens.x[:, :wide], mask=real, max_len=wide)
            ragged = layout(real)
            x = ragged.pack(tokens.x)  # [T, D]
        else:
            mask = tokens.mask if self.masked else None
            if pooled_only and (rows := self._rows(tokens.x, tokens.mask)) is not None:
                return self._of_one(self._blocks(tokens.x, mask, rows=rows)[:, 0])
            x = self._blocks(tokens.x, mask)
            normed = self.norm(x)
            return Encoded(tokens._replace(x=normed), self._pooled(x, normed, tokens.mask))
        if pooled_only and self.pool == "last":
            last = (ragged.offsets[1:] - 1).clamp_min(0).long()
            x = self._blocks(x, None, ragged.offsets, ragged.real.shape[1], rows=last)
            return self._of_one(x * (ragged.offsets.diff() > 0)[:, None])
        x = self._blocks(x, None, ragged.offsets, ragged.real.shape[1])
        normed = self.norm(x)
        dense = ragged.pad(normed)
        before = ragged.pad(x) if self.norm_after_pool else dense
        pooled = self._pooled(before, dense, ragged.real)
        return Encoded(tokens._replace(x=dense if tokens.cu_seqlens is None else normed), pooled)

    def _blocks(self, x: Tensor, *where: Tensor | int | None, rows: Tensor | None = None) -> Tensor:
        """With `rows`, the last block computes those alone."""
        for number, block in enumerate(self.blocks):
            last = rows is not None and number + 1 == len(self.blocks)
            x = block(x, *where, rows=rows) if last else block(x, *where)
        return x

    def _rows(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The place `[B]` of the token that is pooled; None where it is not one."""
        if self.pool == "cls":
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if self.pool == "end" or (self.pool == "last" and mask is None):
            return torch.full((len(x),), x.shape[1] - 1, dtype=torch.int64, device=x.device)
        return last_real(mask) if self.pool == "last" and mask is not None else None

    def _of_one(self, x: Tensor) -> Encoded:
        """Of the pooled tokens `[B, D]` before the final norm."""
        pooled = F.normalize(self.proj(self.norm(x)).float(), dim=-1)
        return Encoded(Tokens(x.new_empty(len(x), 0, self.width)), pooled)

    def _pooled(self, x: Tensor, normed: Tensor, mask: Tensor | None) -> Tensor:
        """Of tokens before and after the final norm."""
        if self.attention_pool is not None:
            pooled = self.attention_pool(normed, mask if self.masked else None)
        elif self.norm_after_pool:
            pooled = self.norm(pool_tokens(x, mask, self.pool))
        else:
            pooled = pool_tokens(normed, mask, self.pool)
        return F.normalize(self.proj(pooled).float(), dim=-1)


def image_encoder(config: ImageConfig, embed_dim: int) -> nn.Module:
    """The vision encoder of a config: mm's own, or a wrapped one."""
    if config.tower is not None:
        return wrapped_image(config, embed_dim)
    return Encoder(
        config.width,
        config.depth,
        config.heads,
        embed_dim,
        mlp_ratio=config.mlp_ratio,
        pool=config.pool,
        norm_after_pool=config.norm_after_pool,
        activation=config.activation,
        qk_norm=config.qk_norm,
        eps=config.eps,
        proj=config.proj,
    )


def text_encoder(config: TextConfig, embed_dim: int) -> nn.Module:
    """The text encoder of a config: mm's own, or a wrapped one."""
    if config.tower is not None:
        return wrapped_text(config, embed_dim)
    return Encoder(
        config.width,
        config.depth,
        config.heads,
        embed_dim,
        mlp_ratio=config.mlp_ratio,
        pool=config.pool,
        causal=config.causal,
        masked=config.masked,
        activation=config.activation,
        qk_norm=config.qk_norm,
        eps=config.eps,
        proj=config.proj,
    )
