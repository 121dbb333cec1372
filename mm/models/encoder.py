"""The one encoder of every modality: a stack of blocks, a norm, a pool, and a projection to the shared space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from mm.models.wrapped import wrapped_image, wrapped_text
from mm.nn.block import Block, Norm
from mm.nn.packing import layout
from mm.nn.pool import AttentionPool, pool_tokens
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

    def forward(self, tokens: Tokens) -> Encoded:
        """Dense tokens give dense ones, packed tokens packed ones.

        In training, padding is left out of every layer. At inference a dense batch stays dense: which rows a matrix
        product has changes its last bits, and a sample must not depend on its neighbours'.
        """
        if tokens.cu_seqlens is not None:
            longest = tokens.max_len or int(tokens.cu_seqlens.diff().max())
            ragged, x = Ragged.of(tokens.cu_seqlens, longest, len(tokens.x)), tokens.x
        elif tokens.mask is not None and self.masked and self.training:
            ragged = layout(tokens.mask)
            x, longest = ragged.pack(tokens.x), ragged.longest()  # [T, D]
        else:
            x = self._blocks(tokens.x, tokens.mask if self.masked else None)
            normed = self.norm(x)
            return Encoded(tokens._replace(x=normed), self._pooled(x, normed, tokens.mask))
        x = self._blocks(x, None, ragged.offsets, longest)
        normed = self.norm(x)
        dense = ragged.pad(normed)
        before = ragged.pad(x) if self.norm_after_pool else dense
        pooled = self._pooled(before, dense, ragged.real)
        return Encoded(tokens._replace(x=dense if tokens.cu_seqlens is None else normed), pooled)

    def _blocks(self, x: Tensor, *where: Tensor | int | None) -> Tensor:
        for block in self.blocks:
            x = block(x, *where)
        return x

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
